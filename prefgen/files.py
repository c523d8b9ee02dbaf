"""Files of people's: written so that nothing is ever half written, listed without what a system hides, read as text."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import MendableError

# What systems leave in folders besides names that begin with a dot, in lower case: Windows, macOS, Synology.
SYSTEM_NAMES = {
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
}
WINDOWS_ATTRIBUTES = stat.FILE_ATTRIBUTE_HIDDEN | stat.FILE_ATTRIBUTE_SYSTEM
# UTF-32's begins like UTF-16's, so it is looked for first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "file size limit",
}

# Bytes of a safetensors file's header; safetensors reads no larger one.
LARGEST_HEADER = 100_000_000


class TextError(MendableError, ValueError):
    """A file that can't be read as text: one sentence."""


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is hidden or the system's own, by its own name (not its parents') and, on Windows, by
    its attributes: `._photo.jpg`, `.ipynb_checkpoints`, `Thumbs.db`, `__MACOSX`."""
    path = Path(path)
    if is_hidden_name(path.name):
        return True
    if not hasattr(os.stat_result, "st_file_attributes"):
        return False
    try:
        return bool(path.stat().st_file_attributes & WINDOWS_ATTRIBUTES)  # type: ignore[attr-defined]
    except OSError:
        return False


def is_hidden_name(name: str) -> bool:
    """Whether a name says that a file is hidden or the system's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder (or below it, with `**/`) that match a pattern, sorted, without what is hidden there or lies
    in a hidden folder below it. Empty where there is no such folder."""
    folder = Path(folder)

    def shown(path: Path) -> bool:
        below = path.relative_to(folder).parts
        return not any(is_hidden(folder.joinpath(*below[: i + 1])) for i in range(len(below)))

    return sorted(path for path in folder.glob(pattern) if shown(path) and path.is_file())


def read_text(path: str | os.PathLike) -> str:
    """A text file that anybody's editor may have saved: UTF-8 with or without a byte order mark, UTF-16 or UTF-32 with
    one. Ends of lines become "\n".

    TextError (a ValueError) with one sentence for any other encoding, OSError where the file can't be opened.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode(marked_encoding(data) or "utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} isn't UTF-8 text: open it in an editor and save it as UTF-8.") from error
    # UTF-16 without its mark reads as UTF-8 with a zero after every letter.
    if "\0" in text:
        raise TextError(f"{path} isn't UTF-8 text: open it in an editor and save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def guessed_text(data: bytes) -> str:
    """The text of a file's bytes where a wrong letter does no harm, as in a prompt. Without a mark: UTF-16 where half
    of the bytes are zeros, UTF-8 where that fits, else Windows-1252, the code page of western Windows. What fits
    nothing is replaced by U+FFFD, so this never raises."""
    encoding = marked_encoding(data)
    if encoding is None and b"\0" in data:
        # The zeros are the high bytes of Latin letters, and big endian puts them first.
        big_endian = data[::2].count(0) >= data[1::2].count(0)
        encoding = "utf-16-be" if big_endian else "utf-16-le"
    if encoding is None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            encoding = "cp1252"
    return data.decode(encoding, errors="replace")


def whole_letters(text: str) -> str:
    """A text with "?" for half a letter (a lone surrogate), which JSON may hold and no file, zip or tokenizer takes."""
    return text.encode(errors="replace").decode()


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark tells, None without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write, under a temporary name beside `path` that is renamed at the end: a reader sees the old file or
    the complete new one.

    Missing folders are made. Whatever stops it, the old file stays and the temporary one goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False, suffix=".tmp") as file:
        try:
            yield file
            file.close()
            # A temporary file is its owner's alone.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            # On a full disk what is still in memory can't be written either.
            with suppress(OSError):
                file.close()
            os.unlink(file.name)
            raise


def file_state(path: str | os.PathLike) -> tuple[int, int, int, int]:
    """(bytes, time of change in ns, number of the file, time of its entry's change in ns), of a link's target: differs
    for a file that was replaced, also by one of equal size and time. Raises OSError where there is none."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def disk_full(error: BaseException | None) -> str | None:
    """Why nothing more can be written, or None for any other error, also where the cause hides behind others: torch
    raises a RuntimeError of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return DISK_FULL[error.errno]
        error = error.__cause__ or error.__context__
    return None


def reason_of(error: OSError) -> str:
    """Why a file or folder couldn't be used, in words without the path that an OSError's own end in."""
    return disk_full(error) or (error.strerror or "damaged").lower()


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal, without holding all of it in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def safetensors_header(path: str | os.PathLike) -> tuple[dict[str, dict], dict]:
    """({name of a tensor: {"dtype", "shape", "data_offsets"}}, metadata) of a safetensors file, without its weights.

    By our own reading, since safetensors opens no file with a dtype that it doesn't know. Raises ValueError for a
    header that is broken or of a file of another size, OSError where it can't be read.
    """
    # The file begins with its header's length (8 bytes) and the header in JSON; the tensors fill all the rest.
    path = Path(path)
    length = path.stat().st_size
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        text = stream.read(size) if size <= min(length - 8, LARGEST_HEADER) else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if any(math.prod(entry["shape"]) < 0 for entry in header.values()) or 8 + size + end != length:
            raise ValueError("another size than the file's")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a broken header ({error})") from error
    return header, metadata if isinstance(metadata, dict) else {}
