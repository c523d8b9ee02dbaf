"""The one reader of pictures: for histories on the graph, for training, for published data.

A file or its bytes become uint8 [H, W, 3] as a viewer shows them: the first frame, turned as EXIF says, transparency
on white, 16 bits brought to 8. One resampler shrinks whatever is larger than a history keeps: Pillow's bicubic with
antialiasing on 8-bit values, for files and for tensors alike, so that a PNG that is read here and one that comes
through ComfyUI's Load Image become the same picture. A JPEG is decoded at a half, a quarter or an eighth of its size
first (Pillow's `draft`), at twice the size that is asked for at least: tests/prefgen/test_pictures.py states how little
that moves.
"""

from __future__ import annotations

import io
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import MendableError
from .picture_modes import as_seen, stored_depth

LONG_SIDE = 1024  # pixels; what a history keeps of a picture
DRAFT = 2  # a JPEG is decoded at this many times that size or more
# Pillow's own limit, which other packs switch off for the whole process.
MAX_PIXELS = 2 * 89_478_485
# Decoders for bytes of strangers (published data sets), where no other one is tried.
PUBLISHED = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")

# Pillow names these formats but hands them to another program (EPS to Ghostscript) or to nobody.
UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Of a camera's raw file Pillow opens the thumbnail, as a TIFF.
RAW = set(".3fr .arw .cr2 .cr3 .dng .erf .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srw .x3f".split())
# Pictures by their suffix that a Pillow without plugins can't open, or that some builds of it can't.
FOREIGN = RAW | set(".ai .avif .emf .eps .exr .hdr .heic .heif .hif .jp2 .jxl .jxr .kra .ps .svg .svgz".split())
FOREIGN |= set(".tif .tiff .webp .wmf .xcf".split())
CONVERT = "save it as PNG or JPEG, or remove it"

# EXIF 2.3, tag 274: how the stored picture is to be turned.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Keywords of the texts that may hold an orientation.
PNG_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")
# Bytes, unpacked; Pillow refuses a picture for a text or profile of more than 1 MiB.
MAX_PNG_TEXT = 1 << 19


class PictureError(MendableError, ValueError):
    """A picture that can't be read, in one sentence. name: as the sentence calls it; reason: why."""

    def __init__(self, name: str, reason: str, remedy: str = "replace or remove it"):
        super().__init__(f"The picture {name} can't be read ({reason}): {remedy}.")
        self.name = name
        self.reason = reason


def picture_formats() -> list[str]:
    """Pillow's names of the formats that it decodes itself here, plugins of other packs included."""
    Image.init()
    return [name for name in Image.ID if name in Image.OPEN and name not in UNDECODED]


