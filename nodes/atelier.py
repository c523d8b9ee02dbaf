"""The embedded demo models."""

from comfy_api.latest import io

from .sockets import CATEGORY, searched


class LoadAtelier(io.ComfyNode):
    """The embedded models: nothing -> MODEL, CLIP, VAE, CLIP_VISION."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_LoadAtelier",
            display_name="Load Atelier",
            category=CATEGORY,
            **searched("taste", "demo", "example"),
            description="PrefGen's built-in demo: small models of a drawn picture world, 128 x 128 pixels. Needs no "
            "download and runs on the CPU.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The atelier's UNet."),
                io.Clip.Output(display_name="CLIP", tooltip="Its text encoder, which knows the atelier's own words."),
                io.Vae.Output(display_name="VAE", tooltip="Its VAE."),
                io.ClipVision.Output(
                    display_name="CLIP_VISION", tooltip="Its image encoder, for the image part of a user."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..prefgen.comfy.atelier_models import load_atelier

        return io.NodeOutput(*load_atelier())
