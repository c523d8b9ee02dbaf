"""The atelier's renderer: a scene in, a picture out. Pillow and numpy only.

A picture is drawn at twice its size and halved. Patterns repeat every 8 or 16 px on the 8 px grid of the VAE's latents,
so that a small latent model can keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .attributes import FAMILIES, PROPS, SUBJECTS
from .subjects import DRAWINGS, PROP_DRAWINGS

Colour = tuple[int, int, int]

# ground, ground2: background; main, accent, light: the subject; ink: lines and pupils.
PALETTES: dict[str, dict[str, Colour]] = {
    "sunset": {
        "ground": (255, 170, 92),
        "ground2": (240, 104, 86),
        "main": (128, 38, 96),
        "accent": (255, 218, 96),
        "light": (255, 240, 212),
        "ink": (62, 14, 54),
    },
    "ocean": {
        "ground": (128, 206, 232),
        "ground2": (62, 156, 206),
        "main": (18, 84, 150),
        "accent": (52, 212, 200),
        "light": (232, 250, 255),
        "ink": (6, 30, 70),
    },
    "forest": {
        "ground": (172, 206, 136),
        "ground2": (104, 158, 84),
        "main": (36, 94, 50),
        "accent": (204, 150, 58),
        "light": (242, 246, 212),
        "ink": (14, 40, 22),
    },
    "pastel": {
        "ground": (252, 220, 232),
        "ground2": (208, 222, 252),
        "main": (184, 162, 232),
        "accent": (158, 226, 198),
        "light": (255, 252, 238),
        "ink": (118, 98, 152),
    },
    "neon": {
        "ground": (26, 12, 52),
        "ground2": (70, 20, 116),
        "main": (255, 36, 176),
        "accent": (36, 255, 216),
        "light": (246, 255, 84),
        "ink": (116, 84, 255),
    },
    "monochrome": {
        "ground": (224, 224, 224),
        "ground2": (178, 178, 178),
        "main": (96, 96, 96),
        "accent": (146, 146, 146),
        "light": (252, 252, 252),
        "ink": (16, 16, 16),
    },
    "earth": {
        "ground": (228, 202, 160),
        "ground2": (194, 154, 108),
        "main": (152, 72, 42),
        "accent": (104, 104, 56),
        "light": (250, 238, 214),
        "ink": (58, 34, 20),
    },
    "candy": {
        "ground": (140, 238, 226),
        "ground2": (255, 238, 116),
        "main": (255, 66, 132),
        "accent": (126, 82, 232),
        "light": (255, 255, 255),
        "ink": (108, 14, 110),
    },
}

FACET_SHADE = 0.62  # of the colour, on the shaded half of every part in angular shapes

# composition -> (centre x, centre y, half size) of every copy of the subject, in shares of the picture.
PLACES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "centred": ((0.5, 0.53, 0.33),),
    "closeup": ((0.5, 0.54, 0.46),),
    "distant": ((0.53, 0.66, 0.22),),
    "offset": ((0.31, 0.55, 0.27),),
    "repeated": ((0.265, 0.275, 0.21), (0.735, 0.275, 0.21), (0.265, 0.735, 0.21), (0.735, 0.735, 0.21)),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. attributes: one (family, name) for every family, in FAMILIES order."""

    subject: str
    prop: str
    attributes: tuple[tuple[str, str], ...]
    seed: int

    @classmethod
    def of(cls, subject: str, prop: str, attributes: Mapping[str, str], seed: int = 0) -> Scene:
        return cls(subject, prop, tuple((family, attributes[family]) for family in FAMILIES), seed)


def random_scene(
    rng: np.random.Generator,
    subject: str | None = None,
    prop: str | None = None,
    fixed: Mapping[str, str] | None = None,
) -> Scene:
    """A scene with everything that isn't given drawn uniformly."""
    fixed = fixed or {}
    subject = subject or list(SUBJECTS)[rng.integers(len(SUBJECTS))]
    prop = prop or list(PROPS)[rng.integers(len(PROPS))]
    attributes = {
        family: fixed.get(family, values[rng.integers(len(values))].name) for family, values in FAMILIES.items()
    }
    return Scene.of(subject, prop, attributes, int(rng.integers(2**31)))


