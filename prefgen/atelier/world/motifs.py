"""Small things that several drawings are made with."""

from __future__ import annotations

import numpy as np

from .shapes import Part, blob, oval, poly, rotation, stroke


def eye(x: float, y: float, r: float) -> list[Part]:
    """A white eye with a pupil."""
    return [
        oval("light", x, y, r, detail=True),
        oval("ink", x, y + 0.1 * r, 0.58 * r, detail=True),
        oval("light", x - 0.2 * r, y - 0.15 * r, 0.2 * r, detail=True),
    ]


def pupil(x: float, y: float, r: float) -> Part:
    return oval("ink", x, y, r, detail=True)


def ray(role: str, angle: float, inner: float, outer: float, spread: float, x: float = 0, y: float = 0) -> Part:
    """A petal or flame around (x, y): angle and half width in degrees, radii inner and outer."""
    turn = np.deg2rad(angle)
    half = np.deg2rad(spread)
    middle = (inner + outer) / 2

    def at(radius: float, offset: float) -> tuple[float, float]:
        return x + radius * np.cos(turn + offset), y + radius * np.sin(turn + offset)

    return blob(role, at(inner, 0), at(middle, -half), at(outer, 0), at(middle, half))


def sail(turn: float, x: float, y: float) -> list[Part]:
    """A windmill's sail around (x, y): a spar with a lattice on one side of it."""

    def placed(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [tuple(point) for point in np.array(points) @ rotation(turn) + np.array([x, y])]

    return [
        poly("light", *placed((0.16, 0.02), (0.84, 0.02), (0.84, 0.22), (0.16, 0.22))),
        *[stroke("wood", 0.03, *placed((at, 0.02), (at, 0.22)), detail=True) for at in (0.33, 0.5, 0.67)],
        stroke("wood", 0.06, *placed((0, 0), (0.86, 0))),
    ]


def star(role: str, x: float, y: float, r: float) -> Part:
    """A star with five points."""
    angles = np.arange(10) * np.pi / 5
    reach = np.array([r, 0.42 * r] * 5)
    return poly(role, *zip((x + reach * np.sin(angles)).tolist(), (y - reach * np.cos(angles)).tolist(), strict=True))
