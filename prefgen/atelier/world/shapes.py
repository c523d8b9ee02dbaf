"""The parts that drawings are made of, and their outlines.

A drawing is a list of parts in a unit square (-1..1, x to the right, y down), back to front. Every outline has two
forms, one with corners and one without; the continuous trait `roundness` blends them. So one drawing serves every hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Point = tuple[float, float]

CURVE_STEPS = 8  # points on a curve between two of its control points


@dataclass(frozen=True)
class Part:
    """One part of a drawing.

    role: a colour of the palette. corners [n, 2]: the outline with straight sides; curve [n * CURVE_STEPS, 2]: the same
    without corners, point i * CURVE_STEPS beside corner i. closed: filled; else a stroke of `width`. detail: small and
    inside another part, so it gets neither an outline nor a shadow of its own.
    """

    role: str
    corners: np.ndarray
    curve: np.ndarray
    closed: bool = True
    width: float = 0.0
    detail: bool = False


def blob(role: str, *points: Point, detail: bool = False) -> Part:
    """A closed shape that is smooth by nature: a spline through the points."""
    corners = np.array(points, float)
    return Part(role, corners, spline(corners, closed=True), detail=detail)


def poly(role: str, *points: Point, detail: bool = False) -> Part:
    """A closed shape that has corners by nature: without them, they are rounded and its sides stay straight."""
    corners = np.array(points, float)
    return Part(role, corners, rounded(corners), detail=detail)


def box(role: str, left: float, top: float, right: float, bottom: float, detail: bool = False) -> Part:
    """A rectangle."""
    return poly(role, (left, top), (right, top), (right, bottom), (left, bottom), detail=detail)


def oval(role: str, x: float, y: float, rx: float, ry: float | None = None, turn: float = 0, detail=False) -> Part:
    """An ellipse around (x, y), turned by `turn` degrees; with corners, an octagon."""
    angle = np.arange(8) * np.pi / 4 + np.pi / 8
    points = np.stack([rx * np.cos(angle), (rx if ry is None else ry) * np.sin(angle)], 1)
    corners = points @ rotation(turn) + np.array([x, y])
    return Part(role, corners, spline(corners, closed=True), detail=detail)


def stroke(role: str, width: float, *points: Point, detail: bool = False) -> Part:
    """A curved line through the points."""
    corners = np.array(points, float)
    return Part(role, corners, spline(corners, closed=False), closed=False, width=width, detail=detail)


def rotation(degrees: float) -> np.ndarray:
    """[2, 2]: `points @ rotation(d)` turns points [n, 2] clockwise on the screen."""
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def spline(points: np.ndarray, closed: bool) -> np.ndarray:
    """Catmull-Rom spline through points [n, 2], CURVE_STEPS points for each of its n (closed) or n - 1 spans."""
    if closed:
        before, start, end, after = (np.roll(points, shift, 0) for shift in (1, 0, -1, -2))
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
        before, start, end, after = (padded[shift : len(points) - 1 + shift] for shift in range(4))
    t = (np.arange(CURVE_STEPS) / CURVE_STEPS)[None, :, None]
    before, start, end, after = (each[:, None] for each in (before, start, end, after))
    cubic = 3 * start - before - 3 * end + after
    square = 2 * before - 5 * start + 4 * end - after
    curve = (start + 0.5 * t * (end - before + t * (square + t * cubic))).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


def rounded(points: np.ndarray, share: float = 0.42) -> np.ndarray:
    """A closed polygon [n, 2] whose corners are quadratic curves over `share` of the shorter side beside them.

    Row i * CURVE_STEPS + CURVE_STEPS / 2 lies at corner i.
    """
    before = np.roll(points, 1, 0) - points
    after = np.roll(points, -1, 0) - points
    reach = share * np.minimum(np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1))[:, None]
    start = points + before / np.linalg.norm(before, axis=1, keepdims=True) * reach
    end = points + after / np.linalg.norm(after, axis=1, keepdims=True) * reach
    t = (np.arange(CURVE_STEPS) / (CURVE_STEPS - 1))[None, :, None]
    curve = (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * points[:, None] + t**2 * end[:, None]
    return curve.reshape(-1, 2)


def outline(part: Part, roundness: float) -> np.ndarray:
    """The outline [n, 2] between a part's two forms: 0 has all its corners, 1 none."""
    if roundness >= 1:
        return part.curve
    count = len(part.curve)
    if not part.closed:
        place = np.arange(count) / CURVE_STEPS
        straight = _between(part.corners, place)
    elif len(part.corners) * CURVE_STEPS == count and np.allclose(part.curve[::CURVE_STEPS], part.corners):
        straight = _between(np.concatenate([part.corners, part.corners[:1]]), np.arange(count) / CURVE_STEPS)
    else:  # rounded corners: all points of a corner's curve come from the corner itself
        straight = np.repeat(part.corners, CURVE_STEPS, 0)
    return straight + (part.curve - straight) * roundness


def _between(points: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Points at fractional places of a polyline."""
    first = np.minimum(place.astype(int), len(points) - 2)
    return points[first] + (points[first + 1] - points[first]) * (place - first)[:, None]


def wobbled(points: np.ndarray, closed: bool, height: float, wavelength: float, phase: float) -> np.ndarray:
    """A trembling hand: waves across an outline, `height` and `wavelength` in the outline's own units."""
    path = np.concatenate([points, points[:1]]) if closed else points
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    length = along[-1]
    if height <= 0 or length < wavelength:
        return points
    waves = max(2, round(length / wavelength))
    place = np.linspace(0, length, waves * 10, endpoint=not closed)
    even = np.stack([np.interp(place, along, path[:, axis]) for axis in (0, 1)], 1)
    tangent = np.roll(even, -1, 0) - np.roll(even, 1, 0) if closed else np.gradient(even, axis=0)
    normal = np.stack([tangent[:, 1], -tangent[:, 0]], 1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    return even + normal * height * np.sin(place / length * waves * 2 * np.pi + phase)[:, None]


def shaded_half(points: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The part of a closed outline [n, 2] on the far side of its middle, seen from `direction` [2]."""
    side = (points - (points.min(0) + points.max(0)) / 2) @ direction
    half = []
    for i in range(len(points)):
        j = (i + 1) % len(points)
        if side[i] >= 0:
            half.append(points[i])
        if side[i] * side[j] < 0:
            half.append(points[i] + (points[j] - points[i]) * side[i] / (side[i] - side[j]))
    return np.array(half)
