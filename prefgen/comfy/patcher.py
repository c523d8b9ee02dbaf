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

from ..apply_options import TEXT, is_zero, parse_block_weights, parse_item_weights, parse_weight_schedule
from ..errors import AdapterError
from ..fusion import FusedUser
from .application import Application
from .bases import Base, base_of, unet_blocks, why_unreached
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
    base = base_of(model)
    if base is None:
        why = why_unreached(model)
        raise AdapterError(
            f"{NODE} needs a UNet with cross-attention or the blocks of Flux.1; {type(model.model).__name__} has none"
            f"{', and ' if why else ''}{why}: put the taste into its prompt with Describe Preference."
        )
    header = user.adapter.header
    count = base.check(header)
    of_blocks, text_weight = weights_of_blocks(base, count, header.in_attention, blocks, block_weights)
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
        in_attention=header.in_attention,
        text_weight=text_weight,
    )
    application.prepare(model.get_model_object("model_sampling"))
    return with_application(model, application, base)


def weights_of_blocks(
    base: Base, count: int, has_text: bool, blocks: str, block_weights: str
) -> tuple[tuple[float, ...], float]:
    """(the weight of every place of a base, of which an adapter reaches the first `count`; that of the text's tokens,
    which artists name beside blocks where `has_text`)."""
    text = (TEXT,) if has_text else ()
    widths = (*base.widths[:count], *([0] * len(text)))
    weights = parse_block_weights((*base.addresses[:count], *text), widths, blocks, block_weights)
    return weights[:count] + (0.0,) * (len(base.addresses) - count), weights[count] if has_text else 0.0


def with_application(model: ModelPatcher, application: Application, base: Base) -> ModelPatcher:
    """A clone of a model, which is such a base, with one more user on it."""
    clone = model.clone()
    earlier = [branch.applications for branch in clone.get_wrappers(WrappersMP.APPLY_MODEL, KEY)]
    branch = UserBranch((*(earlier[0] if earlier else ()), application), base)
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
    once it is built."""

    def __init__(self, applications: tuple[Application, ...], base: Base):
        self.applications = applications
        self.base = base

    def outer_sample(self, executor, noise, *args, **kwargs):
        """OUTER_SAMPLE: project K and V, sample, let go of them."""
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        options = guider.model_options["transformer_options"]  # the run's own copy
        conds = getattr(guider, "conds", {})
        run = self.base.run(self.applications, self.base.addresses, sampling, conds, tuple(noise.shape))
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
                run.patch(options, call, x, model)
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    @contextmanager
    def run_of(self, options: dict, model) -> Iterator[Run]:
        """The sampling run that options belong to. Outside of one, or in the run of a guider that samples with another
        model: a run of our own, for the length of the block."""
        run = options.get(KEY)
        if run is not None and run.applications is self.applications:
            yield run
            return
        run = self.base.run(self.applications, self.base.addresses, model.model_sampling, {})
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