def picture_suffixes() -> set[str]:
    """Suffixes, lower case, of files that are taken for pictures, those that will have to be refused by name too."""
    # MPO is a JPEG with several frames. SPIDER has no suffix; old Pillows note any that it was saved as.
    formats = {*picture_formats(), "MPO"} - {"SPIDER"}
    return FOREIGN | {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def read_picture(
    source: str | Path | bytes | BinaryIO,
    long_side: int | None = LONG_SIDE,
    name: str | None = None,
    formats: Sequence[str] | None = None,
) -> np.ndarray:
    """A picture as uint8 [H, W, 3], its longer side at most `long_side` pixels (None: as large as it is).

    source: a path, a file's bytes or an open file. name: what a sentence calls it; the default is a path's last three
    parts. formats: Pillow's names of those that may be opened; the default is all. Raises PictureError.
    """
    with open_picture(source, name, formats) as image:
        return to_pixels(image, long_side)


@contextmanager
def open_picture(
    source: str | Path | bytes | BinaryIO, name: str | None = None, formats: Sequence[str] | None = None
) -> Iterator[Image.Image]:
    """A picture whose header has been read, for `to_pixels`. Whatever Pillow raises, here or while the picture is
    decoded inside the `with`, becomes a PictureError; see `read_picture` for the arguments."""
    name = name or name_of(source)
    opened = None
    try:
        with warnings.catch_warnings():
            # Of large pictures and of odd metadata: what matters is checked here.
            warnings.simplefilter("ignore")
            opened = _stream(source)
            tried = [form for form in picture_formats() if formats is None or form in formats]
            with Image.open(_without_texts(opened), formats=tried) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(name, *_unknown(opened, source)) from error
    except Image.DecompressionBombError as error:
        raise PictureError(name, f"it says it has more than {MAX_PIXELS // 10**6} million pixels") from error
    except MemoryError as error:
        raise PictureError(name, "it needs more memory than is free", "shrink or remove it") from error
    except Exception as error:  # noqa: BLE001  Pillow's decoders raise nearly anything on damaged bytes
        raise PictureError(name, _reason(error)) from error
    finally:
        if opened is not None and opened is not source:
            opened.close()


def to_pixels(image: Image.Image, long_side: int | None = LONG_SIDE, draft: int = DRAFT) -> np.ndarray:
    """uint8 [H, W, 3] of a picture from `open_picture`, shrunk while it is decoded where its format can: to `draft`
    times what is asked for at least."""
    width, height = image.size
    drafted = None
    if long_side:
        least_width, least_height = size_within(width, height, long_side)
        drafted = image.draft(None, (draft * least_width, draft * least_height))
    depth = stored_depth(image)
    image.load()
    if not drafted:
        width, height = image.size
    # Pillow has turned a TIFF when it loaded it, though not every version then says so.
    turn = None if image.format == "TIFF" else TURNS.get(orientation_of(image))
    flat = as_seen(image, depth)
    if long_side:
        # A draft's last row and column may be the remains of a cell: what the picture covers is the box.
        flat = shrunk(flat, *size_within(width, height, long_side), drafted[1] if drafted else None)
    if turn is not None:
        flat = flat.transpose(turn)
    return np.array(flat.convert("RGB"))


def size_within(width: int, height: int, long_side: int = LONG_SIDE) -> tuple[int, int]:
    """(width, height) with the longer side brought down to `long_side`; no side below 1."""
    scale = min(1.0, long_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrunk(image: Image.Image, width: int, height: int, box: tuple | None = None) -> Image.Image:
    """The one resampler of 8-bit pictures: bicubic, antialiased (a = -0.5, as torch's with antialias=True). box: the
    part of the picture that is to be shown, in its pixels (left, top, right, bottom); the default is all."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC, box)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Nothing else of EXIF is looked at, since cameras and editors write what Pillow can't
    write again; where not even this can be read, 1."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  struct.error, ValueError, SyntaxError and more, by what is broken
        return 1
    return value if isinstance(value, int) else 1


def clean_picture(image: torch.Tensor, name: str = "picture") -> torch.Tensor:
    """As `rgb_of`, the long side brought to at most 1024 (in 8 bits, as files are)."""
    image = rgb_of(image, name)
    height, width = image.shape[:2]
    if max(height, width) > LONG_SIDE:
        pixels = Image.fromarray((image * 255).round_().to(torch.uint8).numpy())
        image = as_tensor(np.array(shrunk(pixels, *size_within(width, height))))
    return image.contiguous()


def rgb_of(image: torch.Tensor, name: str = "picture") -> torch.Tensor:
    """Any picture [H, W, C] -> float32 [H, W, 3] in 0..1 on the CPU, the input's own memory where nothing changes.

    Grey is repeated, alpha is laid on white. Raises ValueError that names the picture for NaN, infinity, a missing side
    or another number of channels.
    """
    image = image.detach().cpu().float()
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or 0 in image.shape or image.shape[-1] > 4:
        raise ValueError(
            f"The {name} has the shape {[*image.shape]}, which isn't that of a picture: [height, width, 1 to 4]."
        )
    # NaN anywhere makes both NaN, and no comparison with NaN holds.
    low, high = (float(value) for value in image.aminmax())
    if not (-float("inf") < low and high < float("inf")):
        raise ValueError(
            f"The {name} holds values that are not numbers (NaN or infinity): check the node that makes it."
        )
    if low < 0 or high > 1:
        image = image.clamp(0, 1)
    if image.shape[-1] in (2, 4):
        alpha = image[..., -1:]
        image = image[..., :-1] * alpha + (1 - alpha)
    if image.shape[-1] == 1:
        image = image.expand(-1, -1, 3)
    return image


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 in 0..1."""
    return torch.from_numpy(pixels).float().div_(255)


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic with antialiasing, [H, W, 3] in 0..1; the same size is returned as it is."""
    if image.shape[:2] == (height, width):
        return image
    moved = image.movedim(-1, 0)[None]
    return F.interpolate(moved, (height, width), mode="bicubic", antialias=True)[0].movedim(0, -1).clamp(0, 1)


def name_of(source) -> str:
    """How a sentence calls a picture: file and the two folders above it, never the machine's path."""
    if not isinstance(source, (str, Path)):
        return "that was handed over"
    file = Path(source)
    return printable(f"{file.name} in {file.parent.parent.name}/{file.parent.name}")


def printable(name: str) -> str:
    """A file's name for a message: line breaks and bytes that are no text (both are allowed in names) become `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _stream(source) -> BinaryIO:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        return source
    suffix = Path(source).suffix.lower()
    mode = Path(source).stat().st_mode
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(mode):
        raise PictureError(name_of(source), "it is a folder" if stat.S_ISDIR(mode) else "it isn't a file")
    # Registered, a pack that reads them is installed.
    if suffix in RAW and suffix not in Image.registered_extensions():
        raise PictureError(name_of(source), "it is a camera's raw file", CONVERT)
    return open(source, "rb")


def _without_texts(stream: BinaryIO) -> BinaryIO:
    """A PNG without its colour profile and its texts, but those that may hold an orientation; anything else as it is.

    Pillow unpacks them all and refuses the picture for a long or damaged one; its limits are the whole process's.
    """
    start = stream.tell()
    if stream.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        stream.seek(start)
        return stream
    dropped = False
    place = start + len(PNG_SIGNATURE)
    spans = [(start, place)]
    # A chunk is its data's length (4 bytes), its kind (4), the data and a checksum (4).
    while len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        end = place + 12 + length
        if kind == b"iCCP" or (kind in PNG_TEXTS and not _has_orientation(kind, stream.read(length))):
            dropped = True
        else:
            spans.append((place, end))
        place = end
        stream.seek(place)
    stream.seek(start)
    if not dropped:
        return stream
    data = memoryview(stream.read())
    return io.BytesIO(b"".join(data[begin - start : end - start] for begin, end in spans))


def _has_orientation(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk of a PNG may hold an orientation, and unpacks to a bounded size."""
    keyword, _, rest = text.partition(b"\0")
    if keyword not in PNG_ORIENTATION:
        return False
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(rest) < MAX_PNG_TEXT
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_PNG_TEXT)) < MAX_PNG_TEXT
    except zlib.error:
        return False


