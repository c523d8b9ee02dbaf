"""One sampling run: who is on in a model call, with which K and V, and what they add to an attention.

K and V of the users are projected once a run, on the CPU where the adapter's weights stay, and live in the run's own
copy of the options until it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from comfy.ldm.modules.attention import optimized_attention

from ..blocks import Block, Points, interpolated
from ..branch import mask_to_tokens, user_residual
from ..fusion import FusedUser
from .layout import (
    WHAT_HELPS,
    Batch,
    Layout,
    LayoutError,
    Place,
    Row,
    halves_by_text,
    items_of,
    marks_of,
    placed,
    read_marks,
    rows_after_patches,
    window_items,
)
from .sigmas import Sigmas

NODE = "Apply User Cross-Attention"
# What travels in the options of one model call.
BATCH, CALL = "prefgen_batch", "prefgen_call"
# What travels in the options of one block, between its attn2 patches and its attention.
QUERY, LAYOUT = "prefgen_query", "prefgen_layout"


@dataclass(frozen=True, eq=False)
class Application:
    """One user applied to a model. `mask` [b, H, W] in 0..1 or None; `uncond`: the unconditional half gets what
    training calls no user, or the user's disliked pictures. `block_weights`: one for every block, file order;
    `weight_schedule`: (share of the sampling, weight), none for a level one; `item_weights`: (number of the batch item,
    weight), none for all items alike. All multiply `weight`."""

    user: FusedUser
    weight: float
    start_at: float
    end_at: float
    mask: torch.Tensor | None
    uncond: bool
    block_weights: tuple[float, ...]
    weight_schedule: Points = ()
    item_weights: Points = ()

    @property
    def by_item(self) -> bool:
        """Whether it matters which item of the batch is painted."""
        return bool(self.item_weights) or (self.mask is not None and len(self.mask) > 1)

    @cached_property
    def by_place(self) -> bool:
        """Whether it matters which part of the canvas is painted."""
        return self.mask is not None and bool((self.mask != self.mask[:, :1, :1]).any())

    @property
    def always(self) -> bool:
        return self.start_at <= 0.0 and self.end_at >= 1.0

    def ask(self, model_sampling) -> None:
        """Have ready what a run asks of the mask and of the model's schedule."""
        _ = self.by_place
        sigmas = Sigmas.of(model_sampling)
        for share in (self.start_at, self.end_at):
            sigmas.at(model_sampling, share)
        if self.weight_schedule:
            sigmas.tabulate(model_sampling)

    def mask_number(self, item: int | None) -> int:
        """Which of the masks an item gets; one past the last gets the last one."""
        return 0 if len(self.mask) == 1 else min(item, len(self.mask) - 1)


@dataclass(frozen=True, eq=False)
class Call:
    """Who is on in one model call, with what weight, and the rows of its batch."""

    active: tuple[int, ...]
    weights: tuple[float, ...]
    layout: Layout


@dataclass(frozen=True, eq=False)
class Share:
    """What one application adds to in a batch. spans: (first row, row after the last); rows: what they are, in that
    order; keys: for each of them, or for all alike, 0 for the user's K and V or 1 for those of no user."""

    spans: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    keys: tuple[int, ...]

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        """Its rows of a batch; a view where they stand side by side."""
        if self.spans == ((0, batch.shape[0]),):
            return batch
        parts = [batch[first:end] for first, end in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, batch: torch.Tensor, residual: torch.Tensor) -> None:
        """Add a residual of its rows to a batch, in place."""
        start = 0
        for first, end in self.spans:
            batch[first:end].add_(residual[start : start + end - first])
            start += end - first


