"""Text files as people save them: UTF-8 with and without a mark, UTF-16 of Windows, and its older code page."""

from __future__ import annotations

import codecs
from pathlib import Path

# UTF-32's mark begins with UTF-16's, so it is looked for first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decoded(data: bytes) -> str:
    """The text of a file's bytes. Without a mark: UTF-16 where half of the bytes are zeros, UTF-8 where that fits, else
    Windows-1252, the code page of western Windows. What fits nothing is replaced by U+FFFD, so this never raises."""
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        even, odd = data[::2].count(0), data[1::2].count(0)
        encoding = "utf-16-le" if odd > even else "utf-16-be"
    if encoding is None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            encoding = "cp1252"
    return data.decode(encoding, errors="replace")


def read_text(path: Path) -> str:
    """The text of a file, as `decoded` has it. OSError for one that can't be read."""
    return decoded(path.read_bytes())
