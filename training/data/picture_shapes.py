"""Resolution buckets (as SDXL was trained with, arXiv 2307.01952, section 2.3): pictures that aren't square keep their
proportions, and a batch has pictures of one shape.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..common.cache import cached
from .worlds import Target, World

Shape = tuple[int, int]  # height and width in pixels

# Sides are multiples of it: the VAE divides by 8, SD1.5's UNet by 8 again.
STEP = 64
# The longer side to the shorter, at most.
MOST_LONG = 2.0
SIZES_AT_ONCE = 1024


def shapes_of(pixels: int) -> list[Shape]:
    """Shapes of at most pixels² whose sides are multiples of STEP: for every shorter side the longest that there is."""
    shapes = set()
    for short in range(STEP, pixels + 1, STEP):
        long = pixels * pixels // short // STEP * STEP
        if long <= MOST_LONG * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes)


def nearest(height: int, width: int, shapes: Sequence[Shape]) -> Shape:
    """The shape whose proportions are nearest to a picture's."""
    return min(shapes, key=lambda shape: abs(np.log(shape[1] / shape[0] * height / width)))


def picture_shapes(
    world: World, targets: Mapping[int, Sequence[Target]], histories: Mapping[int, int], args, run
) -> dict[int, Shape]:
    """{picture: the shape that it is cut to} of all targets of users. histories: how many of each user are trained on.

    A shape that too few of them have pictures of can't fill a batch, and its pictures are cut to the square.
    """
    pixels = args.config.base.pixels
    numbers = np.unique([target.picture for own in targets.values() for target in own])
    sizes = _sizes(world, numbers, args.runs, run)
    shapes = shapes_of(pixels)
    assigned = {
        number: nearest(height, width, shapes) for number, (height, width) in zip(numbers.tolist(), sizes, strict=True)
    }
    having: Counter[Shape] = Counter()
    for user, own in targets.items():
        for shape in {assigned[target.picture] for target in own}:
            having[shape] += histories.get(user, 0)
    square = (pixels, pixels)
    return {number: shape if having[shape] >= args.section.batch else square for number, shape in assigned.items()}


def _sizes(world: World, numbers: np.ndarray, runs: Path, run) -> np.ndarray:
    """Heights and widths [n, 2] of pictures by their numbers, read once."""

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        return {"picture_sizes": np.array(world.sizes(numbers[start:stop]), np.int32)}

    columns = {"picture_sizes": ((2,), np.int32)}
    key = {"data": world.digest, "pictures": hashlib.sha256(numbers.tobytes()).hexdigest()}
    arrays = cached(runs, "picture_sizes", len(numbers), columns, key, fill, SIZES_AT_ONCE, run.rank, run.world_size)
    return arrays["picture_sizes"]
