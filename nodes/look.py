"""Looking at pictures for the Rate view of the sidebar."""

from comfy_api.latest import io

from ..prefgen.comfy import tastes
from .choices import checked
from .sockets import CATEGORY


class LookAtPictures(io.ComfyNode):
    """CLIP_VISION and a taste -> embeddings beside the taste, which the Rate view goes by."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_LookAtPictures",
            display_name="Look at Pictures",
            category=CATEGORY,
            description="CLIP vision looks at a taste's pictures and at what was painted. The sidebar's Rate view "
            "queues this by itself: it then shows first what the taste is least sure of, and how settled the taste is.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="Any CLIP vision model; each keeps embeddings of its own."),
                io.Combo.Input(
                    "taste", options=tastes.shelf().names(), tooltip="The taste whose pictures are looked at."
                ),
                io.String.Input(
                    "pictures",
                    default="[]",
                    multiline=True,
                    optional=True,
                    tooltip="Pictures without a verdict, as the Rate view lists them: JSON with filename, subfolder "
                    "and type of each.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, taste=None):
        return checked(tastes.chosen, taste)

    @classmethod
    def fingerprint_inputs(cls, **_):
        # What lacks an embedding is looked up each time; nothing depends on this node.
        return float("nan")

    @classmethod
    def execute(cls, clip_vision, taste, pictures="[]") -> io.NodeOutput:
        from ..prefgen.comfy.looking import look

        target = tastes.chosen(taste)
        if target is None:
            raise ValueError("Look at Pictures has no taste: choose one of the list.")
        look(clip_vision, target, pictures)
        tastes.tell(target.name)
        return io.NodeOutput()
