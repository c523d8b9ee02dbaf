"""The user branch on a loaded UNet: one wrapper that composes with whatever else already sits on the attention.

Other packs fill `patches_replace["attn2"]`, a register with one slot a block. Nothing is written there: while the model
is called, a copy of the options gets `what sits in the slot, or the plain attention, plus the users' residuals`. So the
order of nodes doesn't matter, and what an input model can reach never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..adapter import FAMILY_NAMES, FAMILY_OF_WIDTH
from ..adapter_checks import check_compatible
from ..apply_options import Block, is_zero, parse_block_weights, parse_item_weights, parse_weight_schedule
from ..errors import AdapterError
from ..fusion import FusedUser
from .application import Application
from .layout import NODE, LayoutError
from .marks import MARKS
from .rows import BATCH
from .run import Run

KEY = "prefgen"
APPLY_TO = ("positive", "both")


def apply_user(
    model: ModelPatcher,
    user: FusedUser,
    weight: float = 1.0,
    start_at: float = 0.0,
    end_at: float = 1.0,
    attn_mask: torch.Tensor | None = None,
    apply_to: str = "positive",
    blocks: str = "all",
    block_weights: str = "",
    weight_schedule: str = "",
    item_weights: str = "",
) -> ModelPatcher:
    """A clone of `model` whose cross-attention adds `weight` times the attention to the user's tokens.

    `start_at`, `end_at`: share of the sampling, 0..1; `attn_mask` [b, H, W] or [H, W] in 0..1, of any size;
    `apply_to`: "positive", or "both" for the trained no-user tokens on the unconditional half, which a user whose
    disliked pictures are negative gets in any case. `blocks` names a preset; `block_weights`, `weight_schedule` and
    `item_weights` are as an artist types them (see apply_options.py); all multiply the weight. Weight 0 returns `model`
    itself. Users already on the model stay. Raises AdapterError with one sentence if the model has no UNet
    cross-attention or the adapter doesn't fit it, ValueError with one for a typing error.
    """
    if apply_to not in APPLY_TO:
        raise ValueError(f"apply_to must be one of {', '.join(APPLY_TO)}, not {apply_to!r}.")
    attentions = list(cross_attention_blocks(model))
    if not attentions:
        raise AdapterError(
            "Apply User Cross-Attention needs a UNet with cross-attention (SD1.5, SD2, SDXL or the atelier); "
            f"{type(model.model).__name__} has none: put the taste into its prompt with Describe Preference."
        )
    widths = [attention.heads * attention.dim_head for _, attention in attentions]
    cross_dim = attentions[0][1].to_k.in_features
    check_compatible(user.adapter.header, widths, cross_dim, family_name(model, cross_dim))
    addresses = tuple(block for block, _ in attentions)
    of_blocks = parse_block_weights(addresses, widths, blocks, block_weights)
    schedule = parse_weight_schedule(weight_schedule)
    of_items = parse_item_weights(item_weights)
    if weight == 0 or start_at > end_at or not any(of_blocks) or is_zero(schedule) or is_zero(of_items):
        return model
    application = Application(
        user=user,
        weight=float(weight),
        start_at=start_at,
        end_at=end_at,
        attn_mask=None if attn_mask is None else clean_mask(attn_mask),
        uncond=apply_to == "both" or user.negative,
        block_weights=of_blocks,
        weight_schedule=schedule,
        item_weights=of_items,
    )
    application.prepare(model.get_model_object("model_sampling"))
    return with_application(model, application, addresses)


def with_application(model: ModelPatcher, application: Application, addresses: tuple[Block, ...]) -> ModelPatcher:
    """A clone of a model with one more user on it. addresses: of every cross-attention, in file order."""
    clone = model.clone()
    earlier = [branch.applications for branch in clone.get_wrappers(WrappersMP.APPLY_MODEL, KEY)]
    branch = UserBranch((*(earlier[0] if earlier else ()), application), addresses)
    wrappers = {
        WrappersMP.OUTER_SAMPLE: branch.outer_sample,
        WrappersMP.CALC_COND_BATCH: branch.calc_cond_batch,
        WrappersMP.APPLY_MODEL: branch,
    }
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


class UserBranch:
    """All users of one model, as the wrappers that ComfyUI calls, from the outermost to the innermost. Never changes
    once it is built. addresses: of every cross-attention, in file order."""

    def __init__(self, applications: tuple[Application, ...], addresses: tuple[Block, ...]):
        self.applications = applications
        self.addresses = addresses

    def outer_sample(self, executor, noise, *args, **kwargs):
        """OUTER_SAMPLE: project K and V, sample, let go of them."""
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        options = guider.model_options["transformer_options"]  # the run's own copy
        conds = getattr(guider, "conds", {})
        run = Run(self.applications, self.addresses, sampling, conds, tuple(noise.shape))
        options[KEY] = run
        try:
            return executor(noise, *args, **kwargs)
        finally:
            options.pop(KEY, None)
            run.let_go()

    def calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options):
        """CALC_COND_BATCH: mark the conditions of a step before they are stacked."""
        options = model_options.get("transformer_options", {})
        with self.run_of(options, model) as run:
            batch, marked = run.rows.mark(conds, x_in, model_options)
            options = options | {KEY: run, BATCH: batch}
            out = executor(model, marked, x_in, timestep, model_options | {"transformer_options": options})
            if not run.was_called:
                check_nothing_painted(conds)
            return out

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """APPLY_MODEL: one model call, with the users added to the cross-attention of every block."""
        marks = kwargs.pop(MARKS, None)
        options = dict(transformer_options or {})
        model = executor.class_obj
        with self.run_of(options, model) as run:
            options[KEY] = run
            if not run.was_called:
                check_attention(model.diffusion_model)
                run.preferred = preferred_attentions(model.diffusion_model)
                run.was_called = True
            call = run.call(t, x, options, marks, c_crossattn)
            if call.users:
                run.patch(options, call, x.device, model.manual_cast_dtype or model.get_dtype())
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    @contextmanager
    def run_of(self, options: dict, model) -> Iterator[Run]:
        """The sampling run that options belong to. Outside of one, or in the run of a guider that samples with another
        model: a run of our own, for the length of the block."""
        run = options.get(KEY)
        if run is not None and run.applications is self.applications:
            yield run
            return
        run = Run(self.applications, self.addresses, model.model_sampling, {})
        try:
            yield run
        finally:
            run.let_go()


def clean_mask(attn_mask: torch.Tensor) -> torch.Tensor:
    """Masks [H, W] or [..., H, W] as [b, H, W], fp32 on the CPU, a copy of our own. Raises ValueError with one sentence
    for values that are not numbers."""
    mask = attn_mask.detach().float().cpu().reshape(-1, *attn_mask.shape[-2:]).clone()
    if not torch.isfinite(mask).all():
        raise ValueError(f"The attn_mask of {NODE} has values that are not numbers (NaN or inf).")
    return mask


def check_nothing_painted(conds: Sequence) -> None:
    """Raise LayoutError with one sentence if a step of which no model call came by here was painted nevertheless."""
    # ComfyUI leaves out the conditions that a timestep range keeps from a step.
    if any("timestep_start" not in cond and "timestep_end" not in cond for group in conds for cond in group or ()):
        raise LayoutError(
            f"{NODE} has no effect here, since another node calls the model without its options: take that node (a "
            "sampler wrapper) out of this model's chain."
        )


def check_attention(unet: torch.nn.Module) -> None:
    """Raise LayoutError with one sentence if another node has put a function of its own in a cross-attention's place:
    ComfyUI calls that only where nothing is patched, so it would be lost without a word."""
    # ComfyUI takes a patch back by setting the module's own method on it.
    if any(getattr(a.forward, "__func__", None) is not type(a).forward for _, a in unet_blocks(unet)):
        raise LayoutError(
            f"Another node puts a function of its own in the place of a cross-attention, beside which {NODE} can't "
            "work: take that node (an older regional prompter, for example) out of this model's chain."
        )


def preferred_attentions(unet: torch.nn.Module) -> dict[int, object]:
    """{number of a cross-attention: the attention that ComfyUI calls there for the sake of the file}, where there is
    one: ComfyUI newer than 0.33 has it, and leaves it to whoever fills the attention's slot."""
    preferred = enumerate(getattr(attention, "comfy_attention", None) for _, attention in unet_blocks(unet))
    return {number: attention for number, attention in preferred if attention is not None}


