"""The pictures of README and of the registry, laid out from the demo's sheet: landscape, banner and icon; and the cards
of the templates whose models aren't here to paint with.

    python -m scripts.pictures [--sheet output/demo/sheet.png] [--out docs/images]

Nothing is painted or chosen here: the landscape shows all three users and prompts of the sheet, each with what they
liked and disliked, the pictures without preference and those with theirs. A card shows the taste that its template is
saved with, and no result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from scripts.comfy_server import ROOT
from scripts.demo_sheet import (
    CELL,
    DISLIKED,
    FAINT,
    GAP,
    HEADER_HEIGHT,
    INK,
    LIKED,
    MARGIN,
    PAPER,
    PROMPT_WIDTH,
    THUMB,
    USER_HEADER,
)

IMAGES = ROOT / "docs" / "images"
USERS = ("Ada", "Bruno", "Chiyo")
PROMPTS = ("a sailing boat and a moon", "an owl and a moon", "a flower and a heart")
# On the sheet: the height of a user's block with three prompts, and from one generated picture to the next.
BLOCK_HEIGHT = 724
COLUMN_STEP = CELL + GAP + 8

# Of a generated picture here; a history picture has half of it.
SIZE = 148
SPACE = 8
TOP = 62
NAME_WIDTH = 76

# Of the templates that need downloads: title and base.
CARDS = {
    "my_taste_sdxl": ("My taste", "SDXL"),
    "my_taste_sd15": ("My taste", "SD1.5"),
    "my_taste_flux": ("My taste", "Flux.1"),
    "my_taste_in_words": ("My taste\nin words", "any model"),
    "product_design": ("Product\ndesign", "SDXL"),
    "character_design": ("Character\ndesign", "SDXL"),
    "avatar": ("Avatar", "SDXL"),
}
CARD_SIDE = 512


class Sheet:
    """The pictures on a sheet of `make demo`, by user and place."""

    def __init__(self, path: Path):
        self.picture = Image.open(path).convert("RGB")

    def history(self, user: int, index: int, disliked: bool = False) -> Image.Image:
        """One of the four liked or disliked pictures of a user, [THUMB, THUMB]."""
        left = MARGIN + index % 2 * (THUMB + GAP)
        top = HEADER_HEIGHT + user * BLOCK_HEIGHT + USER_HEADER + 28 + index // 2 * (THUMB + GAP)
        if disliked:
            top += 2 * (THUMB + GAP) + 32
        return self.picture.crop((left, top, left + THUMB, top + THUMB))

    def generated(self, user: int, prompt: int, column: int) -> Image.Image:
        """One generated picture, [CELL, CELL]. `column`: 0 without preference, 1 with the user's."""
        left = MARGIN + 2 * THUMB + GAP + 36 + PROMPT_WIDTH + column * COLUMN_STEP
        top = HEADER_HEIGHT + user * BLOCK_HEIGHT + USER_HEADER + 28 + prompt * (CELL + GAP)
        return self.picture.crop((left, top, left + CELL, top + CELL))


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def landscape(sheet: Sheet) -> Image.Image:
    """README's picture: one line a user."""
    step = SIZE + SPACE
    half = (SIZE - SPACE) // 2
    starts = [NAME_WIDTH]
    for columns in (1, 1, 3):
        starts.append(starts[-1] + columns * step + 3 * SPACE)
    picture = Image.new("RGB", (starts[-1] + 3 * step + SPACE, TOP + 3 * step + 2 * SPACE), PAPER)
    pen = ImageDraw.Draw(picture)
    for x, title in zip(starts, ("liked", "disliked", "without preference", "with theirs"), strict=True):
        pen.text((x, 10), title, INK, font(19))
    for user, name in enumerate(USERS):
        y = TOP + user * step
        pen.text((12, y + SIZE / 2), name, INK, font(19), anchor="lm")
        for index in range(4):
            offset = (index % 2 * (half + SPACE), index // 2 * (half + SPACE))
            for start, disliked in zip(starts, (False, True), strict=False):
                thumb = sheet.history(user, index, disliked).resize((half, half))
                picture.paste(thumb, (start + offset[0], y + offset[1]))
        for prompt, words in enumerate(PROMPTS):
            for column, start in enumerate(starts[2:]):
                x = start + prompt * step
                pen.text((x, 40), words, FAINT, font(12))
                picture.paste(sheet.generated(user, prompt, column).resize((SIZE, SIZE)), (x, y))
    return picture


def heart(size: int, colour: str) -> Image.Image:
    """A heart, [size, size] with transparency."""
    # Drawn larger and shrunk, for smooth edges.
    large = Image.new("RGBA", (400, 400))
    pen = ImageDraw.Draw(large)
    for x in (30, 190):
        pen.ellipse((x, 50, x + 180, 230), colour)
    pen.polygon([(48, 188), (200, 380), (352, 188), (200, 120)], colour)
    return large.resize((size, size), Image.Resampling.LANCZOS)


def icon(sheet: Sheet) -> Image.Image:
    """The registry's square: a liked picture of each user, and a heart."""
    side = 400
    tile = 188
    step = side - tile
    picture = Image.new("RGB", (side, side), PAPER)
    for user in range(3):
        picture.paste(sheet.history(user, 0).resize((tile, tile)), (user % 2 * step, user // 2 * step))
    shape = heart(tile - 20, DISLIKED)
    picture.paste(shape, (step + 10, step + 14), shape)
    return picture


def banner(sheet: Sheet) -> Image.Image:
    """The registry's banner, 21:9: what a user liked and disliked, and the same prompt without and with it."""
    user = 2
    picture = Image.new("RGB", (1260, 540), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((60, 50), "PrefGen", INK, font(76))
    pen.text((62, 150), "Show ComfyUI what you like. What you paint next leans your way.", FAINT, font(26))
    for index in range(4):
        for line, colour in enumerate((LIKED, DISLIKED)):
            x = 60 + index * 132
            y = 230 + line * 142
            pen.rounded_rectangle((x - 4, y - 4, x + 123, y + 123), 8, colour)
            picture.paste(sheet.history(user, index, disliked=bool(line)).resize((120, 120)), (x, y))
    for column, words in enumerate(("without", "with")):
        x = 660 + column * 280
        picture.paste(sheet.generated(user, 0, column).resize((262, 262)), (x, 230))
        pen.text((x + 131, 512), words, FAINT, font(22), anchor="mm")
    return picture


def card(sheet: Sheet, title: str, base: str) -> Image.Image:
    """A template's square in the browser: its name, its base, and what Ada liked and disliked."""
    picture = Image.new("RGB", (CARD_SIDE, CARD_SIDE), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((32, 30), title, INK, font(58), spacing=2)
    pen.text((34, 190), base, FAINT, font(32))
    shape = heart(76, DISLIKED)
    picture.paste(shape, (CARD_SIDE - 108, 36), shape)
    side = 104
    for index in range(4):
        for line, colour in enumerate((LIKED, DISLIKED)):
            x = 32 + index * (side + 11)
            y = 250 + line * (side + 18)
            pen.rounded_rectangle((x - 4, y - 4, x + side + 3, y + side + 3), 8, colour)
            picture.paste(sheet.history(0, index, disliked=bool(line)).resize((side, side)), (x, y))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, default=IMAGES / "demo_sheet.png")
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    sheet = Sheet(args.sheet)
    for draw in (landscape, icon, banner):
        draw(sheet).quantize(256).save(args.out / f"{draw.__name__}.png", optimize=True)
    for name, (title, base) in CARDS.items():
        card(sheet, title, base).save(ROOT / "workflows" / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
