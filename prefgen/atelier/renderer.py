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
from .figures import PLACES, Subject, draw_prop
from .palettes import PALETTES, Colour


@dataclass(frozen=True)
class Scene:
    """What a picture shows. attributes: one (family, name) for every family, in FAMILIES order."""

    subject: str
    prop: str
    attributes: tuple[tuple[str, str], ...]
    seed: int

    @classmethod
    def of(cls, subject: str, prop: str, attributes: Mapping[str, str], seed: int = 0) -> Scene:
        """From {family: name}."""
        return cls(subject, prop, tuple((family, attributes[family]) for family in FAMILIES), seed)


def random_scene(
    rng: np.random.Generator,
    subject: str | None = None,
    prop: str | None = None,
    fixed: Mapping[str, str] | None = None,
) -> Scene:
    """A scene, drawn uniformly but for what is asked for. fixed: {family: name}."""
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
    """Class number of the subject."""
    return list(SUBJECTS).index(scene.subject)


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """Draw a scene: uint8 [size, size, 3], size a multiple of 16 up to 512. A pure function of its arguments."""
    look = dict(scene.attributes)
    colours = PALETTES[look["palette"]]
    # The order of the draws belongs to the drawings: the shipped models have learnt them to the last pixel.
    rng = np.random.default_rng(scene.seed)
    jitter = rng.uniform(-1, 1, 8)
    wobble = int(rng.integers(4))
    large = size * 2
    canvas = background(look["palette"], look["background"], large).copy()
    places = [
        ((x + 0.02 * jitter[0]) * large, (y + 0.02 * jitter[1]) * large, half * (1 + 0.06 * jitter[2]) * large)
        for x, y, half in PLACES[look["composition"]]
    ]
    if look["light"] == "glow":
        for x, y, half in places:
            halo(canvas, x, y, half * 1.6, colours["light"])
    Subject(scene.subject, look, colours, places, 0.09 * jitter[3], wobble, large).paste(canvas)
    has_prop = scene.prop != "none"
    if has_prop:
        draw_prop(canvas, scene.prop, look, colours, large)
    ornaments(canvas, look["ornament"], colours, rng, large, has_prop)
    canvas = canvas.resize((size, size), Image.Resampling.BOX)
    pixels = texture(np.asarray(canvas, np.float32), look["texture"])
    pixels = frame(pixels, look["frame"], colours)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=128)
def background(palette: str, name: str, size: int) -> Image.Image:
    """The ground, RGB size x size."""
    one = np.array(PALETTES[palette]["ground"], np.float32)
    two = np.array(PALETTES[palette]["ground2"], np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size * 128  # in pixels of a 128 px picture
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


def ornaments(
    canvas: Image.Image, name: str, colours: Mapping[str, Colour], rng: np.random.Generator, size: int, has_prop: bool
) -> None:
    """Small things on a ring around the middle, clear of the prop's corner. size: px of the canvas's side."""
    count = 7
    angles = np.arange(count) * (2 * np.pi / count) + rng.uniform(-0.12, 0.12, count) + 0.2
    radii = 0.39 + rng.uniform(-0.03, 0.03, count)
    turns = rng.uniform(0, 2 * np.pi, count)
    if name == "none":
        return
    draw = ImageDraw.Draw(canvas)
    unit = 1.4 * size / 256
    ornament = ORNAMENTS[name]
    for i, (angle, radius, turn) in enumerate(zip(angles, radii, turns, strict=True)):
        x = (0.5 + radius * np.cos(angle)) * size
        y = (0.5 + radius * np.sin(angle)) * size
        if not (has_prop and x > 0.6 * size and y < 0.36 * size):
            ornament(draw, np.array([x, y]), turn, unit, i, colours)


def _star(draw, centre, turn, unit, number, colours) -> None:
    corners = np.arange(10) * np.pi / 5 + turn * 0.2
    reach = np.where(np.arange(10) % 2, 5.5, 13) * unit
    points = np.stack([centre[0] + reach * np.sin(corners), centre[1] - reach * np.cos(corners)], 1)
    _polygon(draw, points, (255, 222, 60), colours["ink"])


def _confetti(draw, centre, turn, unit, number, colours) -> None:
    points = np.array([[-8, -4], [8, -4], [8, 4], [-8, 4]]) * unit @ _rotation(turn) + centre
    _polygon(draw, points, ((235, 60, 80), (60, 120, 240), (250, 200, 50), (60, 190, 110))[number % 4])


def _bubble(draw, centre, turn, unit, number, colours) -> None:
    radius = (9 + 3 * np.sin(turn)) * unit
    box = (*(centre - radius), *(centre + radius))
    draw.ellipse(box, fill=(214, 240, 255), outline=(90, 150, 215), width=max(1, round(3 * unit)))


def _leaf(draw, centre, turn, unit, number, colours) -> None:
    t = np.linspace(0, np.pi, 6)
    upper = np.stack([np.cos(t) * 13, np.sin(t) * 6], 1)
    lower = np.stack([-np.cos(t) * 13, -np.sin(t) * 6], 1)
    _polygon(draw, np.concatenate([upper, lower]) * unit @ _rotation(turn) + centre, (70, 150, 60), (30, 80, 34))


ORNAMENTS = {"stars": _star, "confetti": _confetti, "bubbles": _bubble, "leaves": _leaf}


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _polygon(draw, points: np.ndarray, fill: Colour, outline: Colour | None = None) -> None:
    draw.polygon([tuple(point) for point in points.tolist()], fill=fill, outline=outline)


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


def frame(pixels: np.ndarray, name: str, colours: Mapping[str, Colour]) -> np.ndarray:
    """What surrounds the picture."""
    if name == "none":
        return pixels
    size = pixels.shape[0]
    alpha = _frame_alpha(name, size)
    if name in ("vignette", "filmstrip"):
        colour = (8, 4, 16)
    else:
        colour = colours["light" if name == "circle" else "main"]
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