def cross_attention_blocks(model: ModelPatcher) -> Iterator[tuple[Block, torch.nn.Module]]:
    """`unet_blocks` of a model as it is patched."""
    return unet_blocks(model.get_model_object("diffusion_model"))


def unet_blocks(unet: torch.nn.Module) -> Iterator[tuple[Block, torch.nn.Module]]:
    """Every cross-attention of a UNet with the address ComfyUI dispatches it under, in the order of IP-Adapter
    files: input blocks, output blocks, middle block. Nothing for a model that isn't such a UNet."""
    middle = getattr(unet, "middle_block", None)
    stages = [
        *(("input", number, stage) for number, stage in enumerate(getattr(unet, "input_blocks", ()))),
        *(("output", number, stage) for number, stage in enumerate(getattr(unet, "output_blocks", ()))),
        *([("middle", 0, middle)] if middle is not None else ()),
    ]
    for kind, number, stage in stages:
        for layer in stage.children():
            for index, block in enumerate(getattr(layer, "transformer_blocks", ())):
                if getattr(block, "attn2", None) is not None:
                    yield (kind, number, index), block.attn2


def family_name(model: ModelPatcher, cross_dim: int) -> str:
    """What people call the connected model, for messages."""
    # Released families are told apart by the width of their text states; the atelier's model says what it is.
    family = getattr(model.model.model_config, "prefgen_family", FAMILY_OF_WIDTH.get(cross_dim))
    return FAMILY_NAMES[family] if family else f"a UNet with text width {cross_dim}"
