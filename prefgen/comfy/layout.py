"""What a model call holds: for each row of its batch the condition, the item of the latent batch and the part of the
canvas.

ComfyUI stacks the conditions of one step (`cond_or_uncond`), crops what has an area, and shows a context window a part
of the batch; other packs stack tiles, cut the halves apart or run them on several cards. So where ComfyUI still knows,
in `calc_cond_batch`, every condition gets a small tensor on the CPU beside its text, a row of numbers for each latent.
ComfyUI and other packs repeat, cut and stack it as they do a pooled embedding. It is read and taken out at the model's
door. Which part of the canvas a tile is, is found by comparing it with the latent of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from comfy.conds import CONDRegular

MARKS = "prefgen_rows"
UNKNOWN = -1  # in place of an item's number, or of a side
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
        """The same row with no more than is asked for, so that calls which differ in nothing else share what they
        need."""
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
    finds = []
    for row, tile in zip(rows, x, strict=True):
        if batch.canvas is None or row.item not in number_of:
            finds.append(torch.zeros(3, dtype=torch.int64, device=x.device))
        else:
            finds.append(place_of(tile, batch.x[number_of[row.item]].to(x.device)))
    height, width = x.shape[-2:]
    return [
        replace(row, place=Place(top, left, height, width, batch.canvas) if matches == 1 and batch.canvas else None)
        for row, (matches, top, left) in zip(rows, torch.stack(finds).tolist(), strict=True)
    ]


def place_of(tile: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """(in how many places a tile [C, h, w] lies on a canvas [C, H, W], over its edges too; top and left of the first),
    int64 [3] on their device. No match unless every pixel is the same."""
    (height, width), (canvas_height, canvas_width) = tile.shape[-2:], canvas.shape[-2:]
    if height > canvas_height or width > canvas_width:
        return torch.zeros(3, dtype=torch.int64, device=tile.device)
    matches = torch.ones(canvas.shape[-2:], dtype=torch.bool, device=tile.device)
    for y in {0, height // 2, height - 1}:
        for x in {0, width // 2, width - 1}:
            matches &= (canvas.roll((-y, -x), (1, 2)) == tile[:, y, x, None, None]).all(0)
    index = matches.flatten().to(torch.uint8).argmax()
    top, left = index // canvas_width, index % canvas_width
    rows = (top + torch.arange(height, device=tile.device)) % canvas_height
    columns = (left + torch.arange(width, device=tile.device)) % canvas_width
    same = (canvas[:, rows[:, None], columns] == tile).all()
    return torch.stack([matches.sum() * same, top, left])


def halves_by_text(context: torch.Tensor | None, conditions: Iterable) -> list[bool] | None:
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


def rows_after_patches(patches: Sequence, query, context, value, extra: Mapping, count: int) -> tuple | None:
    """Which row of a query [B, T, D] each of the `count` rows is that other packs' `attn2_patch` functions make of it;
    None if that can't be told. Regional prompts repeat rows here. They are asked with a query whose rows say their own
    number. One read of the host."""
    for dtype in (torch.float32, query.dtype):
        probe = numbered(query, dtype)
        try:
            options = dict(extra)
            states = probe, context, value
            for patch in patches:
                states = patch(*states, options)
        except (RuntimeError, TypeError):  # it mixes the query with tensors of the model's own precision
            continue
        return numbers_of(states[0], query.shape[0], count)
    return None


def numbered(query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A query of the same shape whose rows hold 1, n and n² for their number n: no multiple, sum or mean of rows
    is taken for another row then."""
    n = torch.arange(1, query.shape[0] + 1, dtype=dtype, device=query.device)
    code = torch.stack([torch.ones_like(n), n, n**2], 1).repeat(1, -(-query.shape[2] // 3))
    return code[:, None, : query.shape[2]].repeat(1, query.shape[1], 1)


def numbers_of(probe: torch.Tensor, original: int, count: int) -> tuple[int, ...] | None:
    """What `numbered` wrote into each of `count` rows, from 0; None if any row isn't one of the `original` ones."""
    if probe.ndim != 3 or probe.shape[0] != count or probe.shape[2] < 3:
        return None
    code = probe[..., :3].float()
    level = (code == code[:, :1]).flatten(1).all(1, keepdim=True).float()
    numbers = []
    for one, n, square, is_level in torch.cat([code[:, 0], level], 1).tolist():
        number = round(n / one) if one else 0
        exact = abs(n - number * one) <= 1e-4 * abs(n) and abs(square - number**2 * one) <= 1e-4 * abs(square)
        if not is_level or not exact or not 1 <= number <= original:
            return None
        numbers.append(number - 1)
    return tuple(numbers)
