"""The one picture that `make demo` leaves: what each user liked and disliked, and what the same prompt gives them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 184  # a generated picture
THUMB = 128  # a picture of the history
GAP = 12
MARGIN = 44
PROMPT_WIDTH = 190
HEADER_HEIGHT = 132
USER_HEADER = 74
FOOTER_HEIGHT = 74

PAPER = "#fbfaf6"
INK = "#23262b"
FAINT = "#7b7f86"
RULE = "#dedbd2"
LIKED = "#2f9e62"
DISLIKED = "#d1495b"
ACCENT = "#e7f3ea"
COLUMNS = ("without preference", "with their preference", "with another user's")


@dataclass(frozen=True)
class SheetRow:
    """One prompt of one user: the picture without preference, with it, with another user's. All of any equal size."""

    prompt: str
    none: Image.Image
    prefgen: Image.Image
    mismatched: Image.Image


@dataclass(frozen=True)
class SheetUser:
    """One block of the sheet. `liked` and `disliked`: four pictures each are shown; `likes`, `dislikes`: in words."""

    name: str
    likes: str
    dislikes: str
    liked: list[Image.Image]
    disliked: list[Image.Image]
    rows: list[SheetRow]


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int, size: int, edge: str | None = None) -> None:
    """Paste `picture` with rounded corners, in a frame of colour `edge` if given."""
    scale = 4  # drawn larger and shrunk, for smooth corners
    radius = 8
    if edge:
        frame = Image.new("L", ((size + 8) * scale,) * 2, 0)
        ImageDraw.Draw(frame).rounded_rectangle(
            (0, 0, frame.width - 1, frame.height - 1), (radius + 4) * scale, fill=255
        )
        sheet.paste(edge, (x - 4, y - 4), frame.resize((size + 8,) * 2, Image.Resampling.LANCZOS))
    mask = Image.new("L", (size * scale,) * 2, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius * scale, fill=255)
    shown = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    sheet.paste(shown, (x, y), mask.resize((size, size), Image.Resampling.LANCZOS))


def _thumbs(sheet: Image.Image, pictures: list[Image.Image], x: int, y: int, edge: str) -> None:
    for index, picture in enumerate(pictures[:4]):
        _paste(sheet, picture, x + index % 2 * (THUMB + GAP), y + index // 2 * (THUMB + GAP), THUMB, edge)


def _clipped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut at a comma or word so that it fits into `width` pixels."""
    while font.getlength(text) > width and " " in text:
        text = text.rsplit(" ", 1)[0].rstrip(",") + " ..."
        if font.getlength(text) > width:
            text = text.removesuffix(" ...")
    return text


def draw_sheet(users: list[SheetUser], title: str, subtitle: str, footer: list[str]) -> Image.Image:
    """The sheet: a header, one block a user (history at the left, one line a prompt at the right), a footer."""
    history = 2 * THUMB + GAP
    right = MARGIN + history + 36
    columns = [right + PROMPT_WIDTH + index * (CELL + GAP + 8) for index in range(3)]
    width = columns[-1] + CELL + MARGIN
    lines = max(len(user.rows) for user in users)
    # Either the rows of pictures or the eight thumbnails with their captions decide how high a block is.
    body = max(lines * (CELL + GAP), 4 * (THUMB + GAP) + 62)
    block = USER_HEADER + body + 28
    height = HEADER_HEIGHT + len(users) * block + FOOTER_HEIGHT + 26 * max(0, len(footer) - 1)

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 34), title, INK, _font(34))
    draw.text((MARGIN, 80), subtitle, FAINT, _font(18))

    for number, user in enumerate(users):
        top = HEADER_HEIGHT + number * block
        draw.line((MARGIN, top, width - MARGIN, top), RULE, 2)
        draw.text((MARGIN, top + 20), user.name, INK, _font(24))
        words = _font(16)
        words_x = MARGIN + 110
        taste = (("likes", user.likes, LIKED), ("dislikes", user.dislikes, DISLIKED))
        for offset, (word, text, colour) in enumerate(taste):
            y = top + 13 + offset * 23
            draw.text((words_x, y), word, colour, words)
            draw.text((words_x + 72, y), _clipped(text, words, width - MARGIN - words_x - 72), INK, words)

        y = top + USER_HEADER
        band = (columns[1] - 9, y - 2, columns[1] + CELL + 9, y + 26 + len(user.rows) * (CELL + GAP))
        draw.rounded_rectangle(band, 12, ACCENT)
        for x, caption in zip(columns, COLUMNS, strict=True):
            centre = x + CELL / 2 - _font(15).getlength(caption) / 2
            draw.text((centre, y + 2), caption, INK if caption == COLUMNS[1] else FAINT, _font(15))
        draw.text((MARGIN, y + 2), "liked", LIKED, _font(15))
        _thumbs(sheet, user.liked, MARGIN, y + 28, LIKED)
        second = y + 28 + 2 * (THUMB + GAP) + 6
        draw.text((MARGIN, second), "disliked", DISLIKED, _font(15))
        _thumbs(sheet, user.disliked, MARGIN, second + 26, DISLIKED)

        for line, row in enumerate(user.rows):
            cell_y = y + 28 + line * (CELL + GAP)
            text = "\n".join(textwrap.wrap(row.prompt, 20))
            draw.multiline_text((right, cell_y + CELL / 2), text, INK, _font(18), anchor="lm", spacing=7)
            for x, picture in zip(columns, (row.none, row.prefgen, row.mismatched), strict=True):
                _paste(sheet, picture, x, cell_y, CELL)

    y = HEADER_HEIGHT + len(users) * block
    draw.line((MARGIN, y, width - MARGIN, y), RULE, 2)
    for index, line in enumerate(footer):
        draw.text((MARGIN, y + 20 + index * 26), line, FAINT, _font(16))
    return sheet
