"""Pictures as one labelled sheet: a row for each batch, what it is at its left, and what its columns are above them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .pictures import rgb_of

MAX_SIDE = 16384  # pixels of a sheet
# RGB
PAPER = (250, 250, 247)
INK = (35, 38, 43)


def labelled_sheet(
    rows: Sequence[torch.Tensor], row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> torch.Tensor:
    """Batches [b, H, W, 1 to 4] in 0..1 as one picture [1, h, w, 3]. Every picture keeps its size, in a cell as large
    as the largest, and is shown as histories read it (`rgb_of`); labels may be fewer than rows or columns. Raises
    ValueError with one sentence for none, for what is no picture, and for a sheet of more than MAX_SIDE pixels a
    side."""
    rows = [row for row in rows if row is not None and len(row)]
    if not rows:
        raise ValueError("The sheet has no pictures: connect at least one to row_1.")
    height = max(row.shape[1] for row in rows)
    width = max(row.shape[2] for row in rows)
    columns = max(len(row) for row in rows)
    size = max(12, round(min(height, width) / 12))
    gap = size // 2
    font = ImageFont.load_default(size)
    left = gap + max((_width(label, font) + gap for label in row_labels), default=0)
    top = gap + (size + 2 * gap if any(column_labels) else 0)
    full = (left + columns * (width + gap), top + len(rows) * (height + gap))
    if max(full) > MAX_SIDE:
        raise ValueError(
            f"The sheet would be {full[0]} x {full[1]} pixels, more than {MAX_SIDE} a side: connect fewer or smaller "
            "pictures."
        )
    sheet = Image.new("RGB", full, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels[:columns]):
        middle = left + column * (width + gap) + width / 2
        draw.text((middle, top - gap - size / 2), label, INK, font, anchor="mm")
    for number, row in enumerate(rows):
        y = top + number * (height + gap)
        if number < len(row_labels):
            draw.text((left - gap, y + height / 2), row_labels[number], INK, font, anchor="rm")
        for column, picture in enumerate(row):
            shown = _picture(picture, f"picture {column + 1} of row {number + 1}")
            sheet.paste(shown, (left + column * (width + gap), y))
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]


def lines(text: str) -> list[str]:
    """The labels of a text: one a line, without empty lines at its end."""
    return [line.strip() for line in text.rstrip().splitlines()]


def _width(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(font.getlength(label))


def _picture(picture: torch.Tensor, name: str) -> Image.Image:
    return Image.fromarray((rgb_of(picture, name) * 255).round().to(torch.uint8).numpy())
