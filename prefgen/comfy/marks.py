"""What every condition carries through ComfyUI's stacking, so that the rows of a model call say what they are.

Where ComfyUI still knows, in `calc_cond_batch`, each condition gets a small tensor on the CPU beside its text, a row of
numbers for each latent. ComfyUI and other packs repeat, cut and stack it as they do a pooled embedding. It is read and
taken out at the model's door.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.conds import CONDRegular

from .layout import Place, Row

MARKS = "prefgen_rows"
UNKNOWN = -1  # in place of an item's number, or of a side


class Marks(CONDRegular):
    """What a condition carries, int32 [b, 6]: 1 for the unconditional half, number of the item, and the part of the
    canvas as top, left, height and width."""

    def process_cond(self, batch_size, area=None, **kwargs):
        """ComfyUI prepares a condition for one call. area: (height, width, top, left) of its crop, or None."""
        rows = self.cond
        if area is not None and len(area) == 4:
            height, width, top, left = area
            rows = rows.clone()
            rows[:, 2:] = torch.where(rows[:, 4:5] == UNKNOWN, UNKNOWN, torch.tensor([top, left, height, width]))
        return super(Marks, self._copy_with(rows)).process_cond(batch_size, **kwargs)


def marks_of(items: Sequence[int | None], canvas: tuple[int, int] | None) -> tuple[dict, dict]:
    """What conditions carry, for the half with the prompt and for the unconditional one."""
    sides = (UNKNOWN, UNKNOWN) if canvas is None else canvas
    numbers = [UNKNOWN if item is None else item for item in items]
    halves = [
        {MARKS: Marks(torch.tensor([[negative, number, 0, 0, *sides] for number in numbers], dtype=torch.int32))}
        for negative in (0, 1)
    ]
    return halves[0], halves[1]


def marked(conds: Sequence, negative: Sequence[Sequence[bool]], marks: tuple[dict, dict]) -> list:
    """A copy of the conditions of `calc_cond_batch` that carries the marks. negative: for every condition of every
    group whether it is the unconditional half."""
    return [
        group
        and [
            cond | {"model_conds": cond["model_conds"] | marks[half]} for cond, half in zip(group, halves, strict=True)
        ]
        for group, halves in zip(conds, negative, strict=True)
    ]


def read_marks(marks: torch.Tensor | None, count: int, canvas: tuple[int, int] | None) -> list[Row] | None:
    """The rows of a model call of `count` latents by the marks that came with it; None if they didn't come with every
    row."""
    if marks is None or marks.shape != (count, 6):
        return None
    rows = []
    for negative, item, top, left, height, width in marks.tolist():
        place = None if canvas is None or height == UNKNOWN else Place(top, left, height, width, canvas)
        rows.append(Row(bool(negative), None if item == UNKNOWN else item, place))
    return rows
