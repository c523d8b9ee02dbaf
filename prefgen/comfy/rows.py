"""What the rows of a model call are: by the marks that came with them, the order ComfyUI announces, or their text.

Conditions are marked before ComfyUI stacks them (`marks.py`). Where a pack stacks conditions itself, or loses the marks
on the way, what else is there is asked. What can't be told is said in a sentence: a wrong picture is never painted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from .cache import Cache
from .layout import NODE, WHAT_HELPS, Batch, LayoutError, Place, Row, items_of, placed, window_items
from .marks import marked, marks_of, read_marks

BATCH = "prefgen_batch"  # in the options of the model calls of one step


class RowReader:
    """Says of one sampling run's model calls what their rows are.

    conds: the guider's conditions by their names. latent: shape [b, C, H, W] of what is sampled; None outside of
    ComfyUI's guiders.
    """

    def __init__(self, conds: Mapping, latent: Sequence[int] | None):
        uuids = {name: {cond["uuid"] for cond in group or () if "uuid" in cond} for name, group in conds.items()}
        self.uuids = set().union(*uuids.values())
        self.negative_uuids = set().union(*(group for name, group in uuids.items() if "negative" in name))
        self.batch_size = None if latent is None else latent[0]
        self.canvas = None if latent is None else tuple(latent[-2:])
        self._marks = Cache()

    # A step: what ComfyUI is about to stack.

    def mark(self, conds: Sequence, x: torch.Tensor, model_options: Mapping) -> tuple[Batch, list]:
        """The latents x [b, C, H, W] of a step, and a copy of its conditions that carries their marks."""
        options = model_options.get("transformer_options", {})
        negative = [
            [self.is_negative(cond.get("uuid"), index) for cond in group or ()] for index, group in enumerate(conds)
        ]
        retained = getattr(model_options.get("context_handler"), "latent_retain_index_list", None) or ()
        items = items_of(options, x.shape[0], self.batch_size, retained)
        texts = [
            (half, getattr(cond["model_conds"].get("c_crossattn"), "cond", None))
            for group, halves in zip(conds, negative, strict=True)
            for cond, half in zip(group or (), halves, strict=True)
        ]
        canvas = tuple(x.shape[-2:]) if self.is_canvas(x) else None
        marks = self._marks.get((items, canvas), lambda: marks_of(items, canvas))
        batch = Batch(x, items, tuple(texts), canvas, "model_function_wrapper" in model_options)
        return batch, marked(conds, negative, marks)

    def is_negative(self, uuid, index: int) -> bool:
        """Whether a condition is the unconditional half."""
        # A guider with more than two conditions numbers them its own way, so the condition itself is asked first.
        return uuid in self.negative_uuids if uuid in self.uuids else index == 1

    def is_canvas(self, x: torch.Tensor) -> bool:
        """Whether latents show all of the run's canvas."""
        return x.ndim == 4 and (self.canvas is None or tuple(x.shape[-2:]) == self.canvas)

    # A model call.

    def read(
        self, x: torch.Tensor, options: Mapping, marks: torch.Tensor | None, context, by_item: bool, by_place: bool
    ) -> list[Row]:
        """The rows of a model call with latents x [B, C, h, w], marks [B, 6] and text states [B, T, D]; their items and
        places where those matter. Raises LayoutError."""
        batch: Batch | None = options.get(BATCH)
        rows = None if batch is None else read_marks(marks, x.shape[0], batch.canvas)
        if rows is None:
            rows = self.by_order(x, options) if batch is None else self.by_text(x, options, batch, context)
        if batch is not None:
            rows = in_window(rows, options, batch)
            if by_place:
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
        return [row.reduced(by_item, by_place) for row in rows]

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

    def by_order(self, x: torch.Tensor, options: Mapping) -> list[Row]:
        """The rows of a model call that was never marked: outside of a sampling run, or because a pack stacks the
        conditions itself. Raises LayoutError where they aren't what was announced."""
        rows = self.announced(x, options)
        each = x.shape[0] // len(options.get("cond_or_uncond", [0]))
        is_batch = self.batch_size in (None, each)
        if len(rows) != x.shape[0] or not (is_batch or window_items(options, each)):
            raise LayoutError(unknown_halves(x))
        return rows

    def by_text(self, x: torch.Tensor, options: Mapping, batch: Batch, context) -> list[Row]:
        """The rows of a model call whose marks were lost, by their text states. Raises LayoutError where those of both
        halves are alike."""
        rows = self.announced(x, options)
        halves = halves_by_text(context, batch.conditions)
        if halves is None:
            announced = {row.negative for row in rows}
            if len(announced) != 1:
                raise LayoutError(unknown_halves(x))
            halves = [*announced] * x.shape[0]
        # The order of the halves alone doesn't say that nobody has put tiles in the items' place.
        each = x.shape[0] // len(options.get("cond_or_uncond", [0]))
        is_batch = each == len(batch.items) and self.is_canvas(x)
        if is_batch and halves == [row.negative for row in rows]:
            return rows
        only = batch.items[0] if len(batch.items) == 1 else None
        return [Row(half, only) for half in halves]


def in_window(rows: list[Row], options: Mapping, batch: Batch) -> list[Row]:
    """The same rows with the items of a context window that a pack opened after ComfyUI had handed out the items."""
    kinds = len(options.get("cond_or_uncond", [0]))
    each = len(rows) // kinds
    shown = window_items(options, each)
    if shown is None or each * kinds != len(rows) or len(batch.items) == each:
        return rows
    return [replace(row, item=item) for row, item in zip(rows, shown * kinds, strict=True)]


def unknown_halves(x: torch.Tensor) -> str:
    """The sentence for latents of which nobody says whether they are of the prompt or of the negative prompt."""
    return (
        f"{NODE} can't tell which of the {x.shape[0]} latents of this model call belong to the prompt and which to the "
        f"negative prompt: {WHAT_HELPS}."
    )


def halves_by_text(
    context: torch.Tensor | None, conditions: Iterable[tuple[bool, torch.Tensor | None]]
) -> list[bool] | None:
    """For every row of the text states [B, T, D] of a model call whether it is the unconditional half, by comparing
    them with those of the conditions; None if a row fits none of them, or fits both halves. One read of the host."""
    if context is None:
        return None
    fits: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for half, text in conditions:
        if text is None or text.shape[1] > context.shape[1] or text.shape[2] != context.shape[2]:
            continue
        start = context[:, None, : text.shape[1]]
        fits[half].append((start == text.to(context)[None]).flatten(2).all(2).any(1))
    if not fits[False] or not fits[True]:
        return None
    halves = torch.stack([torch.stack(fits[half]).any(0) for half in (False, True)]).T.tolist()
    if any(positive == negative for positive, negative in halves):
        return None
    return [negative for _, negative in halves]
