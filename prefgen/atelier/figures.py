"""The subject and the prop of a picture: their outlines in a shape language, and how they are drawn and filled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .palettes import Colour
from .subjects import DRAWINGS, PROP_DRAWINGS

WHITE = (255, 255, 255)
FACET_SHADE = 0.62  # of the colour, on the shaded half of every part in angular shapes
LINE_WIDTHS = {"none": 0, "thin": 3, "thick": 8, "sticker": 16}  # in a drawing of 256 px
PIXEL_LINE_WIDTHS = {"thin": 1.01, "thick": 2.0, "sticker": 4.0}  # in blocks of pixel art

# composition -> (centre x, centre y, half size) of every copy of the subject, in shares of the picture.
PLACES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "centred": ((0.5, 0.53, 0.33),),
    "closeup": ((0.5, 0.54, 0.46),),
    "distant": ((0.53, 0.66, 0.22),),
    "offset": ((0.31, 0.55, 0.27),),
    "repeated": ((0.265, 0.275, 0.21), (0.735, 0.275, 0.21), (0.265, 0.735, 0.21), (0.735, 0.735, 0.21)),
}


class Outline(NamedTuple):
    """One part of a drawing. role: its colour's in the palette; kind: "poly", "oval", "stroke" or "facet".

    points: [n, 2], closed but for a stroke. width: of a stroke, 0 for the others.
    """

    role: str
    kind: str
    points: np.ndarray
    width: float

    @property
    def corners(self) -> list[tuple[float, float]]:
        """The points as Pillow takes them."""
        return [tuple(point) for point in self.points.tolist()]


class Subject:
    """The subject on a layer of its own: colours, and a mask of where it is.

    look: {family: name} of the scene. places: (x, y, half size) of every copy in px. tilt: radians. wobble: which of
    the trembling lines. size: px of the layer's side.
    """

    def __init__(
        self,
        name: str,
        look: Mapping[str, str],
        colours: Mapping[str, Colour],
        places: list[tuple[float, float, float]],
        tilt: float,
        wobble: int,
        size: int,
    ):
        self.look = look
        self.colours = colours
        self.places = places
        self.size = size
        # Pixel art is drawn in blocks of 4 px of a 128 px picture.
        self.unit = 8 * size // 256 if look["shape"] == "pixel" else 1
        side = size // self.unit
        self.image = Image.new("RGB", (side, side))
        self.mask = Image.new("L", (side, side))
        self.ink = ImageDraw.Draw(self.image)
        self.fill = ImageDraw.Draw(self.mask)
        outlines = shaped(name, look["shape"], wobble, PLACES[look["composition"]][0][2])
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        for x, y, half in places:
            self.draw(
                [
                    Outline(
                        outline.role,
                        outline.kind,
                        (outline.points @ turn) * half / self.unit + np.array([x, y]) / self.unit,
                        outline.width * half / self.unit,
                    )
                    for outline in outlines
                ]
            )
        if self.unit > 1:
            self.image = self.image.resize((size, size), Image.Resampling.NEAREST)
            self.mask = self.mask.resize((size, size), Image.Resampling.NEAREST)

    def draw(self, outlines: list[Outline]) -> None:
        """One copy, back to front."""
        line = self.look["line"]
        width = LINE_WIDTHS[line] * (self.size / 256 / self.unit)
        if width and self.unit > 1:
            width = PIXEL_LINE_WIDTHS[line]
        if line == "sticker":
            # White around the whole silhouette: before any part is drawn.
            for outline in outlines:
                if outline.kind != "facet":
                    stroke = outline.kind == "stroke"
                    self.trace(outline.points, WHITE, max(width, 2) + (outline.width if stroke else 0), not stroke)
        edge = width if line in ("thin", "thick") else 0
        for outline in outlines:
            if outline.kind == "stroke":
                self.draw_stroke(outline, edge)
            else:
                self.draw_area(outline, edge)

    def draw_stroke(self, outline: Outline, edge: float) -> None:
        """A line of its own, with an edge of ink on both sides unless it is ink itself."""
        if edge and outline.role != "ink":
            self.trace(outline.points, self.colours["ink"], outline.width + 2 * edge * 0.7, False)
        self.trace(outline.points, self.colours[outline.role], max(outline.width, 1.01), False)

    def draw_area(self, outline: Outline, edge: float) -> None:
        """A closed part with its edge, or the shade on one."""
        colour = self.colours[outline.role]
        if outline.kind == "facet":
            self.ink.polygon(outline.corners, fill=tuple(int(c * FACET_SHADE) for c in colour))
            return
        self.ink.polygon(outline.corners, fill=colour)
        self.fill.polygon(outline.corners, fill=255)
        if edge:
            self.trace(outline.points, self.colours["ink"], edge, True)

    def trace(self, points: np.ndarray, colour: Colour, width: float, closed: bool) -> None:
        """A line along points [n, 2]."""
        # Two points beyond the end of a closed line, so that its last corner is joined too.
        flat = [tuple(p) for p in (np.concatenate([points, points[:2]]) if closed else points).tolist()]
        width = max(1, round(width))
        self.ink.line(flat, fill=colour, width=width, joint="curve")
        self.fill.line(flat, fill=255, width=width, joint="curve")

    def paste(self, canvas: Image.Image) -> None:
        """Light and fill it, and lay it on the picture, its shadow first."""
        if self.look["light"] == "shadow":
            self.cast_shadow(canvas)
        # Lines and dots in the palette's own contrast, so that a fill never hides which palette it is.
        tone = self.colours["ground" if sum(self.colours["main"]) < 420 else "ink"]
        pattern = fill_pattern(self.look["fill"], self.size)
        if pattern is not None:
            self.image.paste(tone, (0, 0), pattern)
        if self.look["fill"] == "gradient":
            for place in self.places:
                self.blend(tone, _fade(), *place)
        if self.look["light"] == "side":
            for place in self.places:
                self.blend(WHITE, _side_light(), *place)
                self.blend((10, 0, 24), _side_dark(), *place)
        canvas.paste(self.image, (0, 0), self.mask)

    def cast_shadow(self, canvas: Image.Image) -> None:
        """A shadow to the lower right."""
        offset = self.size * 7 // 128
        shade = Image.new("L", (self.size, self.size))
        shade.paste(self.mask.point(lambda value: value * 0.55), (offset, offset))
        # A dark ground takes a bright shadow: a dark one would not show.
        dark = sum(self.colours["ground"]) < 200
        canvas.paste((150, 130, 210) if dark else (20, 14, 34), (0, 0), shade)

    def blend(self, colour: Colour, ramp: Image.Image, x: float, y: float, half: float) -> None:
        """Lay a colour over the square around a copy through a ramp that is stretched to it."""
        corner = (int(x - half), int(y - half))
        size = (int(x + half) - corner[0], int(y + half) - corner[1])
        self.image.paste(colour, corner, ramp.resize(size))


def draw_prop(
    canvas: Image.Image, name: str, look: Mapping[str, str], colours: Mapping[str, Colour], size: int
) -> None:
    """The second object: upper right, in the middle among repeated motifs. size: px of the canvas's side."""
    x, y, half = (0.5, 0.5, 0.1) if look["composition"] == "repeated" else (0.76, 0.22, 0.115)
    draw = ImageDraw.Draw(canvas)
    outlines = [
        outline._replace(points=outline.points * half * size + np.array([x, y]) * size)
        for outline in shaped(name, "round", 0, half)
    ]
    # Its edge in ink first, so that no part's edge lies on another part.
    for outline in outlines:
        corners = outline.corners
        draw.line([*corners, *corners[:2]], fill=colours["ink"], width=round(size * 0.022), joint="curve")
    for outline in outlines:
        draw.polygon(outline.corners, fill=colours[outline.role])


