"""What one picture's bytes say: whether it is damaged or shows nothing, and what it looks like."""

from __future__ import annotations

import hashlib

import imagehash
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
HASH_BITS = 64
# Two hashes that differ in fewer bits than there are bands agree in one band at least: a search by bands misses none.
BANDS = 5
BAND_BITS = -(-HASH_BITS // BANDS)
NEAR = BANDS - 1  # bits


def look(data: bytes | None) -> tuple[str | None, int, bytes]:
    """(the picture's fault or None, perceptual hash as a signed integer of HASH_BITS, digest of the bytes).

    The hash is 0 for a picture with a fault.
    """
    data = data or b""
    fault, pixels = judge(data)
    signature = 0 if pixels is None else perceptual_hash(pixels)
    return fault, signature, hashlib.blake2b(data, digest_size=16).digest()


def judge(data: bytes) -> tuple[str | None, np.ndarray | None]:
    """(the picture's fault, None) or, for a sound one, (None, its pixels, shrunk: uint8 [H, W, 3]).

    Damage of any kind makes a picture BROKEN, and so does a decompression bomb, which its header gives away: it is
    never decoded.
    """
    try:
        with open_picture(data, formats=PUBLISHED) as image:
            if image.width * image.height > MAX_PIXELS:
                return BROKEN, None
            is_tiny = min(image.size) < MIN_SIDE
            pixels = to_pixels(image, 4 * CELLS, draft=1)  # a JPEG decodes to a fraction of its size
    except PictureError:
        return BROKEN, None
    if is_tiny:
        return TINY, None
    cells = np.asarray(Image.fromarray(pixels).resize((CELLS, CELLS), Image.Resampling.BOX))  # [CELLS, CELLS, 3]
    if cells.max() < DARK_BELOW:
        return DARK, None
    if np.ptp(cells, axis=(0, 1)).max() <= UNIFORM_BELOW:
        return UNIFORM, None
    return None, pixels


def perceptual_hash(pixels: np.ndarray) -> int:
    """imagehash's pHash of uint8 [H, W, 3] as a signed integer of HASH_BITS, which is what DuckDB compares."""
    bits = imagehash.phash(Image.fromarray(pixels)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)
