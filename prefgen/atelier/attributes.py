"""What a picture of the atelier can show: subjects, props and visual attributes in families.

Subjects and props are what a prompt asks for; attributes are what taste is about.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One visual attribute; `phrase` is how a prompt says it, unique over all families."""

    family: str
    name: str
    phrase: str


_PHRASES = {
    "palette": {
        name: f"{name} palette"
        for name in ("sunset", "ocean", "forest", "pastel", "neon", "monochrome", "earth", "candy")
    },
    "line": {
        "none": "no outline",
        "thin": "thin outline",
        "thick": "thick outline",
        "sticker": "white sticker outline",
    },
    "fill": {"flat": "flat fill", "gradient": "gradient fill", "hatched": "hatched fill", "halftone": "halftone fill"},
    "shape": {
        "round": "rounded shapes",
        "angular": "angular shapes",
        "wobbly": "wobbly shapes",
        "pixel": "pixel shapes",
    },
    "background": {
        "plain": "plain background",
        "gradient": "gradient background",
        "stripes": "striped background",
        "dots": "dotted background",
        "checks": "checkered background",
        "rays": "sunray background",
    },
    "light": {"even": "even light", "side": "side light", "glow": "glowing halo", "shadow": "cast shadow"},
    "composition": {
        "centred": "centred composition",
        "closeup": "close up",
        "distant": "distant view",
        "offset": "off centre composition",
        "repeated": "repeated motif",
    },
    "frame": {
        "none": "no frame",
        "border": "solid border",
        "vignette": "dark vignette",
        "circle": "circular frame",
        "filmstrip": "filmstrip frame",
    },
    "ornament": {
        "none": "no ornaments",
        "stars": "scattered stars",
        "confetti": "scattered confetti",
        "bubbles": "floating bubbles",
        "leaves": "falling leaves",
    },
    "texture": {
        "clean": "clean surface",
        "scanlines": "scanline texture",
        "canvas": "canvas texture",
        "mosaic": "mosaic tiles",
    },
}

FAMILIES: dict[str, tuple[Attribute, ...]] = {
    family: tuple(Attribute(family, name, phrase) for name, phrase in names.items())
    for family, names in _PHRASES.items()
}

SUBJECTS: dict[str, str] = {
    "boat": "a sailing boat",
    "house": "a house",
    "tree": "a tree",
    "cat": "a cat",
    "fish": "a fish",
    "owl": "an owl",
    "mushroom": "a mushroom",
    "rocket": "a rocket",
    "teacup": "a cup of tea",
    "car": "a car",
    "flower": "a flower",
    "umbrella": "an umbrella",
    "lighthouse": "a lighthouse",
    "balloon": "a hot air balloon",
    "cactus": "a cactus",
    "snail": "a snail",
    "apple": "an apple",
    "robot": "a robot",
    "whale": "a whale",
    "castle": "a castle",
}

PROPS: dict[str, str] = {"none": "", "moon": "and a moon", "cloud": "and a cloud", "heart": "and a heart"}