def attribute_labels(scene: Scene) -> np.ndarray:
    """Class number of each family's attribute, int64 [10]."""
    return np.array([[a.name for a in FAMILIES[family]].index(name) for family, name in scene.attributes])


def subject_index(scene: Scene) -> int:
    return list(SUBJECTS).index(scene.subject)


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Draw a scene: uint8 [size, size, 3], size a multiple of 16 up to 512. A pure function of its arguments."""
    look = dict(scene.attributes)
    colours = PALETTES[look["palette"]]
    rng = np.random.default_rng(scene.seed)
    jitter = rng.uniform(-1, 1, 8)
    s = size * 2
    canvas = background(look["palette"], look["background"], s).copy()
    places = [
        ((x + 0.02 * jitter[0]) * s, (y + 0.02 * jitter[1]) * s, half * (1 + 0.06 * jitter[2]) * s)
        for x, y, half in PLACES[look["composition"]]
    ]
    if look["light"] == "glow":
        for x, y, half in places:
            halo(canvas, x, y, half * 1.6, colours["light"])
    layer = Subject(scene.subject, look, colours, places, tilt=0.09 * jitter[3], wobble=int(rng.integers(4)), size=s)
    layer.paste(canvas)
    if scene.prop != "none":
        draw_prop(canvas, scene.prop, look, colours, s)
    ornaments(canvas, look["ornament"], colours, rng, s, bool(scene.prop != "none"))
    canvas = canvas.resize((size, size), Image.Resampling.BOX)
    pixels = texture(np.asarray(canvas, np.float32), look["texture"])
    pixels = frame(pixels, look["frame"], colours)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=128)
def background(palette: str, name: str, s: int) -> Image.Image:
    """The ground, RGB s x s."""
    one, two = (np.array(PALETTES[palette][k], np.float32) for k in ("ground", "ground2"))
    y, x = np.mgrid[0:s, 0:s].astype(np.float32) / s * 128  # in pixels of a 128 px picture
    if name == "plain":
        share = np.zeros_like(x)
    elif name == "gradient":
        share = y / 128
        two = two * 0.75
    elif name == "stripes":
        share = (x // 8 % 2).astype(np.float32)
    elif name == "dots":
        share = (((x % 16) - 8) ** 2 + ((y % 16) - 8) ** 2 < 22).astype(np.float32)
    elif name == "checks":
        share = ((x // 16 + y // 16) % 2).astype(np.float32)
    else:
        angle = np.arctan2(y - 70, x - 64) / (2 * np.pi) * 14
        share = (np.floor(angle) % 2).astype(np.float32)
    return Image.fromarray((one + (two - one) * share[..., None]).astype(np.uint8), "RGB")


def halo(canvas: Image.Image, x: float, y: float, radius: float, colour: Colour) -> None:
    """A soft disc of light, brightest behind the subject."""
    side = max(8, int(radius * 2) // 8 * 8)
    canvas.paste(colour, (int(x - side / 2), int(y - side / 2)), _disc(side))


@lru_cache(maxsize=64)
def _disc(side: int) -> Image.Image:
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side * 2 - 1
    distance = np.sqrt(x * x + y * y)
    return Image.fromarray((np.clip((1 - distance) / 0.45, 0, 1) * 235).astype(np.uint8), "L")


class Subject:
    """The subject on a layer of its own: colours, and a mask of where it is."""

    def __init__(self, name, look, colours, places, tilt, wobble, size):
        self.look, self.colours, self.places, self.size = look, colours, places, size
        self.unit = 8 * size // 256 if look["shape"] == "pixel" else 1  # pixel art: blocks of 4 px in a 128 px picture
        side = size // self.unit
        self.image, self.mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
        self.ink, self.fill = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)
        parts = shaped(name, look["shape"], wobble, PLACES[look["composition"]][0][2])
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        for x, y, half in places:
            moved = [
                (
                    role,
                    kind,
                    (points @ turn) * half / self.unit + np.array([x, y]) / self.unit,
                    width * half / self.unit,
                )
                for role, kind, points, width in parts
            ]
            self.draw(moved)
        if self.unit > 1:
            self.image = self.image.resize((size, size), Image.Resampling.NEAREST)
            self.mask = self.mask.resize((size, size), Image.Resampling.NEAREST)

    def draw(self, parts) -> None:
        line = self.look["line"]
        scale = self.size / 256 / self.unit
        width = {"none": 0, "thin": 3, "thick": 8, "sticker": 16}[line] * scale
        if width and self.unit > 1:
            width = {"thin": 1.01, "thick": 2.0, "sticker": 4.0}[line]
        if line == "sticker":
            for _, kind, points, own in parts:
                if kind == "facet":
                    continue
                self.trace(points, (255, 255, 255), max(width, 2) + (own if kind == "stroke" else 0), kind != "stroke")
        for role, kind, points, own in parts:
            colour = self.colours[role]
            if kind == "stroke":
                if line in ("thin", "thick") and role != "ink":
                    self.trace(points, self.colours["ink"], own + 2 * width * 0.7, False)
                self.trace(points, colour, max(own, 1.01), False)
                continue
            flat = [tuple(p) for p in points.tolist()]
            if kind == "facet":
                self.ink.polygon(flat, fill=tuple(int(c * FACET_SHADE) for c in colour))
                continue
            self.ink.polygon(flat, fill=colour)
            self.fill.polygon(flat, fill=255)
            if line in ("thin", "thick"):
                self.trace(points, self.colours["ink"], width, True)

    def trace(self, points, colour: Colour, width: float, closed: bool) -> None:
        flat = [tuple(p) for p in (np.concatenate([points, points[:2]]) if closed else points).tolist()]
        width = max(1, round(width))
        self.ink.line(flat, fill=colour, width=width, joint="curve")
        self.fill.line(flat, fill=255, width=width, joint="curve")

    def paste(self, canvas: Image.Image) -> None:
        s = self.size
        if self.look["light"] == "shadow":
            offset = s * 7 // 128
            shade = Image.new("L", (s, s))
            shade.paste(self.mask.point(lambda v: v * 0.55), (offset, offset))
            # A dark ground takes a bright shadow: a dark one would not show.
            dark = sum(self.colours["ground"]) < 200
            canvas.paste((150, 130, 210) if dark else (20, 14, 34), (0, 0), shade)
        # Lines and dots in the palette's own contrast, so that a fill never hides which palette it is.
        tone = self.colours["ground" if sum(self.colours["main"]) < 420 else "ink"]
        pattern = fill_pattern(self.look["fill"], s)
        if pattern is not None:
            self.image.paste(tone, (0, 0), pattern)
        if self.look["fill"] == "gradient":
            for corners in self.corners():
                self.blend(tone, corners, _fade())
        if self.look["light"] == "side":
            for corners in self.corners():
                self.blend((255, 255, 255), corners, _side_light())
                self.blend((10, 0, 24), corners, _side_dark())
        canvas.paste(self.image, (0, 0), self.mask)

    def corners(self) -> list[tuple[int, int, int, int]]:
        """The square around every copy."""
        return [(int(x - half), int(y - half), int(x + half), int(y + half)) for x, y, half in self.places]

    def blend(self, colour: Colour, corners, ramp: Image.Image) -> None:
        """Lay a colour over a square through a ramp that is stretched to it."""
        x0, y0, x1, y1 = corners
        self.image.paste(colour, (x0, y0), ramp.resize((x1 - x0, y1 - y0)))


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
def fill_pattern(name: str, s: int) -> Image.Image | None:
    """Alpha mask of the hatching or dots that a fill lays over the subject."""
    if name in ("flat", "gradient"):
        return None
    y, x = np.mgrid[0:s, 0:s].astype(np.float32) / s * 128
    if name == "hatched":
        alpha = ((x + y) % 8 < 2.4) * 0.7
    else:
        alpha = (((x % 8) - 4) ** 2 + ((y % 8) - 4) ** 2 < 5.5) * 0.75
    return Image.fromarray((alpha * 255).astype(np.uint8), "L")


@lru_cache(maxsize=1024)
def shaped(name: str, shape: str, wobble: int, half: float):
    """Parts of a drawing in a shape language: (role, kind, points [n, 2], stroke width).

    half: half the drawing's size as a share of the picture; a trembling line has the same waves at every size.
    """
    parts = []
    for role, kind, numbers in {**DRAWINGS, **PROP_DRAWINGS}[name]:
        width = 0.0
        if kind == "oval":
            cx, cy, rx, ry = numbers
            count = 6 if shape == "angular" else 28
            angle = np.linspace(0, 2 * np.pi, count, endpoint=False) + (np.pi / 6 if shape == "angular" else 0)
            points = np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], 1)
        elif kind == "stroke":
            points, width = np.array(numbers[0], float), numbers[1]
        else:
            points = np.array(numbers, float)
        closed = kind != "stroke"
        if shape == "round" and kind == "poly":
            points = rounded(points)
        if shape == "wobbly":
            points = wobbled(points, closed, wobble, half)
        parts.append((role, kind, points, width))
        if shape == "angular" and closed and np.ptp(points, 0).min() > 0.3:
            parts.append((role, "facet", shaded_half(points), 0.0))
    return parts


def rounded(points: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Cut every corner of a closed polygon three times (Chaikin)."""
    for cut in (share, 0.25, 0.25):
        following = np.roll(points, -1, 0)
        points = np.stack([points * (1 - cut) + following * cut, points * cut + following * (1 - cut)], 1).reshape(
            -1, 2
        )
    return points


