"""The user: fused from an encoded history, applied to a model."""

from comfy_api.latest import io

from ..prefgen.apply_options import PRESETS
from ..prefgen.comfy import folders
from ..prefgen.pooling import PUSH_AWAY, WAYS
from .choices import checked
from .sockets import CATEGORY, Preference, User, advanced, searched

APPLY_TO = {"positive only": "positive", "both halves": "both"}


class FuseUserVector(io.ComfyNode):
    """PREFGEN_PREFERENCE and an adapter file -> PREFGEN_USER."""

    @classmethod
    def define_schema(cls):
        def part(name, what):
            tooltip = f"How much {what}. 0 leaves it out."
            return io.Float.Input(name, default=1.0, min=0.0, max=2.0, step=0.05, tooltip=tooltip)

        return io.Schema(
            node_id="PrefGen_FuseUserVector",
            display_name="Fuse User Vector",
            category=CATEGORY,
            **searched("taste", "style", "ipadapter", "profile", "personal"),
            description="Turns what was read from the history into one user, for the model family of the adapter.",
            inputs=[
                Preference.Input("preference", tooltip="From Encode Preference History."),
                io.Combo.Input(
                    "adapter",
                    options=list(folders.adapters()),
                    tooltip="'atelier' is built in and fits Load Atelier. Others are PrefGen adapters in "
                    "models/prefgen, and public IP-Adapters (base, plus, full face, Flux.1's) there or in "
                    "models/ipadapter.",
                ),
                part("semantic", "the taste in words (likes, dislikes, style) counts"),
                part("core", "the user's identity counts: what sets this taste apart from others"),
                part("image", "the look of the liked pictures counts (needs clip_vision in Encode Preference History)"),
                advanced(
                    io.Combo.Input(
                        "pooling",
                        options=list(WAYS),
                        default=PUSH_AWAY,
                        optional=True,
                        tooltip="For IP-Adapters. push away: the average liked picture, moved away from the disliked "
                        "ones. side by side: each liked picture on its own, for mixed tastes. least disliked: liked "
                        "pictures count more the less they resemble disliked ones. negative: the disliked pictures go "
                        "with the negative prompt.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "push",
                        default=0.5,
                        min=0.0,
                        max=2.0,
                        step=0.05,
                        optional=True,
                        tooltip="For IP-Adapters: how much the disliked pictures count. 0 ignores them.",
                    )
                ),
            ],
            outputs=[User.Output(display_name="PREFGEN_USER", tooltip="For Apply User Cross-Attention.")],
        )

    @classmethod
    def validate_inputs(cls, adapter):
        return checked(folders.adapter_path, adapter)

    @classmethod
    def fingerprint_inputs(cls, adapter, **_):
        return folders.file_fingerprint(adapter, folders.adapter_path(adapter))

    @classmethod
    def execute(
        cls, preference, adapter, semantic=1.0, core=1.0, image=1.0, pooling=PUSH_AWAY, push=0.5
    ) -> io.NodeOutput:
        from ..prefgen.adapter_checks import check_encoded
        from ..prefgen.adapter_file import load_adapter_once
        from ..prefgen.fusion import fuse_user

        loaded = load_adapter_once(folders.adapter_path(adapter))
        check_encoded(loaded.header, preference)
        return io.NodeOutput(fuse_user(loaded, preference, semantic, core, image, pooling, push))


class ApplyUserCrossAttention(io.ComfyNode):
    """MODEL and PREFGEN_USER -> a MODEL with one user more."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PrefGen_ApplyUserCrossAttention",
            display_name="Apply User Cross-Attention",
            category=CATEGORY,
            **searched("taste", "style", "ipadapter", "personal", "profile"),
            description="Bends everything the model paints towards the user's taste. Works alongside LoRA, "
            "ControlNet and IP-Adapter in any order; several users add up.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model that the adapter fits. It stays as it is; the user goes on a copy."
                ),
                User.Input("user", tooltip="From Fuse User Vector."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the user counts. 0 is the plain model; below 0 steers away from the taste.",
                ),
                io.Float.Input(
                    "start_at",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the user comes in, as a share of the sampling. 0 is the beginning.",
                ),
                io.Float.Input(
                    "end_at",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the user leaves, as a share of the sampling. 1 is the end.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default="positive only",
                    tooltip="positive only: the negative prompt gets no user at all. both halves: it gets the 'no "
                    "user' that the adapter was trained with.",
                ),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in the picture the user counts: fully where it is white, not at all where it is "
                    "black. Any size.",
                ),
                advanced(
                    io.Combo.Input(
                        "blocks",
                        options=list(PRESETS),
                        default="all",
                        optional=True,
                        tooltip="Which blocks of the model the user reaches. style: colours, material and mood, with "
                        "little effect on the layout. composition: the layout, with little effect on the style.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "block_weights",
                        default="",
                        optional=True,
                        tooltip="Weights for single blocks, in place of the preset's: in8=0.5, out1=1, mid=0. in, out "
                        "and all work too; on Flux double3, single12. They multiply the weight.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "weight_schedule",
                        default="",
                        optional=True,
                        tooltip="The weight over the course of the sampling, as share=weight: 0=1, 0.5=0.3, 1=0 fades "
                        "out. It multiplies the weight; leave empty for a constant one.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "item_weights",
                        default="",
                        optional=True,
                        tooltip="The weight across the pictures of a batch or the frames of an animation, as "
                        "item=weight, counted from 0: 0=1, 15=0 fades out. Two users can share a batch: 1=1, 2=0 on "
                        "one, 1=0, 2=1 on the other. It multiplies the weight; leave empty to treat all alike.",
                    )
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with the user applied, for a sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        user,
        weight=1.0,
        start_at=0.0,
        end_at=1.0,
        apply_to="positive only",
        attn_mask=None,
        blocks="all",
        block_weights="",
        weight_schedule="",
        item_weights="",
    ) -> io.NodeOutput:
        from ..prefgen.comfy import provenance
        from ..prefgen.comfy.patcher import apply_user

        # ComfyUI 0.3.75 lets any combo value through: apply_user refuses what it does not know.
        patched = apply_user(
            model,
            user,
            weight,
            start_at,
            end_at,
            attn_mask,
            apply_to=APPLY_TO.get(apply_to, apply_to),
            blocks=blocks,
            block_weights=block_weights,
            weight_schedule=weight_schedule,
            item_weights=item_weights,
        )
        provenance.note(None if patched is model else user, weight)
        return io.NodeOutput(patched)
