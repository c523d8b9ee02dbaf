"""Checksums of a taste's files, so that no file is read twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..files import file_sha256, write_atomic

FILE = ".index.json"


class Index:
    """Checksums of files by their name, size and time of change, in FILE. Disposable: what is missing is read again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.changed = False
        self.start = len(str(folder)) + 1
        try:
            rows = json.loads((folder / FILE).read_bytes())
            self.rows: dict[str, list] = rows if isinstance(rows, dict) else {}
        except (OSError, ValueError):
            self.rows = {}

    def sha256(self, path: str, status: os.stat_result, read: bool = True) -> str:
        """A file's checksum; "" where it isn't on record and `read` is False, or where it can't be read."""
        key = path[self.start :].replace(os.sep, "/")
        stamp = [status.st_size, status.st_mtime_ns]
        row = self.rows.get(key)
        if isinstance(row, list) and row[:2] == stamp and len(row) == 3 and isinstance(row[2], str):
            return row[2]
        if not read:
            return ""
        try:
            digest = file_sha256(path)
        except OSError:
            return ""
        self.rows[key] = [*stamp, digest]
        self.changed = True
        return digest

    def save(self) -> None:
        """Write what was read; nothing depends on it, so a full disk is no fault."""
        if self.changed:
            try:
                write_atomic(self.folder / FILE, json.dumps(self.rows).encode())
            except OSError:
                return
            self.changed = False
