"""Arrays that are computed once and read many times: written in chunks, so that a killed run goes on where it was.

A cache is one or several `.npy` files of equal length beside a note, NAME.json, that says what they were made of and
how far they are. Files grow at their end only, are cut to what the note vouches for, and get their names when complete.
They grow, and aren't mapped while they are written (numpy's open_memmap): on a full disk writing into a mapped hole
kills the process by SIGBUS, where a file's own write raises an error that can be told.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from prefgen.files import disk_full, read_text, write_atomic

Columns = dict[str, tuple[tuple[int, ...], type]]


def cached(
    folder: Path,
    name: str,
    count: int,
    columns: Columns,
    key: dict,
    fill: Callable[[int, int], dict[str, np.ndarray]],
    chunk: int = 64,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, np.ndarray]:
    """{column: memory-mapped array [count, *shape]}, made by `fill(start, stop)` where it isn't there yet.

    columns: file name without suffix -> (shape of a row, dtype). key: what the rows depend on, as JSON values. rank,
    world_size: of several processes each fills one chunk in turn, and process 0 writes them all, as one would have;
    all have to call it. SystemExit with one sentence for a cache of another key, and for a disk without room.
    """
    files = _Files(folder, name, count, columns, key)
    done = _from_first(files.begin() if rank == 0 else None, world_size)
    if done < count:
        spans = [(start, min(start + chunk, count)) for start in range(done, count, chunk)]
        bar = tqdm(total=count, initial=done, desc=name, mininterval=5, disable=rank > 0)
        with files if rank == 0 else nullcontext(), bar:
            for first in range(0, len(spans), world_size):
                turn = spans[first : first + world_size]
                own_rows = fill(*turn[rank]) if rank < len(turn) else None
                for (start, stop), rows in zip(turn, _at_first(own_rows, rank, world_size), strict=False):
                    files.append(rows, stop)
                    bar.update(stop - start)
    if rank == 0:
        files.rename()
    if world_size > 1:
        dist.barrier()
    return {column: np.load(path, mmap_mode="r") for column, path in files.paths.items()}


def digest_of(*modules: nn.Module) -> str:
    """SHA-256 of the modules' weights by name, dtype, shape and content, for the key of what they computed.

    Of every byte, since one other weight makes other rows. `prefgen.image_encoder.weights_digest` is for adapters: it
    has to be the same for the fp16 weights that ComfyUI makes of fp32 ones.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Files:
    """The arrays of one cache while they grow, and their note."""

    def __init__(self, folder: Path, name: str, count: int, columns: Columns, key: dict):
        self.name = name
        self.count = count
        self.columns = columns
        self.key = key
        self.note = folder / f"{name}.json"
        self.paths = {column: folder / f"{column}.npy" for column in columns}
        self.parts = {column: path.with_suffix(".part") for column, path in self.paths.items()}
        self.headers = {column: _header(count, *kind) for column, kind in columns.items()}
        self.row_bytes = {column: _row_bytes(*kind) for column, kind in columns.items()}

    def begin(self) -> int:
        """How many rows are there; SystemExit where the rest has no room."""
        self.done = self._vouched()
        missing = (self.count - self.done) * sum(self.row_bytes.values())
        free = shutil.disk_usage(self.note.parent).free
        if missing > free:
            raise SystemExit(
                f"The cache {self.name} needs {missing / 1e9:.1f} GB more and the disk of {self.note.parent} has "
                f"{free / 1e9:.1f} free: make room, or put --runs on another disk."
            )
        return self.done

    def __enter__(self) -> _Files:
        self.files = {column: open(part, "r+b" if part.exists() else "w+b") for column, part in self.parts.items()}
        for column, file in self.files.items():
            file.write(self.headers[column])
            # What lies behind was being written when the last run ended.
            file.truncate(self._bytes(column, self.done))
            file.seek(0, os.SEEK_END)
        return self

    def __exit__(self, _kind, error, _trace) -> None:
        for file in self.files.values():
            file.close()
        if isinstance(error, OSError) and disk_full(error):
            raise SystemExit(
                f"The cache {self.name} can't be written to {self.note.parent} ({error.strerror}): make room, and the "
                "same command goes on from there."
            ) from error

    def append(self, rows: dict[str, np.ndarray], stop: int) -> None:
        """Write the rows up to `stop`, to the disk before the note that vouches for them."""
        for column, file in self.files.items():
            _, dtype = self.columns[column]
            file.write(np.ascontiguousarray(rows[column], dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        write_atomic(self.note, json.dumps({"key": self.key, "done": stop}).encode())

    def rename(self) -> None:
        """Give the complete arrays their names."""
        for column, part in self.parts.items():
            if part.exists():
                os.replace(part, self.paths[column])

    def _vouched(self) -> int:
        """The rows that the note vouches for, none if a file has been taken away since."""
        if not self.note.exists():
            return 0
        note = json.loads(read_text(self.note))
        done = note["done"]
        changed = sorted(k for k in note["key"] | self.key if note["key"].get(k) != self.key.get(k))
        if changed:
            raise SystemExit(
                f"{self.note} was made for another {' and '.join(changed)} than this command's: use another --runs "
                f"folder, or delete {self.note.stem}.* there."
            )
        for column, part in self.parts.items():
            is_complete = done == self.count and self.paths[column].exists()
            if not is_complete and (not part.exists() or part.stat().st_size < self._bytes(column, done)):
                return 0
        return done

    def _bytes(self, column: str, rows: int) -> int:
        return len(self.headers[column]) + rows * self.row_bytes[column]


def _from_first(value, world_size: int):
    """Process 0's value, in all of them."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def _at_first(value, rank: int, world_size: int) -> list:
    """The values of all processes in process 0, none in the others."""
    if world_size == 1:
        return [value]
    values = [None] * world_size if rank == 0 else None
    dist.gather_object(value, values)
    return values or []


def _header(count: int, shape: tuple[int, ...], dtype: type) -> bytes:
    """How a .npy file of `count` rows begins."""
    header = io.BytesIO()
    description = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _row_bytes(shape: tuple[int, ...], dtype: type) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