def wobbled(points: np.ndarray, closed: bool, variant: int, half: float) -> np.ndarray:
    """Waves along the line, about 12 px long and 2 px high in a 128 px picture: a trembling hand."""
    ends = np.roll(points, -1, 0) if closed else points[1:]
    starts = points if closed else points[:-1]
    step = 2.5 / (128 * half)
    pieces = [
        a + (b - a) * t
        for a, b in zip(starts, ends, strict=True)
        for t in np.arange(0, 1, 1 / max(1, round(np.linalg.norm(b - a) / step)))
    ]
    points = np.array(pieces if closed else [*pieces, points[-1]])
    along = (np.roll(points, -1, 0) - np.roll(points, 1, 0)) if closed else np.gradient(points, axis=0)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    waves = max(3, round(length[-1] * 128 * half / 12))
    normal = np.stack([along[:, 1], -along[:, 0]], 1) / np.maximum(np.linalg.norm(along, axis=1), 1e-6)[:, None]
    height = min(2.2 / (128 * half), 0.09 * length[-1] / np.pi)
    return points + normal * height * np.sin(length / length[-1] * waves * 2 * np.pi + variant * 1.6)[:, None]


def shaded_half(points: np.ndarray) -> np.ndarray:
    """The part of a closed polygon right of and below a slanted line through its middle."""
    side = (points - (points.min(0) + points.max(0)) / 2) @ np.array([0.8, 0.6])
    kept = []
    for i in range(len(points)):
        j = (i + 1) % len(points)
        if side[i] >= 0:
            kept.append(points[i])
        if side[i] * side[j] < 0:
            kept.append(points[i] + (points[j] - points[i]) * side[i] / (side[i] - side[j]))
    return np.array(kept)


