"""Checksums of pictures in ComfyUI's folders, each file read once while this process runs."""

from __future__ import annotations

from pathlib import Path

from ..files import file_sha256, file_state
from ..lru import LeastRecentlyUsed

REMEMBERED = 10_000
_checksums: LeastRecentlyUsed = LeastRecentlyUsed(REMEMBERED)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. OSError where it can't be read."""
    key = (str(path), file_state(path))
    if key not in _checksums:
        _checksums[key] = file_sha256(path)
    return _checksums[key]
