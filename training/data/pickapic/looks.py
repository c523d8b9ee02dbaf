"""What can be told from one picture's bytes, and which pictures are nearly the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from prefgen.pictures import PUBLISHED, PictureError, open_picture, to_pixels

BROKEN, TINY, DARK, UNIFORM = "broken", "tiny", "near-black", "near-uniform"
FAULTS = (BROKEN, TINY, DARK, UNIFORM)
MAX_PIXELS = 64 << 20  # more is a decompression bomb: published pictures have at most 1024 x 1024
MIN_SIDE = 64  # pixels; published pictures have 512 or more
CELLS = 32  # a picture is judged by the means of 32 x 32 cells
DARK_BELOW = 16  # of 255: no cell is brighter
UNIFORM_BELOW = 8  # of 255: no two cells are further apart, in any channel
HASH_BITS, BANDS = 64, 5
BAND_BITS = -(-HASH_BITS // BANDS)
NEAR = BANDS - 1  # bits; two hashes so near agree in one band at least, so banding misses none


def _low_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the HASH_BITS lowest frequencies of a DCT, without the mean."""
    order = sorted((i + j, i, j) for i in range(CELLS) for j in range(CELLS))[1 : HASH_BITS + 1]
    return np.array([i for _, i, _ in order]), np.array([j for *_, j in order])


LOW = _low_frequencies()
DCT = np.cos(np.pi / CELLS * np.outer(np.arange(CELLS), np.arange(CELLS) + 0.5))


def look(data: bytes | None) -> tuple[str | None, int, bytes]:
    """(the picture's fault or None, perceptual hash of HASH_BITS as a signed integer, digest of the bytes).

    The hash is 0 for a picture with a fault. Damage of any kind makes a picture BROKEN, and so does a decompression
    bomb, which is told from its header and never decoded.
    """
    digest = hashlib.blake2b(data or b"", digest_size=16).digest()
    try:
        with open_picture(data or b"", formats=PUBLISHED) as image:
            if image.width * image.height > MAX_PIXELS:
                return BROKEN, 0, digest
            small = min(image.size) < MIN_SIDE
            pixels = to_pixels(image, 4 * CELLS, draft=1)  # a JPEG decodes to a fraction of its size
    except PictureError:
        return BROKEN, 0, digest
    if small:
        return TINY, 0, digest
    cells = np.asarray(Image.fromarray(pixels).resize((CELLS, CELLS), Image.Resampling.BOX))  # [CELLS, CELLS, 3]
    if cells.max() < DARK_BELOW:
        return DARK, 0, digest
    if (cells.max((0, 1)).astype(int) - cells.min((0, 1))).max() <= UNIFORM_BELOW:
        return UNIFORM, 0, digest
    return None, perceptual_hash(cells), digest


def perceptual_hash(cells: np.ndarray) -> int:
    """Signs of the low frequencies of the luminance against their median. cells: [CELLS, CELLS, 3], 0..255."""
    grey = cells @ np.array([0.299, 0.587, 0.114])
    low = (DCT @ grey @ DCT.T)[LOW]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big", signed=True)


def clusters(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """{member: the smallest of its cluster} for everything that a chain of pairs joins, without the smallest."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while (up := parent.get(x, x)) != x:
            parent[x] = parent.get(up, up)
            x = up
        return x

    for a, b in pairs:
        a, b = sorted((root(a), root(b)))
        parent[a], parent[b] = a, a
    return {x: root(x) for x in sorted(parent) if root(x) != x}
