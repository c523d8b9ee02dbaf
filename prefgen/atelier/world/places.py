"""Settings and company, as parts. Settings lie in a picture's own coordinates (0..1), company in a unit square."""

from __future__ import annotations

import numpy as np

from .motifs import ray, star
from .shapes import Part, blob, box, oval, poly, stroke


def band(role: str, top: float, swing: float = 0.012, waves: int = 3) -> Part:
    """The ground from a gently waving line to the lower edge."""
    x = np.linspace(-0.05, 1.05, 4 * waves + 1)
    edge = [(float(a), float(top + swing * np.sin(a * waves * 2 * np.pi))) for a in x]
    return blob(role, *edge, (1.1, 1.1), (-0.1, 1.1))


def flower(x: float, y: float, role: str, r: float = 0.022) -> list[Part]:
    """A small flower whose head is at (x, y)."""
    petals = [ray(role, angle, 0.2 * r, 1.5 * r, 28, x, y) for angle in range(0, 360, 72)]
    return [stroke("leaf", 0.01, (x, y), (x + 0.004, y + 0.07)), *petals, oval("accent", x, y, 0.5 * r, detail=True)]


def front(role: str, left: float, width: float, top: float, pointed: bool) -> list[Part]:
    """One house of a street, seen from the front, with lit windows."""
    right = left + width
    roof = [poly("second", (left - 0.02, top), (left + width / 2, top - 0.1), (right + 0.02, top))] if pointed else []
    windows = [
        box("glow", left + width * column - 0.02, row, left + width * column + 0.02, row + 0.05, detail=True)
        for row in np.arange(top + 0.05, 0.72, 0.1).tolist()
        for column in (0.3, 0.7)
    ]
    return [box(role, left, top, right, 0.86), *roof, *windows]


SETTING_DRAWINGS: dict[str, list[Part]] = {
    "none": [],
    "garden": [
        *[box("light", x, 0.55, x + 0.045, 0.78) for x in np.arange(0.01, 1.0, 0.105).tolist()],
        box("light", -0.02, 0.6, 1.02, 0.635),
        oval("leaf", 0.05, 0.7, 0.16, 0.1),
        oval("leaf", 0.95, 0.71, 0.17, 0.11),
        band("leaf", 0.74),
        *flower(0.1, 0.82, "main"),
        *flower(0.24, 0.9, "accent"),
        *flower(0.9, 0.84, "second"),
        *flower(0.78, 0.91, "main"),
        *flower(0.52, 0.93, "light"),
    ],
    "shore": [
        band("second", 0.6, 0.006, 5),
        *[
            stroke("light", 0.012, (x, y), (x + 0.05, y - 0.015), (x + 0.1, y), (x + 0.15, y - 0.015))
            for x, y in ((0.05, 0.66), (0.45, 0.65), (0.78, 0.68), (0.22, 0.72), (0.62, 0.73))
        ],
        band("floor", 0.78, 0.014, 2),
        star("accent", 0.12, 0.91, 0.04),
        blob("light", (0.84, 0.93), (0.85, 0.885), (0.89, 0.87), (0.93, 0.885), (0.94, 0.93)),
    ],
    "night": [
        *[
            star("glow", x, y, r)
            for x, y, r in (
                (0.08, 0.12, 0.022), (0.22, 0.3, 0.014), (0.3, 0.08, 0.016), (0.46, 0.16, 0.012), (0.6, 0.07, 0.02),
                (0.93, 0.34, 0.016), (0.68, 0.28, 0.012), (0.1, 0.46, 0.014), (0.9, 0.52, 0.012), (0.4, 0.4, 0.01),
            )
        ],
        blob("second", (-0.1, 0.78), (0.1, 0.66), (0.3, 0.62), (0.5, 0.74), (0.75, 0.62), (1.0, 0.7), (1.1, 1.1), (-0.1, 1.1)),
        band("ink", 0.82, 0.02, 1),
    ],
    "room": [
        poly("floor", (-0.02, 0.76), (1.02, 0.76), (1.02, 1.02), (-0.02, 1.02)),
        box("light", -0.02, 0.73, 1.02, 0.77),
        box("wood", 0.06, 0.1, 0.36, 0.46),
        box("glow", 0.085, 0.125, 0.335, 0.435, detail=True),
        box("wood", 0.2, 0.125, 0.22, 0.435, detail=True),
        box("wood", 0.085, 0.27, 0.335, 0.29, detail=True),
        box("accent", 0.7, 0.38, 0.92, 0.56),
        poly("second", (0.72, 0.54), (0.79, 0.44), (0.84, 0.5), (0.87, 0.46), (0.9, 0.54), detail=True),
        oval("main", 0.5, 0.9, 0.44, 0.07),
        oval("light", 0.5, 0.9, 0.34, 0.045, detail=True),
    ],
    "street": [
        *front("second", -0.04, 0.2, 0.36, False),
        *front("main", 0.17, 0.19, 0.48, True),
        *front("floor", 0.38, 0.22, 0.4, False),
        *front("main", 0.62, 0.18, 0.5, True),
        *front("second", 0.82, 0.22, 0.38, False),
        box("light", -0.02, 0.83, 1.02, 0.87),
        poly("ink", (-0.02, 0.865), (1.02, 0.865), (1.02, 1.02), (-0.02, 1.02)),
        *[box("light", x, 0.925, x + 0.11, 0.945, detail=True) for x in (0.02, 0.24, 0.46, 0.68, 0.9)],
    ],
}  # fmt: skip