def _reason(error: Exception) -> str:
    """Why, in a few words without a path or the name of an exception."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    if "truncated" in str(error).lower():
        return "it is cut short"
    if isinstance(error, (OSError, SyntaxError, ValueError)) and str(error) and "<" not in str(error):
        return str(error).splitlines()[0][:100].rstrip(" .")
    return "its data are damaged"


def _unknown(stream: BinaryIO | None, source) -> tuple[str, str]:
    """(reason, remedy) for bytes that Pillow doesn't know: what they are instead, if their beginning tells."""
    head = b""
    if stream is not None:
        with suppress(OSError, ValueError, AttributeError):
            stream.seek(0)
            head = stream.read(512)
    suffix = Path(source).suffix.lower() if isinstance(source, (str, Path)) else ""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty", "replace or remove it"
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page", "fetch the picture itself, or remove it"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "it is HEIC, which isn't read here", CONVERT
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "it is JPEG XL, which isn't read here", CONVERT
    if b"<svg" in text:
        return "it is a drawing (SVG)", CONVERT
    if suffix in FOREIGN and suffix not in (".webp", ".tif", ".tiff", ".avif", ".jp2"):
        return f"{suffix[1:].upper()} isn't read here", CONVERT
    return "it isn't a picture", "replace or remove it"
