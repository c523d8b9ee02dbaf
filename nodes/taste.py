"""A taste on a model, in one node."""

from comfy_api.latest import io, ui

from ..prefgen.comfy import auto, folders
from .choices import checked
from .sockets import CATEGORY, advanced, searched, shows_something


class ApplyTaste(io.ComfyNode):
    """MODEL and a taste -> a MODEL that leans to it, or words for its prompts."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_ApplyTaste",
            display_name="Apply Taste",
            category=CATEGORY,
            description="Bends what the model paints towards a taste, with whatever adapter, MLLM and CLIP vision "
            "model here fit it. Where no adapter reaches the model (SD3, Flux.2), the taste comes out as words for "
            "the prompts.",
            **searched("taste", "style", "like", "personal", "profile", "ipadapter", "preference", "favorite"),
            **shows_something(),
            inputs=[
                io.Model.Input("model", tooltip="The model to bend. It stays as it is; the taste goes on a copy."),
                io.Combo.Input(
                    "taste",
                    options=list(folders.histories()),
                    tooltip="A taste of yours (the sidebar Taste, or a folder in input/prefgen), or one of the bundled "
                    "example users. name@1a2b3c4d reads a taste as it was then.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the taste counts. 1 is what its adapter is made for, 0 is the plain model "
                    "and no words, below 0 steers away. Words are the same at any other strength.",
                ),
                advanced(
                    io.Combo.Input(
                        "adapter",
                        options=[auto.AUTO, auto.WORDS, *folders.adapters()],
                        default=auto.AUTO,
                        optional=True,
                        tooltip="auto: the adapter that fits the model best. words only: no adapter, the MLLM says the "
                        "taste.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "mllm",
                        options=[auto.AUTO, *folders.mllms()],
                        default=auto.AUTO,
                        optional=True,
                        tooltip="auto: the MLLM that the adapter was trained with; for words the largest one that the "
                        "device has room for. An IP-Adapter needs none.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "clip_vision",
                        options=[auto.AUTO, *folders.clip_visions()],
                        default=auto.AUTO,
                        optional=True,
                        tooltip="auto: the CLIP vision model that the adapter reads. Others are files in "
                        "models/clip_vision.",
                    )
                ),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in the picture the taste counts: fully where it is white, not at all where it is "
                    "black. Any size. Words know no place.",
                ),
                advanced(
                    io.String.Input(
                        "item_weights",
                        default="",
                        optional=True,
                        tooltip="The weight across the pictures of a batch, as item=weight, counted from 0: 0=0, "
                        "1=0.5, 2=1 paints three strengths. It multiplies the strength; empty treats all alike.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model for a sampler; the plain one with words."),
                io.String.Output(
                    display_name="positive_words",
                    tooltip="For the positive prompt, next to what you want to see; empty where an adapter fits.",
                ),
                io.String.Output(
                    display_name="negative_words", tooltip="For the negative prompt; empty where an adapter fits."
                ),
                io.String.Output(
                    display_name="chosen", tooltip="What was used, by name and checksum. It also shows on the node."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, taste):
        return checked(folders.history_of, taste)

    @classmethod
    def fingerprint_inputs(cls, taste, adapter=auto.AUTO, mllm=auto.AUTO, clip_vision=auto.AUTO, **_):
        from ..prefgen.comfy.apply_taste import fingerprint

        return fingerprint(taste, auto.Request(adapter, mllm, clip_vision))

    @classmethod
    def execute(
        cls,
        model,
        taste,
        strength=1.0,
        adapter=auto.AUTO,
        mllm=auto.AUTO,
        clip_vision=auto.AUTO,
        attn_mask=None,
        item_weights="",
    ) -> io.NodeOutput:
        from ..prefgen.comfy.apply_taste import apply_taste

        applied = apply_taste(model, taste, strength, auto.Request(adapter, mllm, clip_vision), attn_mask, item_weights)
        return io.NodeOutput(*applied, ui=ui.PreviewText(applied.chosen))
