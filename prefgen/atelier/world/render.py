"""The renderer: a scene in, a picture out. Pillow and numpy only.

A picture is drawn at twice its size and halved. All lengths are pixels of a picture of 256 px; patterns of the
background repeat on the 8 px grid of the VAE's latents, so that a small latent model can keep them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .built import BUILT
from .colours import mixed, palette
from .living import LIVING
from .motifs import star
from .places import COMPANION_DRAWINGS, SETTING_DRAWINGS
from .scenes import Scene
from .shapes import Part, blob, box, outline, oval, rotation, shaded_half, wobbled

Colour = tuple[int, int, int]

DRAWINGS: dict[str, list[Part]] = LIVING | BUILT
SIZE = 256
BLOCK = 4  # pixels of one square of pixel art: two in a latent's cell
FACET_SHADE = 0.74
RIM = 4  # pixels of white edge around every piece of a paper cutout
NIGHT = 0.62  # how far a night sky pulls the background towards ink
# (x, y, share of the single subject's size) of every copy
PLACES = {
    "one": ((0.5, 0.0, 1.0),),
    "two": ((0.28, 0.0, 0.6), (0.72, 0.0, 0.6)),
    "many": ((0.18, -0.2, 0.38), (0.5, -0.24, 0.38), (0.82, -0.2, 0.38), (0.32, 0.06, 0.42), (0.68, 0.06, 0.42)),
}
FEET = 0.88  # where subjects stand in a setting


@dataclass(frozen=True)
class Stroke:
    """How outlines are drawn in a picture, in pixels of the canvas."""

    kind: str
    width: float


@dataclass(frozen=True)
class Copy:
    """One copy of the subject: its middle and half its size, in pixels of the canvas; scale: beside a lone one."""

    x: float
    y: float
    half: float
    scale: float

    @property
    def corners(self) -> tuple[int, int, int, int]:
        return (int(self.x - self.half), int(self.y - self.half), int(self.x + self.half), int(self.y + self.half))


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Draw a scene: uint8 [size, size, 3], size a multiple of 16. A pure function of its arguments."""
    kinds = scene.kinds
    numbers = scene.numbers
    colours = palette(kinds["palette"], numbers["hue"], numbers["saturation"])
    rng = np.random.default_rng(scene.seed)
    side = 2 * size
    canvas = background(kinds["background"], colours, side)
    if scene.setting == "night":
        canvas = Image.blend(canvas, Image.new("RGB", canvas.size, mixed(colours["ink"], (16, 18, 52), 0.5)), NIGHT)
    line = Stroke(kinds["line"], numbers["stroke_width"] * side / SIZE)
    draw_setting(canvas, scene.setting, colours, line)
    draw_ornaments(canvas, kinds["ornament"], round(numbers["density"]), colours, rng)
    copies = copies_of(scene, side, rng)
    if kinds["light"] == "glow":
        for copy in copies:
            glow(canvas, copy, colours["glow"])
    subject = Layer(side, BLOCK * side // SIZE if kinds["shape"] == "pixel" else 1)
    for copy in copies:
        draw_subject(subject, scene, copy, colours, line)
    subject.paste(canvas, scene, copies, colours)
    draw_companion(canvas, scene.companion, colours, line)
    picture = canvas.resize((size, size), Image.Resampling.BOX)
    picture = framed(picture, kinds["frame"], colours)
    exponent = numbers["gamma"]
    table = [round(255 * (value / 255) ** exponent) for value in range(256)]
    return np.asarray(picture.point(table * 3))


def copies_of(scene: Scene, side: int, rng: np.random.Generator) -> list[Copy]:
    """Where the subject stands: in a setting on its ground, else in the middle."""
    size = scene.numbers["size"]
    shift = rng.uniform(-0.02, 0.02, 2)
    copies = []
    for x, y, share in PLACES[scene.number]:
        half = size * share / 2
        middle = max(half + 0.02, FEET - half) if scene.setting != "none" else 0.52
        if scene.number == "many":
            middle = 0.62 + (FEET - 0.82 if scene.setting != "none" else 0)
        copies.append(Copy((x + shift[0]) * side, (middle + y + shift[1]) * side, half * side, share))
    return copies


# --- the ground ---


def background(kind: str, colours: dict[str, Colour], side: int) -> Image.Image:
    """The background, RGB side x side."""
    one = Image.new("RGB", (side, side), colours["ground"])
    one.paste(colours["ground2"], (0, 0), _background_mask(kind, side))
    return one


@lru_cache(maxsize=32)
def _background_mask(kind: str, side: int) -> Image.Image:
    """Share of the second colour, L side x side. Periods are multiples of 16 px in a 256 px picture."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side * SIZE
    share = {
        "plain": lambda: np.zeros_like(x),
        "gradient": lambda: y / SIZE,
        "stripes": lambda: x // 16 % 2,
        "dots": lambda: ((x % 32 - 16) ** 2 + (y % 32 - 16) ** 2 < 72).astype(float),
        "checks": lambda: (x // 32 + y // 32) % 2,
        "rays": lambda: np.floor(np.arctan2(y - 140, x - 128) / (2 * np.pi) * 16) % 2,
        "canvas": lambda: 0.45 * ((x // 8 + y // 8) % 2),
        "mosaic": lambda: ((x % 32 < 3) | (y % 32 < 3)) * 0.9 + ((x // 32 * 7 + y // 32 * 5) % 4) * 0.12,
    }[kind]()
    return Image.fromarray((np.clip(share, 0, 1) * 255).astype(np.uint8), "L")


def draw_setting(canvas: Image.Image, setting: str, colours: dict[str, Colour], line: Stroke) -> None:
    """What the subject stands in; its outlines are half as wide as the subject's."""
    side = canvas.width
    pen = ImageDraw.Draw(canvas)
    thin = Stroke("ink" if line.kind in ("ink", "coloured") else "none", line.width / 2)
    for part in SETTING_DRAWINGS[setting]:
        draw_part(pen, part, outline(part, 1.0) * side, part.width * side, colours, thin)


def draw_companion(canvas: Image.Image, companion: str, colours: dict[str, Colour], line: Stroke) -> None:
    """The company, in the upper right corner."""
    side = canvas.width
    half = 0.12 * side
    pen = ImageDraw.Draw(canvas)
    thin = Stroke("ink", max(line.width / 2, side / SIZE * 2))
    for part in COMPANION_DRAWINGS[companion]:
        points = outline(part, 1.0) * half + np.array([0.82, 0.18]) * side
        draw_part(pen, part, points, part.width * half, colours, thin)


def draw_ornaments(canvas: Image.Image, kind: str, count: int, colours: dict[str, Colour], rng) -> None:
    """`count` small things, spread evenly over the picture whatever their number."""
    start = rng.uniform(0, 1, 2)
    turns = rng.uniform(0, 360, 32)
    if kind == "none":
        return
    side = canvas.width
    unit = side / SIZE
    pen = ImageDraw.Draw(canvas)
    for index in range(count):
        # the R2 sequence (Martin Roberts): any first n points cover the square evenly
        place = (start + index * np.array([0.7548776662, 0.5698402910])) % 1 * side
        for part in ORNAMENTS[kind]:
            part = replace(part, role=CONFETTI[index % 4]) if kind == "confetti" else part
            points = outline(part, 1.0) @ rotation(turns[index]) * 9 * unit + place
            draw_part(pen, part, points, part.width * 9 * unit, colours, Stroke("ink", 1.5 * unit))


CONFETTI = ("main", "second", "accent", "leaf")
ORNAMENTS: dict[str, list[Part]] = {
    "none": [],
    "stars": [star("accent", 0, 0, 1.2)],
    "confetti": [box("main", -1.0, -0.45, 1.0, 0.45)],
    "bubbles": [
        oval("light", 0, 0, 1.0),
        oval("ground2", 0, 0, 0.68, detail=True),
        oval("light", -0.25, -0.25, 0.2, detail=True),
    ],
    "leaves": [blob("leaf", (-1.2, 0), (-0.4, -0.55), (0.5, -0.45), (1.2, 0), (0.5, 0.45), (-0.4, 0.55))],
}


# --- the subject ---


class Layer:
    """The subject on a layer of its own: colours, and a mask of where it is. unit: pixels of one block of pixel art."""

    def __init__(self, side: int, unit: int):
        self.side = side
        self.unit = unit
        self.image = Image.new("RGB", (side // unit, side // unit))
        self.mask = Image.new("L", self.image.size)
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.stencil = ImageDraw.Draw(self.mask)

    def paste(self, canvas: Image.Image, scene: Scene, copies: list[Copy], colours: dict[str, Colour]) -> None:
        """Lay the subject over the canvas with its shadow, its fill's pattern and its light."""
        kinds = scene.kinds
        numbers = scene.numbers
        image = self.image.resize(canvas.size, Image.Resampling.NEAREST)
        mask = self.mask.resize(canvas.size, Image.Resampling.NEAREST)
        angle = np.deg2rad(numbers["light_angle"])
        towards_light = np.array([np.cos(angle), np.sin(angle)])
        if kinds["light"] == "shadow":
            offset = (-towards_light * 14 * self.side / SIZE).round().astype(int)
            shade = Image.new("L", canvas.size)
            shade.paste(mask.point([round(0.5 * v) for v in range(256)]), tuple(offset.tolist()))
            dark_ground = sum(colours["ground"]) < 200  # a dark shadow wouldn't show there
            canvas.paste((150, 130, 210) if dark_ground else (20, 14, 34), (0, 0), shade)
        tone = colours["ground" if sum(colours["main"]) < 420 else "ink"]
        for copy in copies:
            left, top, right, bottom = copy.corners
            width = right - left
            pattern = fill_pattern(kinds["fill"], width, numbers["spacing"] * self.side / SIZE, numbers["hatch_angle"])
            if pattern is not None:
                image.paste(tone, (left, top), pattern)
            if kinds["light"] == "side":
                ramp = _ramp(width, towards_light)
                image.paste(
                    (255, 255, 255), (left, top), Image.fromarray(np.clip(ramp * 130, 0, 255).astype(np.uint8), "L")
                )
                image.paste(
                    (10, 0, 24), (left, top), Image.fromarray(np.clip(-ramp * 190, 0, 255).astype(np.uint8), "L")
                )
        canvas.paste(image, (0, 0), mask)


def draw_subject(layer: Layer, scene: Scene, copy: Copy, colours: dict[str, Colour], line: Stroke) -> None:
    """One copy of the subject, in the picture's hand."""
    kinds = scene.kinds
    pixel = layer.side / SIZE / layer.unit  # one pixel of a 256 px picture, on this layer
    # Copies are drawn with a finer pen, but not as fine as they are small.
    width = line.width * copy.scale**0.5 / layer.unit
    line = Stroke(line.kind, max(width, 1.0) if line.kind != "none" else 0.0)
    shapes = list(placed(layer, scene, copy, pixel))
    if line.kind == "sticker":
        draw_sticker(layer, shapes, line.width, pixel)
    for part, points, width in shapes:
        body = part.closed and not part.detail
        paper = kinds["shape"] == "cutout" and body
        if paper:
            cover(layer.pen, points + np.array([4.0, 6.0]) * pixel, (0, 0, 0, 90), 0, True)
        rim = min(RIM * pixel, 0.07 * np.ptp(points, 0).min()) if paper else 0
        draw_part(layer.pen, part, points, width, colours, line, rim)
        if kinds["shape"] == "faceted" and body:
            facet(layer.pen, points, colours[part.role])
        cover(layer.stencil, points, 255, width, part.closed)
        if line.kind in ("ink", "coloured") and not part.detail:
            edge = line.width if part.closed else width + 2 * line.width
            trace(layer.stencil, points, 255, edge, part.closed)
        if kinds["fill"] == "gradient" and body:
            fade(layer, points, colours)


def draw_sticker(layer: Layer, shapes: list[tuple[Part, np.ndarray, float]], line_width: float, pixel: float) -> None:
    """White around the whole silhouette. pixel: one of a 256 px picture, on this layer."""
    for part, points, width in shapes:
        if not part.detail:
            border = width + 2 * line_width + 6 * pixel
            trace(layer.pen, points, (255, 255, 255), border, part.closed)
            trace(layer.stencil, points, 255, border, part.closed)


def placed(layer: Layer, scene: Scene, copy: Copy, pixel: float) -> Iterator[tuple[Part, np.ndarray, float]]:
    """(part, outline on the layer, width of a stroke) of a drawing, with the scene's corners, waves and tilt."""
    numbers = scene.numbers
    shape = scene.kinds["shape"]
    by_hand = shape in ("drawn", "cutout")
    roundness = numbers["roundness"] if by_hand else float(shape == "pixel")
    half = copy.half / layer.unit
    turn = rotation(numbers["tilt"]) * half
    scale = copy.scale**0.5 * pixel
    for number, part in enumerate(DRAWINGS[scene.subject]):
        points = outline(part, roundness) @ turn + np.array([copy.x, copy.y]) / layer.unit
        if by_hand:
            height = min(numbers["wobble"] * scale, 0.1 * np.ptp(points, 0).max())
            points = wobbled(points, part.closed, height, numbers["wavelength"] * scale, 1.7 * number)
        yield part, points, part.width * half


def facet(pen: ImageDraw.ImageDraw, points: np.ndarray, colour: Colour) -> None:
    """The far half of a part in shade, as of a cut stone."""
    far = shaded_half(points, np.array([0.8, 0.6]))
    pen.polygon([tuple(point) for point in far.tolist()], fill=tuple(int(c * FACET_SHADE) for c in colour))


def fade(layer: Layer, points: np.ndarray, colours: dict[str, Colour]) -> None:
    """A part that runs into another colour towards its lower end."""
    left, top = np.floor(points.min(0)).astype(int).tolist()
    right, bottom = np.ceil(points.max(0)).astype(int).tolist()
    if right - left < 2 or bottom - top < 2:
        return
    stencil = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(stencil).polygon([tuple(p) for p in (points - [left, top]).tolist()], fill=255)
    ramp = Image.linear_gradient("L").resize(stencil.size).point([round(0.62 * v) for v in range(256)])
    tone = colours["ground" if sum(colours["main"]) < 420 else "ink"]
    layer.image.paste(tone, (left, top), Image.composite(ramp, Image.new("L", stencil.size), stencil))


def draw_part(
    pen, part: Part, points: np.ndarray, width: float, colours: dict[str, Colour], line: Stroke, rim: float = 0
) -> None:
    """A part with its outline, which is the same on both sides of the edge. rim: width of the paper's white edge."""
    colour = colours[part.role]
    outlined = line.kind in ("ink", "coloured") and line.width > 0 and not part.detail
    edge = colours["ink"] if line.kind == "ink" else tuple(int(c * 0.55) for c in colour)
    if outlined and not part.closed:
        trace(pen, points, edge, width + line.width, False)
    cover(pen, points, colour, width, part.closed)
    if rim and part.closed:
        trace(pen, points, mixed(colour, (255, 255, 255), 0.8), 2 * rim + (line.width if outlined else 0), True)
    if outlined and part.closed:
        trace(pen, points, edge, line.width, True)


def cover(pen, points: np.ndarray, colour, width: float, closed: bool) -> None:
    """Fill an outline, or draw a stroke."""
    if closed:
        pen.polygon([tuple(p) for p in points.tolist()], fill=colour)
    else:
        trace(pen, points, colour, width, False)


def trace(pen, points: np.ndarray, colour, width: float, closed: bool) -> None:
    """A line with round joints and ends along an outline."""
    flat = [tuple(p) for p in points.tolist()]
    if closed:
        flat += flat[:2]
    width = max(1, round(width))
    pen.line(flat, fill=colour, width=width, joint="curve")
    if width > 2 and not closed:
        half = width / 2
        for x, y in flat:
            pen.ellipse((x - half, y - half, x + half, y + half), fill=colour)


def glow(canvas: Image.Image, copy: Copy, colour: Colour) -> None:
    """A soft disc of light behind the subject."""
    width = max(8, int(copy.half * 2.9))
    canvas.paste(colour, (int(copy.x - width / 2), int(copy.y - width / 2)), _disc(width))


@lru_cache(maxsize=64)
def _disc(width: int) -> Image.Image:
    y, x = (np.mgrid[0:width, 0:width] + 0.5) / width * 2 - 1
    return Image.fromarray((np.clip((1 - np.hypot(x, y)) / 0.5, 0, 1) * 235).astype(np.uint8), "L")


def fill_pattern(kind: str, width: int, spacing: float, angle: float) -> Image.Image | None:
    """Mask, L width x width, of the lines or dots over the subject. spacing: in pixels of the canvas."""
    if kind in ("flat", "gradient"):
        return None
    y, x = np.mgrid[0:width, 0:width].astype(np.float32)
    turn = np.deg2rad(angle if kind == "hatched" else 45)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn)
    if kind == "hatched":
        inside = along % spacing < 0.34 * spacing
    else:
        inside = (along % spacing - spacing / 2) ** 2 + (across % spacing - spacing / 2) ** 2 < (0.3 * spacing) ** 2
    return Image.fromarray((inside * 120).astype(np.uint8), "L")


@lru_cache(maxsize=256)
def _ramp_grid(width: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = (np.mgrid[0:width, 0:width].astype(np.float32) + 0.5) / width * 2 - 1
    return x, y


def _ramp(width: int, towards_light: np.ndarray) -> np.ndarray:
    """[width, width]: 1 on the side of the light, -1 on the other, 0 in the middle third."""
    x, y = _ramp_grid(width)
    slope = x * towards_light[0] + y * towards_light[1]
    return np.sign(slope) * np.clip((np.abs(slope) - 0.15) / 0.75, 0, 1)


# --- what lies over everything ---


def framed(picture: Image.Image, kind: str, colours: dict[str, Colour]) -> Image.Image:
    """The picture in its frame."""
    if kind == "none":
        return picture
    colour = {"border": colours["main"], "circle": colours["light"]}.get(kind, (10, 6, 18))
    picture.paste(colour, (0, 0), _frame_mask(kind, picture.width))
    if kind == "filmstrip":
        picture.paste((245, 245, 245), (0, 0), _film_holes(picture.width))
    return picture


@lru_cache(maxsize=16)
def _frame_mask(kind: str, size: int) -> Image.Image:
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size * SIZE
    edge = np.minimum.reduce([x, y, SIZE - x, SIZE - y])
    radius = np.hypot(x - 128, y - 128)
    alpha = {
        "border": np.clip(14 - edge, 0, 1),
        "vignette": np.clip((radius - 104) / 90, 0, 0.8),
        "circle": np.clip(radius - 120, 0, 1),
        "filmstrip": np.clip(28 - np.minimum(y, SIZE - y), 0, 1),
    }[kind]
    return Image.fromarray((alpha * 255).astype(np.uint8), "L")


@lru_cache(maxsize=4)
def _film_holes(size: int) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] * SIZE // size
    row = np.minimum(y, SIZE - 1 - y)
    return Image.fromarray(((row >= 7) & (row < 21) & (x % 32 >= 9) & (x % 32 < 23)).astype(np.uint8) * 255, "L")