def _ramp(values) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8), "L")


@lru_cache(maxsize=1)
def _side_light() -> Image.Image:
    return _ramp(np.tile(np.concatenate([np.full(14, 120.0), np.linspace(120, 0, 16), np.zeros(34)]), (2, 1)))


@lru_cache(maxsize=1)
def _side_dark() -> Image.Image:
    return _ramp(np.tile(np.concatenate([np.zeros(30), np.linspace(0, 185, 34)]), (2, 1)))


@lru_cache(maxsize=1)
def _fade() -> Image.Image:
    return _ramp(np.tile(np.linspace(0, 160, 64)[:, None], (1, 2)))


@lru_cache(maxsize=16)
def fill_pattern(name: str, size: int) -> Image.Image | None:
    """Alpha mask of the hatching or dots that a fill lays over the subject."""
    if name in ("flat", "gradient"):
        return None
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size * 128
    if name == "hatched":
        alpha = ((x + y) % 8 < 2.4) * 0.7
    else:
        alpha = (((x % 8) - 4) ** 2 + ((y % 8) - 4) ** 2 < 5.5) * 0.75
    return Image.fromarray((alpha * 255).astype(np.uint8), "L")


@lru_cache(maxsize=1024)
def shaped(name: str, shape: str, wobble: int, half: float) -> list[Outline]:
    """Parts of a drawing in a shape language, in a unit square (-1..1).

    half: half the drawing's size as a share of the picture; a trembling line has the same waves at every size.
    """
    outlines = []
    for role, kind, numbers in {**DRAWINGS, **PROP_DRAWINGS}[name]:
        width = 0.0
        if kind == "oval":
            cx, cy, rx, ry = numbers
            points = oval_points(cx, cy, rx, ry, shape == "angular")
        elif kind == "stroke":
            points = np.array(numbers[0], float)
            width = numbers[1]
        else:
            points = np.array(numbers, float)
        closed = kind != "stroke"
        if shape == "round" and kind == "poly":
            points = rounded(points)
        if shape == "wobbly":
            points = wobbled(points, closed, wobble, half)
        outlines.append(Outline(role, kind, points, width))
        if shape == "angular" and closed and np.ptp(points, 0).min() > 0.3:
            outlines.append(Outline(role, "facet", shaded_half(points), 0.0))
    return outlines


