"""One sampling run: who is on in a model call, with which K and V, and what they add to an attention.

K and V of the users are projected once a run, on the CPU where the adapter's weights stay, and live in the run's own
copy of the options until it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from comfy.ldm.modules.attention import optimized_attention

from ..blocks import Block, interpolated
from ..branch import mask_to_tokens, user_residual
from ..encoded import FusedUser
from .sigmas import Sigmas


@dataclass(frozen=True, eq=False)
class Application:
    """One user applied to a model. `mask` [b, H, W] in 0..1 or None; `uncond`: the unconditional half gets what
    training calls no user, or the user's disliked pictures. `blocks`: a factor for every block, file order; `points`:
    (share of the sampling, factor), none for a level weight; `items`: (number of the batch item, factor), none for all
    items alike."""

    user: FusedUser
    weight: float
    start_at: float
    end_at: float
    mask: torch.Tensor | None
    uncond: bool
    blocks: tuple[float, ...]
    points: tuple[tuple[float, float], ...] = ()
    items: tuple[tuple[float, float], ...] = ()

    @property
    def by_item(self) -> bool:
        """Whether it matters which item of the batch is painted."""
        return bool(self.items) or (self.mask is not None and len(self.mask) > 1)

    @property
    def always(self) -> bool:
        return self.start_at <= 0.0 and self.end_at >= 1.0

    def ask(self, model_sampling) -> None:
        """Have ready what a run asks of the model's schedule."""
        sigmas = Sigmas.of(model_sampling)
        for share in (self.start_at, self.end_at):
            sigmas.at(model_sampling, share)
        if self.points:
            sigmas.tabulate(model_sampling)


@dataclass(frozen=True)
class Call:
    """Who is on in one model call, and with what weight. `rows` has a tuple for each active application: for every
    chunk of the batch 0 for its user's K and V, 1 for those of no user, None for nothing. `items`: the numbers of the
    batch's items in this call, () if nobody asks for them."""

    active: tuple[int, ...]
    weights: tuple[float, ...]
    rows: tuple[tuple[int | None, ...], ...]
    items: tuple[int, ...] = ()


