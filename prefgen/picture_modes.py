"""Pictures of any of Pillow's modes as they are seen: 8 bits, transparency on white.

Pillow's own conversions cut deep grey at 255 and drop transparency. What a PNG or TIFF stores is needed beside the
mode, because some depths share one.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# TIFF 6.0's tags and the values that matter here.
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262
WHITE_IS_ZERO = 0
SAMPLE_FORMAT = 339
UNSIGNED = 1

# Bits of a value by Pillow's name of how a PNG's values lie in the file; 8 for every other name.
PNG_BITS = {"1": 1, "L;2": 2, "L;4": 4, "I;16B": 16, "RGB;16B": 16, "LA;16B": 16, "RGBA;16B": 16}


def as_seen(image: Image.Image, depth: int | None = None) -> Image.Image:
    """A loaded picture as L or RGB of 8 bits: transparency on white, deep grey brought to 8 bits.

    depth: bits of a PNG's or TIFF's grey or colour values as stored, where Pillow's mode doesn't tell. Raises
    ValueError for values whose white nobody knows.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image, depth)
    if image.mode == "LAB":
        return _from_lab(image)
    clear = image.info.get("transparency")
    if image.mode in ("1", "L", "RGB"):
        flat = image if image.mode == "RGB" else image.convert("L")
        return flat if clear is None else _keyed(flat, clear, depth)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if clear is not None or palette.endswith("A") or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return _on_white(image if image.mode == "RGBA" else image.convert("RGBA"))
    return image.convert("RGB")


def stored_depth(image: Image.Image) -> int | None:
    """Bits of a grey or colour value as the file holds it, where that differs from what Pillow's mode says."""
    if image.format == "PNG":
        layout = image.tile[0][3] if image.tile else None
        return PNG_BITS.get(layout if isinstance(layout, str) else (layout or [None])[0], 8)
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS_PER_SAMPLE, 1)
        return bits[0] if isinstance(bits, tuple) else bits
    return None


def _on_white(image: Image.Image) -> Image.Image:
    """RGBA laid on white; colours as they are where nothing is transparent."""
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    sheet = Image.new("RGB", image.size, "white")
    sheet.paste(image, mask=image)
    return sheet


def _keyed(image: Image.Image, clear, depth: int | None) -> Image.Image:
    """L or RGB with one colour that stands for nothing (PNG's tRNS), which becomes white."""
    key = np.atleast_1d(np.array([*clear] if isinstance(clear, (bytes, tuple, list)) else clear, np.int64))
    if depth in (2, 4):
        # Pillow spreads the pixels over 0..255, but not the key.
        key = key * (255 // (2**depth - 1))
    elif depth == 16:
        # Pillow keeps the upper 8 bits of 16-bit colours.
        key = key >> 8
    pixels = np.array(image)
    transparent = pixels == key[0] if pixels.ndim == 2 else (pixels == key).all(-1)
    pixels[transparent] = 255
    return Image.fromarray(pixels)


def _grey(image: Image.Image, depth: int | None) -> Image.Image:
    """Modes I, I;16 and F as L. Raises ValueError where a picture's white can't be known."""
    values = np.array(image)
    clear = image.info.get("transparency")
    transparent = values == clear if isinstance(clear, int) else None
    if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == UNSIGNED:
        values = values.view(np.uint32)
    white = _white(image, values, depth)
    grey = np.empty(values.shape, np.uint8)
    # In bands, so that the wide intermediate stays small.
    for top in range(0, len(values), 64):
        band = values[top : top + 64].astype(np.float64) * (255 / white)
        grey[top : top + 64] = np.rint(band.clip(0, 255))
    # Pillow inverts such a TIFF of 8 bits alone.
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if transparent is not None:
        grey[transparent] = 255
    return Image.fromarray(grey)


def _white(image: Image.Image, values: np.ndarray, depth: int | None) -> float:
    """The value that is white. Raises ValueError where it can't be known."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 4095 if depth == 12 else 65535
    if image.mode == "I":
        # 32-bit files are mostly narrower values that were never converted: the narrowest of 8, 16 and all bits.
        high = int(values.max())
        return next((white for white in (255, 65535) if high <= white), np.iinfo(values.dtype).max)
    return _white_of_floats(values)


def _white_of_floats(values: np.ndarray) -> float:
    """1, 255 or 65535, as far as the values tell. Raises ValueError where they don't."""
    high = float(values.max())
    # A little beyond 1 they may be light above white (HDR), or the dark end of 0 to 255.
    if not np.isfinite(values).all() or 1 < high < 16 or high > 65536:
        raise ValueError(f"its values reach {high:.3g}, so what is white can't be known; save it with 8 or 16 bits")
    if high <= 1:
        return 1.0
    return 255.0 if high < 512 else 65535.0


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # not in every build of Pillow

    return ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
