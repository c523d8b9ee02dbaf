"""The user branch on a loaded UNet: one wrapper that composes with whatever else already sits on the attention.

Other packs fill `patches_replace["attn2"]`, a register with one slot a block. Nothing is written there: while the model
is called, a copy of the options gets `what sits in the slot, or the plain attention, plus the users' residuals`. So the
order of nodes doesn't matter, and what an input model can reach never changes.

K and V of the users are projected once a sampling run, on the CPU where the adapter's weights stay, and live in the
run's own copy of the options until it ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..adapter import AdapterError, check_compatible
from ..blocks import Block, block_weights, schedule, scheduled
from ..branch import mask_to_tokens, user_residual
from ..encoded import FusedUser
from ..header import FAMILY_NAMES, FAMILY_OF_WIDTH

KEY = "prefgen"
APPLY_TO = ("positive", "both")

SHARES = 200  # steps in which a run's sigmas are tabulated for a schedule


@dataclass(frozen=True, eq=False)
class Application:
    """One user applied to a model. `mask` [b, H, W] in 0..1 or None; `uncond`: the unconditional half gets what
    training calls no user, or the user's disliked pictures. `blocks`: a factor for every block, file order; `points`:
    (share of the sampling, factor), none for a level weight."""

    user: FusedUser
    weight: float
    start_at: float
    end_at: float
    mask: torch.Tensor | None
    uncond: bool
    blocks: tuple[float, ...]
    points: tuple[tuple[float, float], ...] = ()

    @property
    def always(self) -> bool:
        return self.start_at <= 0.0 and self.end_at >= 1.0


@dataclass(frozen=True)
class Call:
    """Who is on in one model call, and with what weight. `rows` has a tuple for each active application: for every
    chunk of the batch 0 for its user's K and V, 1 for those of no user, None for nothing."""

    active: tuple[int, ...]
    weights: tuple[float, ...]
    rows: tuple[tuple[int | None, ...], ...]


