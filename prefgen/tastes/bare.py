"""A picture's file without what it says of people and places: EXIF, GPS, XMP, comments, prompts. Its pixels stay.

Nothing is encoded anew: blocks of the file are left out. Colour profiles and a JPEG's orientation stay, since without
them the picture would look different. Formats whose blocks aren't known here are saved again as PNG, without loss.
"""

from __future__ import annotations

import io
import struct

from PIL import Image

from ..pictures import open_picture, orientation_of

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PRIVATE = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"caBX"}  # caBX: content credentials
JPEG_KEPT = {0xE0, 0xE2, 0xEE}  # JFIF, the colour profile, and Adobe's note on how colours are stored
WEBP_PRIVATE = {b"EXIF", b"XMP "}
WEBP_FLAGS = 0x08 | 0x04  # of VP8X: that there is EXIF, that there is XMP


def bare(data: bytes, name: str = "picture") -> tuple[bytes, str]:
    """(the file without metadata, its suffix). Raises PictureError for what isn't a picture."""
    with open_picture(data, name) as image:
        form = image.format
        turn = orientation_of(image)
    if form == "PNG" and data.startswith(PNG):
        return _png(data, turn), ".png"
    if form in ("JPEG", "MPO") and data.startswith(b"\xff\xd8"):
        return _jpeg(data, turn), ".jpg"
    if form == "WEBP":
        return _webp(data, turn), ".webp"
    with open_picture(data, name) as image:
        image.load()
        saved = io.BytesIO()
        image.convert("RGBA" if "A" in image.getbands() else "RGB").save(saved, "PNG")
    return saved.getvalue(), ".png"


def orientation_exif(turn: int) -> bytes:
    """EXIF that says the orientation and nothing else."""
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


def _png(data: bytes, turn: int) -> bytes:
    out = io.BytesIO()
    out.write(PNG)
    place = len(PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind == b"IDAT" and turn != 1:
            body = orientation_exif(turn).removeprefix(b"Exif\0\0")
            out.write(_png_chunk(b"eXIf", body))
            turn = 1
        if kind not in PNG_PRIVATE:
            out.write(data[place:end])
        place = end
        if kind == b"IEND":
            break
    return out.getvalue()


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _jpeg(data: bytes, turn: int) -> bytes:
    out = io.BytesIO()
    out.write(b"\xff\xd8")
    if turn != 1:
        body = orientation_exif(turn)
        out.write(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding before a marker
            place += 1
            continue
        if marker == 0xDA:  # the picture itself; nothing of a second frame behind it
            end = data.rfind(b"\xff\xd9") + 2 if _frames(data) == 1 else _end_of_frame(data, place)
            out.write(data[place:end])
            break
        (length,) = struct.unpack_from(">H", data, place + 2)
        private = 0xE0 <= marker <= 0xEF and marker not in JPEG_KEPT or marker == 0xFE
        if not private and not (marker == 0xE2 and data[place + 4 : place + 8] == b"MPF\0"):
            out.write(data[place : place + 2 + length])
        place += 2 + length
    return out.getvalue()


def _frames(data: bytes) -> int:
    with open_picture(data) as image:
        return getattr(image, "n_frames", 1)


def _end_of_frame(data: bytes, place: int) -> int:
    """Where the first frame's entropy-coded data ends: at the first marker that isn't a restart or an escaped byte."""
    while place + 1 < len(data):
        if data[place] == 0xFF and data[place + 1] == 0xD9:
            return place + 2
        place += 1
    return len(data)


def _webp(data: bytes, turn: int) -> bytes:
    chunks = []
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        body = data[place + 8 : place + 8 + length]
        if kind == b"VP8X":
            flags = body[0] & ~WEBP_FLAGS | (0x08 if turn != 1 else 0)
            body = bytes([flags]) + body[1:]
        if kind not in WEBP_PRIVATE:
            chunks.append((kind, body))
        place += 8 + length + length % 2
    if turn != 1 and any(kind == b"VP8X" for kind, _ in chunks):
        chunks.append((b"EXIF", orientation_exif(turn)))
    packed = b"".join(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in chunks)
    return b"RIFF" + struct.pack("<I", len(packed) + 4) + b"WEBP" + packed