class Run:
    """What one sampling run needs: K and V, resized masks, composed attention functions. Dropped when it ends.

    latent: shape [b, C, H, W] of what is sampled; None outside of ComfyUI's guiders. conds: the guider's conditions."""

    def __init__(
        self,
        applications: tuple[Application, ...],
        blocks: tuple[Block, ...],
        model_sampling,
        conds: Mapping,
        latent: Sequence[int] | None = None,
    ):
        self.applications = applications
        self.numbers = {block: number for number, block in enumerate(blocks)}
        self.latent = latent
        self.asked = False
        for application in applications:
            application.ask(model_sampling)
        self.sigmas = Sigmas.of(model_sampling)
        self.spans = [
            tuple(self.sigmas.at(model_sampling, share) for share in (a.start_at, a.end_at)) for a in applications
        ]
        uuids = {name: {cond["uuid"] for cond in group or () if "uuid" in cond} for name, group in conds.items()}
        self.negative = set().union(*(group for name, group in uuids.items() if "negative" in name))
        self.known = set().union(*uuids.values())
        with torch.no_grad():
            self.projected = [a.user.keys_values() for a in applications]
        # Several threads may ask at once, one for each card: every entry is complete when it is written.
        self._marks: dict[tuple, tuple[dict, dict]] = {}
        self._layouts: dict[tuple, Layout] = {}
        self._origins: dict[tuple, tuple[int, ...] | None] = {}
        self._shares: dict[tuple[int, Layout], Share] = {}
        self._keys_values: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weighted: dict[tuple, tuple[float, torch.Tensor | None, torch.Tensor]] = {}
        self._factors: dict[tuple, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}
        self._calls: dict[tuple, Call] = {}
        self._patches: dict[Block, tuple[Callable | None, Callable]] = {}

    # A step: what ComfyUI is about to stack.

    def is_negative(self, uuid, index: int) -> bool:
        """Whether a condition is the unconditional half. A guider with more than two conditions numbers them its own
        way, so the condition itself is asked first."""
        return uuid in self.negative if uuid in self.known else index == 1

    def batch(self, conds: Sequence, x: torch.Tensor, model_options: Mapping) -> tuple[Batch, list, tuple[dict, dict]]:
        """The latents [b, C, H, W] of a step; for every condition whether it is the unconditional half; what the
        conditions are to carry."""
        options = model_options.get("transformer_options", {})
        negative = [
            [self.is_negative(cond.get("uuid"), index) for cond in group or ()] for index, group in enumerate(conds)
        ]
        retained = getattr(model_options.get("context_handler"), "latent_retain_index_list", None) or ()
        items = items_of(options, x.shape[0], None if self.latent is None else self.latent[0], retained)
        texts = [
            (half, getattr(cond["model_conds"].get("c_crossattn"), "cond", None))
            for group, halves in zip(conds, negative, strict=True)
            for cond, half in zip(group or (), halves, strict=True)
        ]
        canvas = tuple(x.shape[-2:]) if self.is_canvas(x) else None
        key = (items, canvas)
        if key not in self._marks:
            self._marks[key] = marks_of(items, canvas)
        batch = Batch(x, items, tuple(texts), canvas, "model_function_wrapper" in model_options)
        return batch, negative, self._marks[key]

    def check_asked(self, conds: Sequence) -> None:
        """Raise LayoutError with one sentence if a step was painted and no model call of it came by here."""
        painted = any(
            "timestep_start" not in cond and "timestep_end" not in cond for group in conds for cond in group or ()
        )
        if painted and not self.asked:
            raise LayoutError(
                f"{NODE} has no effect here, since another node calls the model without its options: take that node "
                "(a sampler wrapper) out of this model's chain."
            )

    def is_canvas(self, x: torch.Tensor) -> bool:
        """Whether latents show the whole canvas of the run."""
        return x.ndim == 4 and (self.latent is None or tuple(x.shape[-2:]) == tuple(self.latent[-2:]))

    # A model call: who is on, and what its rows are.

    def call(self, sigma: torch.Tensor, x: torch.Tensor, options: Mapping, marks, context) -> Call:
        """Who is on, from sigma [B], and what the rows of a batch of latents x [B, C, h, w] are, from the marks [B, 6]
        that came with it or its text states [B, T, D]. Reads the device once, and only if somebody has a start, an end
        or a schedule, and once where a mask lies under tiles. Raises LayoutError with one sentence."""
        weights = {i: a.weight for i, a in enumerate(self.applications)}
        if not all(a.always and not a.weight_schedule for a in self.applications):
            value = float(sigma.flatten()[0])
            weights = {i: w for i, w in weights.items() if self.spans[i][1] <= value <= self.spans[i][0]}
            for i in weights:
                if self.applications[i].weight_schedule:
                    weights[i] *= interpolated(self.applications[i].weight_schedule, self.sigmas.share(value))
        weights = {i: weight for i, weight in weights.items() if weight}
        if not weights:
            return Call((), (), self.layout(()))
        layout = self.layout_of(x, options, marks, context, [self.applications[i] for i in weights])
        key = (tuple(weights.items()), layout)
        if key not in self._calls:
            active = [i for i in weights if self.share(i, layout).rows]
            self._calls[key] = Call(tuple(active), tuple(weights[i] for i in active), layout)
        return self._calls[key]

    def layout(self, rows: Sequence[Row]) -> Layout:
        """The one layout of these rows in this run."""
        return self._layouts.setdefault(tuple(rows), Layout(tuple(rows)))

    def layout_of(
        self, x: torch.Tensor, options: Mapping, marks, context, applications: Sequence[Application]
    ) -> Layout:
        """The rows of a model call, with all that these applications need to know of them. Raises LayoutError."""
        batch: Batch | None = options.get(BATCH)
        rows = None if batch is None else read_marks(marks, x.shape[0], batch.canvas)
        if rows is None:
            rows = self.stacked(x, options) if batch is None else self.told_by_text(x, options, batch, context)
        rows = self.in_window(rows, options, batch)
        by_item = any(a.by_item for a in applications)
        by_place = any(a.by_place for a in applications)
        if by_place and batch is not None:
            rows = placed(rows, x, batch)
        if by_item and any(row.item is None for row in rows):
            raise LayoutError(
                f"{NODE} can't tell which items of the batch the {len(rows)} latents of this model call are, which "
                f"item_weights and masks for each item need: {WHAT_HELPS}."
            )
        if by_place and any(row.place is None for row in rows):
            raise LayoutError(
                f"The attn_mask of {NODE} can't follow a tile whose place in the picture isn't known "
                f"({x.shape[-1]} x {x.shape[-2]} latent pixels): leave the mask out, or {WHAT_HELPS}."
            )
        return self.layout([row.reduced(by_item, by_place) for row in rows])

    def announced(self, x: torch.Tensor, options: Mapping) -> list[Row]:
        """What the rows are if they are equal chunks in the announced order (ComfyUI's `cond_or_uncond`), of all items
        or of those of a window. Fewer or more than x has where they can't be that."""
        kinds = options.get("cond_or_uncond", [0])
        uuids = options.get("uuids", [None] * len(kinds))
        each = x.shape[0] // len(kinds)
        items = window_items(options, each) or tuple(range(each))
        height, width = x.shape[-2:]
        place = Place(0, 0, height, width, (height, width)) if self.is_canvas(x) else None
        return [
            Row(self.is_negative(uuid, kind), item, place)
            for uuid, kind in zip(uuids, kinds, strict=True)
            for item in items
        ]

    def stacked(self, x: torch.Tensor, options: Mapping) -> list[Row]:
        """The rows of a model call that was never marked: outside of a sampling run, or because a pack stacks the
        conditions itself. Raises LayoutError where they aren't what was announced."""
        rows = self.announced(x, options)
        each = x.shape[0] // len(options.get("cond_or_uncond", [0]))
        count = each if self.latent is None else self.latent[0]
        if len(rows) != x.shape[0] or (each != count and window_items(options, each) is None):
            raise LayoutError(self.unknown_halves(x))
        return rows

    def told_by_text(self, x: torch.Tensor, options: Mapping, batch: Batch, context) -> list[Row]:
        """The rows of a model call whose marks were lost, by their text states. Raises LayoutError where they can't be
        known."""
        rows = self.announced(x, options)
        halves = halves_by_text(context, batch.conditions) or self.one_half(rows, x)
        if halves is None:
            raise LayoutError(self.unknown_halves(x))
        # The order of the halves alone doesn't say that nobody has put tiles in the items' place.
        each = x.shape[0] // len(options.get("cond_or_uncond", [0]))
        whole = each == len(batch.items) and self.is_canvas(x)
        if whole and halves == [row.negative for row in rows]:
            return rows
        only = batch.items[0] if len(batch.items) == 1 else None
        return [Row(half, only) for half in halves]

    @staticmethod
    def one_half(rows: Sequence[Row], x: torch.Tensor) -> list[bool] | None:
        """The halves of a call in which only one of them was announced."""
        announced = {row.negative for row in rows}
        return [announced.pop()] * x.shape[0] if len(announced) == 1 else None

    @staticmethod
    def unknown_halves(x: torch.Tensor) -> str:
        return (
            f"{NODE} can't tell which of the {x.shape[0]} latents of this model call belong to the prompt and which to "
            f"the negative prompt: {WHAT_HELPS}."
        )

    @staticmethod
    def in_window(rows: list[Row], options: Mapping, batch: Batch | None) -> list[Row]:
        """The same rows with the items of a context window that a pack opened after ComfyUI had told the items."""
        kinds = len(options.get("cond_or_uncond", [0]))
        each = len(rows) // kinds
        shown = window_items(options, each)
        if batch is None or shown is None or each * kinds != len(rows) or len(batch.items) == each:
            return rows
        return [replace(row, item=item) for row, item in zip(rows, shown * kinds, strict=True)]

    def reached(self, call: Call) -> list[Block]:
        """The blocks in which somebody who is on counts."""
        reach = [self.applications[i].block_weights for i in call.active]
        return [block for block, number in self.numbers.items() if any(factors[number] for factors in reach)]

    # A block: the rows of its query, and the attention.

    def query_patches(self, others: Sequence[Callable]) -> list[Callable]:
        """`attn2_patch` functions of other packs, between two of ours that see what they make of the query's rows."""
        return [before_patches, *others, partial(self.after_patches, tuple(others))]

    def after_patches(self, others: tuple[Callable, ...], query, context, value, extra: dict):
        """Put the layout of a block's query into its options, after other packs' patches. Raises LayoutError."""
        before, before_context, before_value = extra.pop(QUERY)
        call: Call = extra[CALL]
        if query is not before:
            kinds = tuple(extra.get("cond_or_uncond", ()))
            key = (others, kinds, tuple(before.shape), query.shape[0])
            if key not in self._origins:
                self._origins[key] = rows_after_patches(
                    others, before, before_context, before_value, extra, query.shape[0]
                )
            origins = self._origins[key]
            if origins is None or before.shape[0] != len(call.layout):
                raise LayoutError(
                    f"{NODE} can't tell what another node makes of the {before.shape[0]} rows of a cross-attention: "
                    f"{WHAT_HELPS}."
                )
            extra[LAYOUT] = self.layout([call.layout.rows[origin] for origin in origins])
        return query, context, value

    def patch(self, block: Block, prior: Callable | None) -> Callable:
        """The composed attention of one block; the same object as long as the same prior sits there, so that a
        compiled model doesn't take every step for a new one."""
        cached = self._patches.get(block)
        if cached is None or cached[0] is not prior:
            cached = prior, partial(attention_with_users, self, self.numbers[block], prior)
            self._patches[block] = cached
        return cached[1]

    def share(self, application: int, layout: Layout) -> Share:
        """The rows of a layout that an application adds to."""
        key = (application, layout)
        if key not in self._shares:
            uncond = self.applications[application].uncond
            chosen = [number for number, row in enumerate(layout.rows) if uncond or not row.negative]
            spans: list[list[int]] = []
            for number in chosen:
                if spans and spans[-1][1] == number:
                    spans[-1][1] += 1
                else:
                    spans.append([number, number + 1])
            rows = tuple(layout.rows[number] for number in chosen)
            keys = tuple(int(row.negative) for row in rows)
            # One row of K and V does for all where all are of the same half.
            keys = keys[:1] if len(set(keys)) == 1 else keys
            self._shares[key] = Share(tuple((first, end) for first, end in spans), rows, keys)
        return self._shares[key]

    def keys_values(
        self, application: int, block: int, share: Share, like: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K, and V times the weight, for the rows of a share, whose queries are `like` [B, T, width]:
        [1 or B, N, width]."""
        applied = self.applications[application]
        level = not applied.weight_schedule and not applied.item_weights
        key = (application, block, share.keys, like.device, like.dtype)
        if key not in self._keys_values:
            k, v = (x[list(share.keys)] for x in self.projected[application][block])
            v = v * weight if level else v
            self._keys_values[key] = tuple(x.to(device=like.device, dtype=like.dtype) for x in (k, v))
        k, v = self._keys_values[key]
        if level:
            return k, v
        # Schedules and context windows change the weight from call to call: the last one is kept.
        factors = self.item_factors(application, share, v)
        last = self._weighted.get(key)
        if last is None or last[0] != weight or last[1] is not factors:
            last = self._weighted[key] = weight, factors, v * weight if factors is None else v * (factors * weight)
        return k, last[2]

    def item_factors(self, application: int, share: Share, like: torch.Tensor) -> torch.Tensor | None:
        """The item weights of a share's rows [B, 1, 1], brought to the device once a run; None without any."""
        points = self.applications[application].item_weights
        if not points:
            return None
        items = tuple(row.item for row in share.rows)
        key = (application, items, like.device, like.dtype)
        if key not in self._factors:
            factors = torch.tensor([interpolated(points, item) for item in items])
            self._factors[key] = factors[:, None, None].to(device=like.device, dtype=like.dtype)
        return self._factors[key]

    def mask(self, application: int, share: Share, like: torch.Tensor, extra: Mapping) -> torch.Tensor | None:
        """The mask for the rows of a share, whose queries are `like` [B, T, width]: [1 or B, T or 1, 1]. Raises
        LayoutError for a block whose tokens aren't its picture's pixels."""
        applied = self.applications[application]
        if applied.mask is None:
            return None
        height, width = extra["activations_shape"][-2:] if applied.by_place else (1, 1)
        key = (application, share, (height, width), like.device, like.dtype)
        if key not in self._masks:
            if applied.by_place and height * width != like.shape[1]:
                raise LayoutError(
                    f"The attn_mask of {NODE} can't follow this model: a block of {width} x {height} has "
                    f"{like.shape[1]} tokens. Leave the mask out."
                )
            each = [(applied.mask_number(row.item), row.place) for row in share.rows]
            tokens = {
                (number, place): mask_to_tokens(part_of(applied.mask[number], place), (height, width))
                for number, place in set(each)
            }
            stacked = torch.cat([tokens[one] for one in each]) if len(tokens) > 1 else tokens[each[0]]
            self._masks[key] = stacked.to(device=like.device, dtype=like.dtype)
        return self._masks[key]


def part_of(mask: torch.Tensor, place: Place | None) -> torch.Tensor:
    """The part of a canvas' mask [H, W] that a place shows, [1, h, w]; the whole mask for the whole canvas, and for a
    place that nobody needs to know because the mask is level."""
    if place is None or place.is_canvas:
        return mask[None]
    return place.cut(mask_to_tokens(mask[None], place.canvas).reshape(1, *place.canvas))


def before_patches(query, context, value, extra: dict):
    """An `attn2_patch` that keeps what it is given for the one that comes after other packs'."""
    extra[QUERY] = query, context, value
    return query, context, value


def attention_with_users(run: Run, block: int, prior: Callable | None, q, k, v, extra: dict) -> torch.Tensor:
    """What ComfyUI calls in place of one cross-attention: q [B, T, width], k and v [B, text tokens, width]."""
    heads = extra["n_heads"]
    if prior is None:
        out = optimized_attention(q, k, v, heads, attn_precision=extra.get("attn_precision"), transformer_options=extra)
    else:
        out = prior(q, k, v, extra)
    call: Call = extra[CALL]
    layout: Layout = extra.get(LAYOUT, call.layout)
    if q.shape[0] != len(layout) or out.shape[0] != len(layout):
        raise LayoutError(
            f"{NODE} can't tell which of the {out.shape[0]} rows of a cross-attention belong to the prompt, since the "
            f"model was called with {len(layout)}: {WHAT_HELPS}."
        )
    # What the plain attention has just made is ours to add to; another's result, or what a gradient needs, is not.
    if prior is not None or out.requires_grad:
        out = out.clone()
    for application, weight in zip(call.active, call.weights, strict=True):
        factor = run.applications[application].block_weights[block]
        share = run.share(application, layout)
        if not factor or not share.rows:
            continue
        query = share.of(q)
        user_k, user_v = run.keys_values(application, block, share, query, weight * factor)
        mask = run.mask(application, share, query, extra)
        # With so few keys torch's own attention is the quickest, and exact where another one quantises.
        share.add(out, user_residual(query, user_k, user_v, heads, mask).to(out.dtype))
    return out