class Run:
    """What one sampling run needs: K and V, resized masks, composed attention functions. Dropped when it ends."""

    def __init__(self, applications: tuple[Application, ...], blocks: tuple[Block, ...], model_sampling, conds: dict):
        self.applications = applications
        self.numbers = {block: number for number, block in enumerate(blocks)}
        for application in applications:
            application.ask(model_sampling)
        self.sigmas = Sigmas.of(model_sampling)
        self.spans = [
            tuple(self.sigmas.at(model_sampling, share) for share in (a.start_at, a.end_at)) for a in applications
        ]
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
        self._weighted: dict[tuple, tuple[tuple, torch.Tensor]] = {}
        self._masks: dict[tuple, torch.Tensor] = {}
        self._calls: dict[tuple, Call] = {}
        self._patches: dict[Block, tuple[Callable | None, Callable]] = {}

    def call(self, sigma: torch.Tensor, options: dict, batch: int) -> Call:
        """Who is on, from sigma [B] and the chunks of a batch of latents. Reads the device once, and only if somebody
        has a start, an end or a schedule."""
        weights = {i: a.weight for i, a in enumerate(self.applications)}
        if not all(a.always and not a.points for a in self.applications):
            value = float(sigma.flatten()[0])
            weights = {i: w for i, w in weights.items() if self.spans[i][1] <= value <= self.spans[i][0]}
            for i in weights:
                if self.applications[i].points:
                    weights[i] *= interpolated(self.applications[i].points, self.sigmas.share(value))
        chunks = options.get("cond_or_uncond", [0])
        uuids = options.get("uuids", [None] * len(chunks))
        # A guider with more than two conditions numbers them its own way, so the condition itself is asked first.
        negative = tuple(
            uuid in self.negative if uuid in self.known else index == 1
            for index, uuid in zip(chunks, uuids, strict=True)
        )
        items = ()
        if any(self.applications[i].by_item for i in weights):
            items = items_of(options, batch // len(chunks))
        key = (tuple(weights.items()), negative, items)
        if key not in self._calls:
            rows = {i: tuple(_row(self.applications[i], n) for n in negative) for i in weights}
            some = [i for i in weights if weights[i] and any(row is not None for row in rows[i])]
            active = tuple(some), tuple(weights[i] for i in some), tuple(rows[i] for i in some)
            self._calls[key] = Call(*active, items)
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
            cached = prior, partial(attention_with_users, self, self.numbers[block], prior)
            self._patches[block] = cached
        return cached[1]

    def keys_values(
        self,
        application: int,
        block: int,
        rows: tuple[int, ...],
        like: torch.Tensor,
        weight: float,
        items: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K, and V times the weight, for a batch of len(rows) equal chunks of these items beside queries `like`
        [B, T, width]: [1 or B, N, width]."""
        same = len(set(rows)) == 1
        key = (application, block, rows[0] if same else (rows, like.shape[0]), like.device, like.dtype)
        given = self.applications[application]
        level = not given.points and not given.items
        if key not in self._keys_values:
            k, v = self.projected[application][block]
            index = [rows[0]] if same else [row for row in rows for _ in range(like.shape[0] // len(rows))]
            v = v * weight if level else v
            self._keys_values[key] = tuple(x[index].to(device=like.device, dtype=like.dtype) for x in (k, v))
        k, v = self._keys_values[key]
        if level:
            return k, v
        # Schedules and context windows change the weight from call to call: the last one is kept.
        state = weight, like.shape[0], items
        if key not in self._weighted or self._weighted[key][0] != state:
            factors = weight
            if given.items:
                each = [weight * interpolated(given.items, item) for _ in rows for item in items]
                factors = torch.tensor(each).to(v)[:, None, None]
            self._weighted[key] = state, v * factors
        return k, self._weighted[key][1]

    def mask(
        self, application: int, shape: list[int], chunks: int, like: torch.Tensor, items: tuple[int, ...] = ()
    ) -> torch.Tensor | None:
        """The mask for queries `like` [chunks * b, T, width] of a latent `shape` [B, C, H, W]: [1 or B, T, 1]. An item
        past the last mask of a batch gets the last one."""
        mask = self.applications[application].mask
        if mask is None:
            return None
        key = (application, tuple(shape[-2:]), tuple(like.shape[:2]), chunks, items, like.device, like.dtype)
        if key not in self._masks:
            tokens = mask_to_tokens(mask, like.shape[1], tuple(shape[-2:]))
            if tokens.shape[0] > 1:
                tokens = tokens[[min(item, tokens.shape[0] - 1) for item in items]].repeat(chunks, 1, 1)
            self._masks[key] = tokens.to(device=like.device, dtype=like.dtype)
        return self._masks[key]


def items_of(options: dict, count: int) -> tuple[int, ...]:
    """The numbers of the latents in a model call within their batch: not the first ones where a context window (of
    ComfyUI, or of AnimateDiff-Evolved) shows the model some of them."""
    window = options.get("context_window")
    numbers = getattr(window, "index_list", None) if getattr(window, "dim", 0) == 0 else None
    numbers = numbers or (options.get("ad_params") or {}).get("sub_idxs")
    return tuple(numbers) if numbers is not None and len(numbers) == count else tuple(range(count))


def _row(application: Application, negative: bool) -> int | None:
    if not negative:
        return 0
    return 1 if application.uncond else None


def attention_with_users(run: Run, block: int, prior: Callable | None, q, k, v, extra: dict) -> torch.Tensor:
    """What ComfyUI calls in place of one cross-attention: q [B, T, width], k and v [B, text tokens, width]."""
    heads = extra["n_heads"]
    if prior is None:
        out = optimized_attention(q, k, v, heads, attn_precision=extra.get("attn_precision"), transformer_options=extra)
    else:
        out = prior(q, k, v, extra)
    # With so few keys torch's own attention is the quickest, and exact where another one quantises.
    call, metadata = extra["prefgen_call"], {"heads": heads}
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
        user_k, user_v = run.keys_values(application, block, chosen_rows, query, weight * factor, call.items)
        mask = run.mask(application, extra["original_shape"], len(chosen), query, call.items)
        residual = user_residual(base, query, metadata, user_k, user_v, mask)
        parts = out.chunk(len(rows))
        for chunk, part in zip(chosen, residual.chunk(len(chosen)), strict=True):
            parts[chunk].add_(part)
    return out


def _pick(batch: torch.Tensor, chosen: list[int], chunks: int) -> torch.Tensor:
    parts = batch.chunk(chunks)
    return parts[chosen[0]] if len(chosen) == 1 else torch.cat([parts[chunk] for chunk in chosen])