def draw_prop(canvas: Image.Image, name: str, look, colours, s: int) -> None:
    """The second object: upper right, in the middle among repeated motifs."""
    x, y, half = (0.5, 0.5, 0.1) if look["composition"] == "repeated" else (0.76, 0.22, 0.115)
    draw = ImageDraw.Draw(canvas)
    parts = shaped(name, "round", 0, half)
    for grow, ink in ((1.0, colours["ink"]), (0.0, None)):
        for role, _, points, _ in parts:
            flat = [tuple(p) for p in (points * half * s + np.array([x, y]) * s).tolist()]
            if ink:
                draw.line([*flat, flat[0], flat[1]], fill=ink, width=round(s * 0.022 * grow), joint="curve")
            else:
                draw.polygon(flat, fill=colours[role])


def ornaments(canvas: Image.Image, name: str, colours, rng, s: int, prop: bool) -> None:
    """Small things on a ring around the middle, clear of the prop's corner."""
    count = 7
    angles = np.arange(count) * (2 * np.pi / count) + rng.uniform(-0.12, 0.12, count) + 0.2
    radius = 0.39 + rng.uniform(-0.03, 0.03, count)
    spin = rng.uniform(0, 2 * np.pi, count)
    if name == "none":
        return
    draw = ImageDraw.Draw(canvas)
    for i, (angle, r, turn) in enumerate(zip(angles, radius, spin, strict=True)):
        x, y = (0.5 + r * np.cos(angle)) * s, (0.5 + r * np.sin(angle)) * s
        if prop and x > 0.6 * s and y < 0.36 * s:
            continue
        unit = 1.4 * s / 256
        if name == "stars":
            corners = np.arange(10) * np.pi / 5 + turn * 0.2
            reach = np.where(np.arange(10) % 2, 5.5, 13) * unit
            shape = np.stack([x + reach * np.sin(corners), y - reach * np.cos(corners)], 1)
            draw.polygon([tuple(p) for p in shape.tolist()], fill=(255, 222, 60), outline=colours["ink"])
        elif name == "confetti":
            side = np.array([[-8, -4], [8, -4], [8, 4], [-8, 4]]) * unit
            c, sn = np.cos(turn), np.sin(turn)
            shape = side @ np.array([[c, sn], [-sn, c]]) + [x, y]
            colour = ((235, 60, 80), (60, 120, 240), (250, 200, 50), (60, 190, 110))[i % 4]
            draw.polygon([tuple(p) for p in shape.tolist()], fill=colour)
        elif name == "bubbles":
            b = (9 + 3 * np.sin(turn)) * unit
            draw.ellipse(
                (x - b, y - b, x + b, y + b),
                fill=(214, 240, 255),
                outline=(90, 150, 215),
                width=max(1, round(3 * unit)),
            )
        else:
            t = np.linspace(0, np.pi, 6)
            leaf = np.concatenate(
                [np.stack([np.cos(t) * 13, np.sin(t) * 6], 1), np.stack([-np.cos(t) * 13, -np.sin(t) * 6], 1)]
            )
            c, sn = np.cos(turn), np.sin(turn)
            shape = leaf * unit @ np.array([[c, sn], [-sn, c]]) + [x, y]
            draw.polygon([tuple(p) for p in shape.tolist()], fill=(70, 150, 60), outline=(30, 80, 34))


