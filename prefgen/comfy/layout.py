"""What a row of a model call can be: of which half, which item of the latent batch, which part of the canvas.

ComfyUI stacks the conditions of one step (`cond_or_uncond`), crops what has an area, and shows a context window a part
of the batch; other packs stack tiles, cut the halves apart or run them on several cards. `rows.py` says what the rows
of a call are; here is what can be said of a row, and how its item and its place are told from a step's latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

NODE = "Apply User Cross-Attention"
WHAT_HELPS = "take the node that stacks tiles or regions out of this model's chain, or have it paint one at a time"


class LayoutError(ValueError):
    """A model call in which nobody can tell what belongs to whom, in one sentence for the artist."""


@dataclass(frozen=True)
class Place:
    """A rectangle of the run's latent; what leaves it at one side comes in at the other."""

    top: int
    left: int
    height: int
    width: int
    canvas: tuple[int, int]

    @property
    def is_canvas(self) -> bool:
        return (self.top, self.left) == (0, 0) and (self.height, self.width) == self.canvas

    def cut(self, picture: torch.Tensor) -> torch.Tensor:
        """That part of [..., H, W], a picture of the whole canvas in latent pixels."""
        height, width = self.canvas
        rows = torch.arange(self.top, self.top + self.height) % height
        columns = torch.arange(self.left, self.left + self.width) % width
        return picture[..., rows[:, None], columns]


@dataclass(frozen=True)
class Row:
    """One row of a model call's batch. `item` and `place` are None where they aren't known."""

    negative: bool
    item: int | None = None
    place: Place | None = None

    def reduced(self, by_item: bool, by_place: bool) -> Row:
        """The same row with no more than matters, so that calls which differ in nothing else share what they need."""
        return Row(self.negative, self.item if by_item else None, self.place if by_place else None)


class Layout:
    """The rows of a batch. One object for equal rows in a run, so that what depends on them is looked up by it."""

    def __init__(self, rows: tuple[Row, ...]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Batch:
    """The latents of one step as ComfyUI hands them to the conditions: all of them, or those of a context window.

    x: [b, C, H, W]. items: number of each within the run's batch, None if unknown. conditions: (is it the unconditional
    half, text states [1 or b, T, D] or None) of every condition. canvas: (H, W), None if x isn't the whole picture.
    wrapped: whether a pack stands between the conditions and the model (`model_function_wrapper`).
    """

    x: torch.Tensor
    items: tuple[int | None, ...]
    conditions: tuple[tuple[bool, torch.Tensor | None], ...]
    canvas: tuple[int, int] | None
    wrapped: bool


def window_items(options: Mapping, count: int) -> tuple[int, ...] | None:
    """The numbers of `count` latents within the run's batch where a context window (of ComfyUI, or of
    AnimateDiff-Evolved) shows the model a part of it; None if no window shows so many."""
    for shown in windows_of(options):
        if len(shown) == count:
            return tuple(shown)
    return None


def windows_of(options: Mapping) -> list[list[int]]:
    """What every open context window over the batch shows."""
    windows = []
    window = options.get("context_window")
    numbers = getattr(window, "index_list", None)
    if numbers is not None and getattr(window, "dim", 0) == 0:
        # ComfyUI 0.21 and newer put the item before the window in front of it (causal_window_fix).
        anchor = getattr(window, "causal_anchor_index", None)
        windows.append([anchor, *numbers] if anchor is not None and anchor >= 0 else [*numbers])
    numbers = (options.get("ad_params") or {}).get("sub_idxs")
    if numbers is not None:
        windows.append([*numbers])
    return windows


def items_of(
    options: Mapping, count: int, batch: int | None = None, retained: Sequence[int] = ()
) -> tuple[int | None, ...]:
    """The numbers of the `count` latents of a step within the run's batch; None for each where a window shows others
    than it says, or where nobody says which part of the batch it is.

    batch: how many the run has, None if that isn't known. retained: items of the batch that ComfyUI puts into every
    window at their own numbers (`latent_retain_index_list`).
    """
    items = window_items(options, count)
    if items is not None:
        shown = list(items)
        for number in retained:
            shown[number] = number
        return tuple(shown)
    if count == batch or (batch is None and not windows_of(options)):
        return tuple(range(count))
    return (None,) * count


def placed(rows: Sequence[Row], x: torch.Tensor, batch: Batch) -> list[Row]:
    """The same rows of a model call x [B, C, h, w] with the place of each on the canvas, None where it isn't known."""
    size = tuple(x.shape[-2:])
    as_cut = [row.place is not None and (row.place.height, row.place.width) == size for row in rows]
    if all(as_cut) and not batch.wrapped:
        return list(rows)
    # Whoever stands in between may have cut or turned the latent: it is compared with the canvas. One that only changed
    # its values has left it where it was.
    return [
        row if same and new.place is None else new
        for row, new, same in zip(rows, located(rows, x, batch), as_cut, strict=True)
    ]


def located(rows: Sequence[Row], x: torch.Tensor, batch: Batch) -> list[Row]:
    """The same rows with the place where each latent of x [B, C, h, w] lies on the canvas, None where it doesn't lie in
    just one, or its item isn't known. One read of the host."""
    number_of = {item: number for number, item in enumerate(batch.items) if item is not None}
    matches = []
    for row, tile in zip(rows, x, strict=True):
        if batch.canvas is None or row.item not in number_of:
            matches.append(torch.zeros(3, dtype=torch.int64, device=x.device))
        else:
            matches.append(place_of(tile, batch.x[number_of[row.item]].to(x.device)))
    height, width = x.shape[-2:]
    return [
        replace(row, place=Place(top, left, height, width, batch.canvas) if count == 1 and batch.canvas else None)
        for row, (count, top, left) in zip(rows, torch.stack(matches).tolist(), strict=True)
    ]


def place_of(tile: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """(in how many places a tile [C, h, w] lies on a canvas [C, H, W], over its edges too; top and left of the first),
    int64 [3] on their device. No match unless every pixel is the same."""
    height, width = tile.shape[-2:]
    canvas_height, canvas_width = canvas.shape[-2:]
    if height > canvas_height or width > canvas_width:
        return torch.zeros(3, dtype=torch.int64, device=tile.device)
    # Corners, middles of the sides and the centre leave few places; the last of the comparisons is of every pixel.
    matches = torch.ones(canvas.shape[-2:], dtype=torch.bool, device=tile.device)
    for y in {0, height // 2, height - 1}:
        for x in {0, width // 2, width - 1}:
            matches &= (canvas.roll((-y, -x), (1, 2)) == tile[:, y, x, None, None]).all(0)
    index = matches.flatten().to(torch.uint8).argmax()
    top = index // canvas_width
    left = index % canvas_width
    rows = (top + torch.arange(height, device=tile.device)) % canvas_height
    columns = (left + torch.arange(width, device=tile.device)) % canvas_width
    same = (canvas[:, rows[:, None], columns] == tile).all()
    return torch.stack([matches.sum() * same, top, left])