def oval_points(cx: float, cy: float, rx: float, ry: float, angular: bool) -> np.ndarray:
    """Points [n, 2] of an ellipse, or of the hexagon that angular shapes have in its place."""
    angle = np.linspace(0, 2 * np.pi, 6 if angular else 28, endpoint=False) + (np.pi / 6 if angular else 0)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], 1)


def rounded(points: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Cut every corner of a closed polygon three times (Chaikin)."""
    for cut in (share, 0.25, 0.25):
        following = np.roll(points, -1, 0)
        pairs = np.stack([points * (1 - cut) + following * cut, points * cut + following * (1 - cut)], 1)
        points = pairs.reshape(-1, 2)
    return points


def wobbled(points: np.ndarray, closed: bool, variant: int, half: float) -> np.ndarray:
    """Waves along the line, about 12 px long and 2 px high in a 128 px picture: a trembling hand."""
    ends = np.roll(points, -1, 0) if closed else points[1:]
    starts = points if closed else points[:-1]
    step = 2.5 / (128 * half)
    dense = [
        a + (b - a) * t
        for a, b in zip(starts, ends, strict=True)
        for t in np.arange(0, 1, 1 / max(1, round(np.linalg.norm(b - a) / step)))
    ]
    points = np.array(dense if closed else [*dense, points[-1]])
    along = (np.roll(points, -1, 0) - np.roll(points, 1, 0)) if closed else np.gradient(points, axis=0)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    waves = max(3, round(length[-1] * 128 * half / 12))
    normal = np.stack([along[:, 1], -along[:, 0]], 1) / np.maximum(np.linalg.norm(along, axis=1), 1e-6)[:, None]
    height = min(2.2 / (128 * half), 0.09 * length[-1] / np.pi)
    return points + normal * height * np.sin(length / length[-1] * waves * 2 * np.pi + variant * 1.6)[:, None]


def shaded_half(points: np.ndarray) -> np.ndarray:
    """The part of a closed polygon right of and below a slanted line through its middle."""
    side = (points - (points.min(0) + points.max(0)) / 2) @ np.array([0.8, 0.6])
    shaded = []
    for i in range(len(points)):
        j = (i + 1) % len(points)
        if side[i] >= 0:
            shaded.append(points[i])
        if side[i] * side[j] < 0:
            shaded.append(points[i] + (points[j] - points[i]) * side[i] / (side[i] - side[j]))
    return np.array(shaded)
