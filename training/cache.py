"""Arrays that are computed once and read many times: written in pieces, so that a killed run goes on where it was.

A cache is one or several `.npy` files of equal length beside a note, NAME.json, that says what they were made of and
how far they are. Files grow at their end only, are cut to what the note vouches for, and get their names when whole.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prefgen.files import write_atomic

Columns = dict[str, tuple[tuple[int, ...], type]]


def cached(
    folder: Path,
    name: str,
    count: int,
    columns: Columns,
    key: dict,
    fill: Callable[[int, int], dict[str, np.ndarray]],
    piece: int = 64,
    writes: bool = True,
) -> dict[str, np.ndarray]:
    """{column: memory-mapped array [count, *shape]}, made by `fill(start, stop)` where it isn't there yet.

    columns: file name without suffix -> (shape of a row, dtype). key: what the rows depend on, as JSON values. writes:
    False for the processes that wait for another to fill it. SystemExit with one sentence for a cache of another key,
    and for a disk without room.
    """
    paths = {column: folder / f"{column}.npy" for column in columns}
    note = folder / f"{name}.json"
    if writes:
        _fill(name, note, paths, count, columns, key, fill, piece)
    while not (note.exists() and all(path.exists() for path in paths.values())):
        time.sleep(1)
    return {column: np.load(path, mmap_mode="r") for column, path in paths.items()}


def _fill(name, note, paths, count, columns, key, fill, piece) -> None:
    done = _done(note, key)
    parts = {column: path.with_suffix(".part") for column, path in paths.items()}
    if done == count and not any(part.exists() for part in parts.values()):
        return
    heads = {column: _header(count, *kind) for column, kind in columns.items()}
    sizes = {column: _row_bytes(*kind) for column, kind in columns.items()}
    missing, room = (count - done) * sum(sizes.values()), shutil.disk_usage(note.parent).free
    if missing > room:
        raise SystemExit(
            f"The cache {name} needs {missing / 1e9:.1f} GB more and the disk of {note.parent} has {room / 1e9:.1f} "
            "free: make room, or put --runs on another disk."
        )
    files = {column: open(part, "r+b" if part.exists() else "w+b") for column, part in parts.items()}
    try:
        for column, file in files.items():
            file.write(heads[column])
            file.truncate(len(heads[column]) + done * sizes[column])
            file.seek(0, os.SEEK_END)
        with tqdm(total=count, initial=done, desc=name, mininterval=5) as bar:
            for start in range(done, count, piece):
                stop = min(start + piece, count)
                rows = fill(start, stop)
                for column, file in files.items():
                    file.write(np.ascontiguousarray(rows[column], columns[column][1]).tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                write_atomic(note, json.dumps({"key": key, "done": stop}).encode())
                bar.update(stop - start)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise SystemExit(
            f"The cache {name} can't be written to {note.parent} ({error.strerror}): make room, and the same command "
            "goes on from there."
        ) from error
    finally:
        for file in files.values():
            file.close()
    for column, part in parts.items():
        os.replace(part, paths[column])


def _done(note: Path, key: dict) -> int:
    """How many rows of this key are there."""
    if not note.exists():
        return 0
    found = json.loads(note.read_text())
    changed = sorted(k for k in found["key"] | key if found["key"].get(k) != key.get(k))
    if changed:
        raise SystemExit(
            f"{note} was made for another {' and '.join(changed)} than this command's: use another --runs folder, or "
            f"delete {note.stem}.* there."
        )
    return found["done"]


def _header(count: int, shape: tuple[int, ...], dtype: type) -> bytes:
    head = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(head, description)
    return head.getvalue()


def _row_bytes(shape: tuple[int, ...], dtype: type) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