class Run:
    """What one sampling run needs: K and V, resized masks, composed attention functions. Dropped when it ends."""

    def __init__(self, applications: tuple[Application, ...], blocks: tuple[Block, ...], model_sampling, conds: dict):
        self.applications = applications
        self.numbers = {block: number for number, block in enumerate(blocks)}
        self.sigmas = [
            (float(model_sampling.percent_to_sigma(a.start_at)), float(model_sampling.percent_to_sigma(a.end_at)))
            for a in applications
        ]
        self.share = _share_of(model_sampling) if any(a.points for a in applications) else None
        self.negative = {
            cond["uuid"]
            for name, group in conds.items()
            if "negative" in name
            for cond in group or ()
            if "uuid" in cond
        }
        self.known = self.negative | {
            cond["uuid"] for group in conds.values() for cond in group or () if "uuid" in cond
        }
        with torch.no_grad():
            self.projected = [a.user.keys_values() for a in applications]
        self._keys_values: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weighted: dict[tuple, tuple[float, torch.Tensor]] = {}
        self._masks: dict[tuple, torch.Tensor] = {}
        self._calls: dict[tuple, Call] = {}
        self._patches: dict[Block, tuple[Callable | None, Callable]] = {}

    def call(self, sigma: torch.Tensor, options: dict) -> Call:
        """Who is on, from sigma [B] and the chunks of the batch. Reads the device once, and only if somebody has a
        start, an end or a schedule."""
        weights = {i: a.weight for i, a in enumerate(self.applications)}
        if not all(a.always and not a.points for a in self.applications):
            value = float(sigma.flatten()[0])
            weights = {i: w for i, w in weights.items() if self.sigmas[i][1] <= value <= self.sigmas[i][0]}
            for i in weights:
                if self.applications[i].points:
                    weights[i] *= scheduled(self.applications[i].points, self.share(value))
        chunks = options.get("cond_or_uncond", [0])
        uuids = options.get("uuids", [None] * len(chunks))
        # A guider with more than two conditions numbers them its own way, so the condition itself is asked first.
        negative = tuple(
            uuid in self.negative if uuid in self.known else index == 1
            for index, uuid in zip(chunks, uuids, strict=True)
        )
        key = (tuple(weights.items()), negative)
        if key not in self._calls:
            rows = {i: tuple(_row(self.applications[i], n) for n in negative) for i in weights}
            some = [i for i in weights if weights[i] and any(row is not None for row in rows[i])]
            self._calls[key] = Call(tuple(some), tuple(weights[i] for i in some), tuple(rows[i] for i in some))
        return self._calls[key]

    def reached(self, call: Call) -> list[Block]:
        """The blocks in which somebody who is on counts."""
        reach = [self.applications[i].blocks for i in call.active]
        return [block for block, number in self.numbers.items() if any(factors[number] for factors in reach)]

    def patch(self, block: Block, prior: Callable | None) -> Callable:
        """The composed attention of one block; the same object as long as the same prior sits there, so that a
        compiled model doesn't take every step for a new one."""
        cached = self._patches.get(block)
        if cached is None or cached[0] is not prior:
            cached = prior, partial(_attention, self, self.numbers[block], prior)
            self._patches[block] = cached
        return cached[1]

    def keys_values(self, application: int, block: int, rows: tuple[int, ...], like: torch.Tensor, weight: float):
        """K, and V times the weight, for len(rows) equal chunks beside queries `like` [B, T, width]: [1 or B, N, width]."""
        same = len(set(rows)) == 1
        key = (application, block, rows[0] if same else (rows, like.shape[0]), like.device, like.dtype)
        if key not in self._keys_values:
            k, v = self.projected[application][block]
            index = [rows[0]] if same else [row for row in rows for _ in range(like.shape[0] // len(rows))]
            self._keys_values[key] = tuple(x[index].to(device=like.device, dtype=like.dtype) for x in (k, v))
        k, v = self._keys_values[key]
        # A schedule changes the weight from step to step: the last one is kept.
        if key not in self._weighted or self._weighted[key][0] != weight:
            self._weighted[key] = weight, v * weight
        return k, self._weighted[key][1]

    def mask(self, application: int, shape: list[int], chunks: int, like: torch.Tensor) -> torch.Tensor | None:
        """The mask for queries `like` [chunks * b, T, width] of a latent `shape` [B, C, H, W]: [1 or B, T, 1]."""
        mask = self.applications[application].mask
        if mask is None:
            return None
        key = (application, tuple(shape[-2:]), tuple(like.shape[:2]), chunks, like.device, like.dtype)
        if key not in self._masks:
            tokens = mask_to_tokens(mask, like.shape[1], tuple(shape[-2:]))
            if tokens.shape[0] > 1:
                each = like.shape[0] // chunks
                tokens = torch.cat([tokens, tokens[-1:].expand(max(each - tokens.shape[0], 0), -1, -1)])[:each]
                tokens = tokens.repeat(chunks, 1, 1)
            self._masks[key] = tokens.to(device=like.device, dtype=like.dtype)
        return self._masks[key]


class UserBranch:
    """All users of one model, as the two wrappers that ComfyUI calls. Never changes after it is made."""

    def __init__(self, applications: tuple[Application, ...], blocks: tuple[Block, ...]):
        self.applications = applications
        self.blocks = blocks

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: project K and V, sample, let go of them."""
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        options = guider.model_options["transformer_options"]  # the run's own copy
        options[KEY] = Run(self.applications, self.blocks, sampling, getattr(guider, "conds", {}))
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(KEY, None)

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        """APPLY_MODEL: one model call, with the users added to the cross-attention of every block."""
        options = dict(transformer_options or {})
        run = options.get(KEY)
        # Outside a sampling run, or in the run of a guider that samples with another model: a run of our own.
        if run is None or run.applications is not self.applications:
            run = options[KEY] = Run(self.applications, self.blocks, executor.class_obj.model_sampling, {})
        call = run.call(t, options)
        if call.active:
            options["prefgen_call"] = call
            replace = dict(options.get("patches_replace", {}))
            prior = replace.get("attn2", {})
            # ComfyUI looks for the transformer's own slot first, then for one that covers the whole block.
            composed = {b: run.patch(b, prior.get(b, prior.get(b[:2]))) for b in run.reached(call)}
            options["patches_replace"] = replace | {"attn2": prior | composed}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def apply_user(
    model: ModelPatcher,
    user: FusedUser,
    weight: float = 1.0,
    start_at: float = 0.0,
    end_at: float = 1.0,
    attn_mask: torch.Tensor | None = None,
    apply_to: str = "positive",
    blocks: str = "all",
    per_block: str = "",
    over_time: str = "",
) -> ModelPatcher:
    """A clone of `model` whose cross-attention adds `weight` times the attention to the user's tokens.

    `start_at`, `end_at`: share of the sampling, 0..1; `attn_mask` [b, H, W] or [H, W] in 0..1, of any size;
    `apply_to`: "positive", or "both" for the trained no-user tokens on the unconditional half, which a user whose
    disliked pictures are negative gets in any case. `blocks` and `per_block`: see `block_weights`; `over_time`: see
    `schedule`; both multiply the weight. Weight 0 returns `model` itself. Users already on the model stay. Raises
    AdapterError with one sentence if the model has no UNet cross-attention or the adapter doesn't fit it, ValueError
    with one for a typing error.
    """
    if apply_to not in APPLY_TO:
        raise ValueError(f"apply_to must be one of {', '.join(APPLY_TO)}, not {apply_to!r}.")
    found = list(cross_attention_blocks(model))
    if not found:
        raise AdapterError(
            f"Apply User Cross-Attention needs a UNet with cross-attention (SD1.5, SD2, SDXL or the atelier); "
            f"{type(model.model).__name__} has none."
        )
    widths = [attention.heads * attention.dim_head for _, attention in found]
    cross_dim = found[0][1].to_k.in_features
    check_compatible(user.adapter.header, widths, cross_dim, family_name(model, cross_dim))
    addresses = tuple(block for block, _ in found)
    factors, points = block_weights(addresses, widths, blocks, per_block), schedule(over_time)
    nowhere, never = not any(factors), points and not any(factor for _, factor in points)
    if weight == 0 or start_at > end_at or nowhere or never:
        return model
    if attn_mask is not None:
        attn_mask = attn_mask.detach().float().cpu().reshape(-1, *attn_mask.shape[-2:]).clone()
        if not torch.isfinite(attn_mask).all():
            raise ValueError(
                "The attn_mask of Apply User Cross-Attention has values that are not numbers (NaN or inf)."
            )
    uncond = apply_to == "both" or user.negative
    application = Application(user, float(weight), start_at, end_at, attn_mask, uncond, factors, points)

    clone = model.clone()
    earlier = [branch.applications for branch in clone.get_wrappers(WrappersMP.APPLY_MODEL, KEY)]
    branch = UserBranch((*(earlier[0] if earlier else ()), application), addresses)
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, branch.outer_sample), (WrappersMP.APPLY_MODEL, branch)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def cross_attention_blocks(model: ModelPatcher) -> Iterator[tuple[Block, torch.nn.Module]]:
    """Every cross-attention of the loaded UNet with the address ComfyUI dispatches it under, in the order of IP-Adapter
    files: input blocks, output blocks, middle block. Nothing for a model that isn't such a UNet."""
    unet = model.get_model_object("diffusion_model")
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
    if type(model.model.model_config).__name__ == "AtelierModel":
        return "atelier"
    family = FAMILY_OF_WIDTH.get(cross_dim)
    return FAMILY_NAMES[family] if family else f"a UNet with text width {cross_dim}"


def _share_of(model_sampling) -> Callable[[float], float]:
    """A function from sigma to the share of the sampling, 0..1, for any schedule that knows the way back."""
    shares = [i / SHARES for i in range(SHARES + 1)]
    # ComfyUI gives the very start an endless sigma.
    sigmas = [float(model_sampling.sigma_max), *(float(model_sampling.percent_to_sigma(s)) for s in shares[1:])]
    rising = sigmas[::-1]

    def share(sigma: float) -> float:
        if sigma >= rising[-1]:
            return 0.0
        i = bisect_left(rising, sigma)
        if i == 0:
            return 1.0
        low, high = rising[i - 1], rising[i]
        return 1 - (i - 1 + (sigma - low) / (high - low)) / SHARES

    return share


def _row(application: Application, negative: bool) -> int | None:
    if not negative:
        return 0
    return 1 if application.uncond else None


def _attention(run: Run, block: int, prior: Callable | None, q, k, v, extra: dict) -> torch.Tensor:
    """What ComfyUI calls in place of one cross-attention: q [B, T, width], k and v [B, text tokens, width]."""
    attention = partial(optimized_attention, attn_precision=extra.get("attn_precision"), transformer_options=extra)
    heads = extra["n_heads"]
    out = attention(q, k, v, heads) if prior is None else prior(q, k, v, extra)
    call, metadata = extra["prefgen_call"], {"heads": heads, "attention": attention}
    # What the plain attention has just made is ours to add to; another's result, or what a gradient needs, is not.
    if prior is not None or out.requires_grad:
        out = out.clone()
    for application, weight, rows in zip(call.active, call.weights, call.rows, strict=True):
        factor = run.applications[application].blocks[block]
        if not factor:
            continue
        chosen = [chunk for chunk, row in enumerate(rows) if row is not None]
        everywhere = len(chosen) == len(rows)
        base, query = (out, q) if everywhere else (_pick(out, chosen, len(rows)), _pick(q, chosen, len(rows)))
        chosen_rows = tuple(rows[chunk] for chunk in chosen)
        user_k, user_v = run.keys_values(application, block, chosen_rows, query, weight * factor)
        mask = run.mask(application, extra["original_shape"], len(chosen), query)
        residual = user_residual(base, query, metadata, user_k, user_v, mask)
        parts = out.chunk(len(rows))
        for chunk, part in zip(chosen, residual.chunk(len(chosen)), strict=True):
            parts[chunk].add_(part)
    return out


def _pick(batch: torch.Tensor, chosen: list[int], chunks: int) -> torch.Tensor:
    parts = batch.chunk(chunks)
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[chunk] for chunk in chosen])