COMPANION_DRAWINGS: dict[str, list[Part]] = {
    "none": [],
    "moon": [
        blob("glow", (0.3, -0.9), (-0.36, -0.76), (-0.78, -0.1), (-0.5, 0.62), (0.2, 0.9), (0.76, 0.58), (0.16, 0.42), (-0.14, -0.06), (0.0, -0.56)),
    ],
    "cloud": [
        blob("light", (-0.9, 0.3), (-0.78, -0.12), (-0.4, -0.16), (-0.24, -0.56), (0.2, -0.6), (0.44, -0.2), (0.82, -0.12), (0.92, 0.3), (0.6, 0.48), (-0.6, 0.48)),
    ],
    "heart": [
        blob("main", (0, -0.46), (0.42, -0.82), (0.88, -0.44), (0.6, 0.24), (0, 0.88), (-0.6, 0.24), (-0.88, -0.44), (-0.42, -0.82)),
        oval("light", -0.44, -0.44, 0.12, 0.16, turn=30, detail=True),
    ],
    "bird": [
        poly("second", (0.5, 0.1), (0.98, -0.14), (0.96, 0.36)),
        blob("second", (-0.84, -0.1), (-0.5, -0.36), (0.1, -0.22), (0.62, 0.14), (0.1, 0.5), (-0.5, 0.4)),
        poly("accent", (-0.78, -0.16), (-1.0, 0.0), (-0.76, 0.1)),
        blob("main", (-0.2, 0.04), (0.1, -0.5), (0.5, -0.86), (0.44, -0.2), (0.24, 0.16)),
        oval("light", -0.54, -0.1, 0.12, detail=True),
        oval("ink", -0.56, -0.1, 0.07, detail=True),
    ],
    "butterfly": [
        blob("accent", (0, -0.1), (0.36, -0.76), (0.9, -0.72), (0.8, -0.08), (0.1, 0.06)),
        blob("accent", (0, -0.1), (-0.36, -0.76), (-0.9, -0.72), (-0.8, -0.08), (-0.1, 0.06)),
        blob("main", (0, 0.04), (0.62, 0.06), (0.66, 0.6), (0.3, 0.76)),
        blob("main", (0, 0.04), (-0.62, 0.06), (-0.66, 0.6), (-0.3, 0.76)),
        oval("light", 0.52, -0.42, 0.13, detail=True),
        oval("light", -0.52, -0.42, 0.13, detail=True),
        oval("ink", 0, 0.02, 0.09, 0.5),
        stroke("ink", 0.06, (0.02, -0.4), (0.16, -0.72), (0.3, -0.82)),
        stroke("ink", 0.06, (-0.02, -0.4), (-0.16, -0.72), (-0.3, -0.82)),
    ],
    "kite": [
        stroke("wood", 0.06, (0.1, 0.5), (-0.1, 0.7), (-0.36, 0.66), (-0.5, 0.9), (-0.8, 0.86)),
        poly("main", (0.34, -0.96), (0.86, -0.3), (0.1, 0.56), (-0.32, -0.5)),
        poly("accent", (0.34, -0.96), (0.86, -0.3), (0.27, -0.4), detail=True),
        poly("accent", (0.1, 0.56), (-0.32, -0.5), (0.27, -0.4), detail=True),
        poly("second", (-0.44, 0.6), (-0.28, 0.74), (-0.24, 0.56)),
    ],
}  # fmt: skip
