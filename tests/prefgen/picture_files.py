"""Picture files for tests: large photos, hand-written PNGs, and what else travels in a file."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image, form, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo(width, height) -> Image.Image:
    """Soft shapes with a camera's noise."""
    rng = np.random.default_rng(width)
    soft = Image.fromarray(rng.integers(0, 256, (height // 60 + 2, width // 60 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    return Image.fromarray((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, bits, colour, row: bytes, *extra: bytes) -> bytes:
    """A PNG of one row, written by hand: Pillow writes neither 2 bits nor 16-bit colours."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return data[:33] + chunk(kind, content) + data[33:]


def broken_exif(orientation) -> bytes:
    """`Make` is a RATIONAL, which Pillow reads and can't write again."""
    tags = struct.pack("<HHHII", 2, 271, 5, 1, 38) + struct.pack("<HHIHHI", 274, 3, 1, orientation, 0, 0)
    return b"II*\0" + struct.pack("<I", 8) + tags + struct.pack("<II", 1, 2)
