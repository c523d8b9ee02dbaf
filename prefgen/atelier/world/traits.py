"""What taste is about in this world: traits that words name, traits that words name coarsely, and traits without words.

A named trait is one of a few kinds. A continuous trait is a number, drawn uniformly from its range; captions say some
of them in three bins ("thin", "medium", "bold" lines) and others not at all. A trait counts only where it can be seen:
the angle of hatching is nothing in a picture without hatching (`visible`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# name of the kind -> how a prompt says it
NAMED: dict[str, dict[str, str]] = {
    "palette": {
        name: f"{name} palette"
        for name in ("sunset", "ocean", "forest", "pastel", "neon", "monochrome", "earth", "candy")
    },
    "line": {
        "none": "no outline",
        "ink": "ink outline",
        "coloured": "coloured outline",
        "sticker": "white sticker outline",
    },
    "fill": {"flat": "flat fill", "gradient": "gradient fill", "hatched": "hatched fill", "halftone": "halftone fill"},
    "shape": {"drawn": "drawn shapes", "faceted": "faceted shapes", "pixel": "pixel shapes", "cutout": "paper cutout"},
    "background": {
        "plain": "plain background",
        "gradient": "gradient background",
        "stripes": "striped background",
        "dots": "dotted background",
        "checks": "checkered background",
        "rays": "sunray background",
        "canvas": "canvas background",
        "mosaic": "mosaic background",
    },
    "light": {"even": "even light", "side": "side light", "glow": "glowing halo", "shadow": "cast shadow"},
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
}


@dataclass(frozen=True)
class Continuous:
    """One continuous trait. low, high: its range, in `unit`; bins: how captions say its three thirds, or nothing.

    period: 0 for a line, else the range wraps around (high is low again) and distances go the short way.
    """

    name: str
    low: float
    high: float
    unit: str
    bins: tuple[str, str, str] | tuple[()] = ()
    period: bool = False

    def share(self, value: float) -> float:
        """Where a value lies in the range, 0..1."""
        return (value - self.low) / (self.high - self.low)

    def bin(self, value: float) -> int:
        """0, 1 or 2: the third of the range that a value lies in."""
        return min(2, int(self.share(value) * 3))

    def distance(self, a: float, b: float) -> float:
        """How far two values lie apart, in shares of the largest distance there is: 0..1."""
        apart = abs(self.share(a) - self.share(b))
        return 2 * min(apart, 1 - apart) if self.period else apart

    def mean_distance(self, value: float) -> float:
        """The mean distance from a value to values drawn uniformly: what chance comes to. 1/2 where the range wraps."""
        if self.period:
            return 0.5
        share = self.share(value)
        return (share**2 + (1 - share) ** 2) / 2


# Lengths are pixels of a picture of 256 px.
CONTINUOUS: dict[str, Continuous] = {
    trait.name: trait
    for trait in (
        Continuous("stroke_width", 2, 12, "px", ("thin lines", "medium lines", "bold lines")),
        Continuous("wobble", 0, 6, "px", ("steady hand", "loose hand", "trembling hand")),
        Continuous("density", 4, 24, "ornaments", ("few ornaments", "some ornaments", "many ornaments")),
        Continuous("size", 0.40, 0.95, "of the picture", ("small subject", "medium subject", "large subject")),
        Continuous("saturation", 0.5, 1.4, "times", ("muted colours", "natural colours", "vivid colours")),
        Continuous("spacing", 8, 24, "px", ("fine pattern", "medium pattern", "coarse pattern")),
        Continuous("hue", -40, 40, "degrees"),
        Continuous("hatch_angle", 0, 180, "degrees", period=True),
        Continuous("wavelength", 16, 64, "px"),
        Continuous("roundness", 0, 1, "of the corners"),
        Continuous("light_angle", 0, 360, "degrees", period=True),
        Continuous("tilt", -25, 25, "degrees"),
        Continuous("gamma", 0.7, 1.4, "exponent"),
    )
}
COARSE = tuple(name for name, trait in CONTINUOUS.items() if trait.bins)
NAMELESS = tuple(name for name, trait in CONTINUOUS.items() if not trait.bins)

# A wave lower than this can't be told from a straight line, and has no length to be seen.
VISIBLE_WOBBLE = 1.0


def visible(trait: str, named: Mapping[str, str], values: Mapping[str, float]) -> bool:
    """Whether a picture with these traits shows a continuous trait at all."""
    hand = named["shape"] in ("drawn", "cutout")
    return {
        "stroke_width": named["line"] != "none",
        "wobble": hand,
        "density": named["ornament"] != "none",
        "spacing": named["fill"] in ("hatched", "halftone"),
        "saturation": named["palette"] != "monochrome",
        "hue": named["palette"] != "monochrome",
        "hatch_angle": named["fill"] == "hatched",
        "wavelength": hand and values["wobble"] >= VISIBLE_WOBBLE,
        "roundness": hand,
        "light_angle": named["light"] in ("side", "shadow"),
    }.get(trait, True)


def random_traits(rng: np.random.Generator) -> tuple[dict[str, str], dict[str, float]]:
    """Every trait drawn uniformly and independently: (kind of each named trait, value of each continuous one)."""
    named = {trait: list(kinds)[rng.integers(len(kinds))] for trait, kinds in NAMED.items()}
    values = {name: float(rng.uniform(trait.low, trait.high)) for name, trait in CONTINUOUS.items()}
    return named, values