def texture(pixels: np.ndarray, name: str) -> np.ndarray:
    """The surface over the whole picture; pixels float32 [h, w, 3], 0..255."""
    gain = _texture_gain(name, pixels.shape[0])
    return pixels if gain is None else pixels * gain + (255 * (1 - gain) * 0.12)


@lru_cache(maxsize=16)
def _texture_gain(name: str, size: int) -> np.ndarray | None:
    if name == "clean":
        return None
    y, x = np.mgrid[0:size, 0:size] * 128 // size
    if name == "scanlines":
        gain = np.where(y % 4 < 2, 1.0, 0.72)
    elif name == "canvas":
        gain = np.where((x // 4 + y // 4) % 2 == 0, 1.06, 0.84)
    else:
        gain = np.where((x % 16 == 0) | (y % 16 == 0) | (x % 16 == 15) | (y % 16 == 15), 0.6, 1.0)
    return gain[..., None].astype(np.float32)


def frame(pixels: np.ndarray, name: str, colours) -> np.ndarray:
    """What surrounds the picture."""
    if name == "none":
        return pixels
    size = pixels.shape[0]
    alpha, colour = _frame_alpha(name, size), colours["light" if name == "circle" else "main"]
    if name in ("vignette", "filmstrip"):
        colour = (8, 4, 16)
    framed = pixels * (1 - alpha) + np.array(colour, np.float32) * alpha
    if name == "filmstrip":
        framed = np.where(_film_holes(size), np.float32(245), framed)
    return framed


@lru_cache(maxsize=16)
def _frame_alpha(name: str, size: int) -> np.ndarray:
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size * 128
    edge = np.minimum.reduce([x, y, 128 - x, 128 - y])
    radius = np.hypot(x - 64, y - 64)
    alpha = {
        "border": np.clip(8.5 - edge, 0, 1),
        "vignette": np.clip((radius - 44) / 38, 0, 0.92),
        "circle": np.clip(radius - 60, 0, 1),
        "filmstrip": np.clip(16.5 - np.minimum(y, 128 - y), 0, 1),
    }[name]
    return alpha[..., None].astype(np.float32)


@lru_cache(maxsize=4)
def _film_holes(size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] * 128 // size
    row = np.minimum(y, 127 - y)
    return ((row >= 4) & (row < 12) & (x % 16 >= 4) & (x % 16 < 12))[..., None]
