"""A data set's folder: written once, checked by its manifest, resumed after any interruption.

Every file is written under a temporary name and renamed when whole. A note in `.work/finished/` holds its rows, bytes
and SHA-256, so a second run of the same command leaves it alone. Several processes or machines may share the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefgen.files import atomic_file, disk_full, file_sha256, is_hidden, read_text, visible_files, write_atomic

from .errors import DataError
from .schema import FORMAT_VERSION, INDEX, PICTURES

try:
    import fcntl
except ImportError:  # Windows: one process finishes a set, so don't end two parts at the same moment there
    fcntl = None

ROW_GROUP = 32  # pictures, one or two users': what is read for a few of them, and what a writer has in memory
MANIFEST = "manifest.json"
CONFIG = "config.json"
WORK = ".work"
# What `training.data.traits` adds to a finished set: it isn't in the manifest, so the set stays the same.
TRAITS = "traits"


class Store:
    """One set's folder.

    config: everything that the set's bytes depend on, as JSON values. DataError where the folder has another one's set
    or other files, or can't be written.
    """

    def __init__(self, folder: Path, config: dict):
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config))  # as it is read back
        self.work = self.folder / WORK
        record = self.folder / MANIFEST if self.done else self.work / CONFIG
        if record.exists():
            self._refuse_another(json.loads(read_text(record)))
        elif self.folder.exists() and not all(map(is_hidden, self.folder.iterdir())):
            raise DataError(f"{self.folder} holds other files: name an empty or a new folder.")
        else:
            with _explained(record):
                write_atomic(record, _json(self.config))
        if self.done:
            shutil.rmtree(self.work, ignore_errors=True)  # the run that sealed the set may have been killed right then
            self._reopen_if_files_are_gone()

    @property
    def done(self) -> bool:
        """Whether the set is finished."""
        return (self.folder / MANIFEST).exists()

    def finished(self, name: str) -> bool:
        """Whether a file is complete and noted. One that was renamed, but not yet noted, is noted now."""
        note = self._note(name)
        path = self.folder / name
        if note.exists():
            return path.exists() and path.stat().st_size == json.loads(read_text(note))["bytes"]
        if not path.exists():
            return False
        try:
            self._write_note(name)
        except pa.ArrowException:  # cut short by something else than us: it is made again
            return False
        return True

    def write(self, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
        """Stream tables to one Parquet file, a row group each. Returns its rows. Does nothing when it is finished."""
        if not self.finished(name):
            write_parquet(self.folder / name, schema, tables)
            self._write_note(name)
        return json.loads(read_text(self._note(name)))["rows"]

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one small file of the set."""
        with _explained(self.folder / name):
            write_atomic(self.folder / name, data)
        self._write_note(name)

    def write_index(self) -> None:
        """Everything but the images of all shards, with the shard and the row in it. One shard in memory at a time."""
        columns = [name for name in PICTURES.names if name != "image"]

        def tables():
            for number, path in enumerate(shards_of(self.folder)):
                shard = pq.read_table(path, columns=columns, partitioning=None)
                place = [pa.array([number] * len(shard), pa.int32()), pa.array(range(len(shard)), pa.int32())]
                yield pa.table([*shard.columns, *place], schema=INDEX)

        self.write("index.parquet", INDEX, tables())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time, on all machines that share the folder; freed when its holder ends or is killed."""
        # Not filelock's, which opens the file anew at every try: whoever finishes the set deletes it with the folder.
        with _explained(self.work / "lock"):
            self.work.mkdir(parents=True, exist_ok=True)
            file = open(self.work / "lock", "wb")
        with file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
            if self.done:
                shutil.rmtree(self.work, ignore_errors=True)

    def seal(self, versions: dict[str, str]) -> None:
        """Write the manifest, drop the notes and what killed runs left half written: the set is finished."""
        for leftover in self.folder.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        files = {}
        for note in visible_files(self.work / "finished", "*.json"):
            entry = json.loads(read_text(note))
            files[entry.pop("file")] = entry
        manifest = {"format": FORMAT_VERSION, "config": self.config, "versions": versions, "files": files}
        with _explained(self.folder / MANIFEST):
            write_atomic(self.folder / MANIFEST, _json(manifest))
        shutil.rmtree(self.work, ignore_errors=True)

    def _refuse_another(self, record: dict) -> None:
        config = record.get("config", record)
        changed = [key for key in {**config, **self.config} if config.get(key) != self.config.get(key)]
        if changed:
            there = ", ".join(f"{key}={config.get(key)} instead of {self.config.get(key)}" for key in sorted(changed))
            raise DataError(f"{self.folder} was made with another configuration ({there}): name another folder.")

    def _reopen_if_files_are_gone(self) -> None:
        """Damaged files that were deleted are made again: a set that lacks files is not finished."""
        files = json.loads(read_text(self.folder / MANIFEST))["files"]
        present = {name: entry for name, entry in files.items() if (self.folder / name).exists()}
        if len(present) == len(files):
            return
        with _explained(self.work):
            # The manifest goes last: killed before that, the next run reopens the set anew.
            write_atomic(self.work / CONFIG, _json(self.config))
            for name, entry in present.items():
                write_atomic(self._note(name), _json(entry | {"file": name}))
            (self.folder / MANIFEST).unlink()

    def _note(self, name: str) -> Path:
        return self.work / "finished" / f"{name.replace('/', '-')}.json"

    def _write_note(self, name: str) -> None:
        path = self.folder / name
        entry = {"file": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        if path.suffix == ".parquet":
            entry["rows"] = pq.read_metadata(path).num_rows
        with _explained(self._note(name)):
            write_atomic(self._note(name), _json(entry))


def shard_name(number: int) -> str:
    return f"pictures/pictures-{number:05d}.parquet"


def shards_of(folder: Path) -> list[Path]:
    """The picture shards of a set in order; what a system hides among them is none."""
    return visible_files(folder / "pictures", "*.parquet")


def images_at(folder: Path, shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bytes | None]]:
    """(place in the arguments, encoded picture) of a set's pictures by shard and row. Every row group is read once, for
    all that lie in it. DataError for a shard that is damaged or missing."""
    for shard in np.unique(shards):
        path = folder / shard_name(shard)
        inside = np.flatnonzero(shards == shard)
        try:
            with pq.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                starts = np.cumsum([0, *sizes])
                groups = np.searchsorted(starts, rows[inside], side="right") - 1
                for group in np.unique(groups):
                    images = file.read_row_group(int(group), columns=["image"])["image"]
                    for i in inside[groups == group]:
                        yield int(i), images[int(rows[i] - starts[group])].as_py()
        except (OSError, pa.ArrowException, IndexError) as error:
            raise DataError(
                f"{path} is damaged or missing: delete it and run the command that made the set again."
            ) from error


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write atomically, one row group a table. Images are stored as they are, all else compressed.

    DataError when the disk is full or not writable; no part of the file stays.
    """
    with _explained(path), atomic_file(path) as file:
        with pq.ParquetWriter(file, schema, **_options(schema)) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, len(table)))
        file.flush()
        # Before the rename: after a power cut the new name must not stand for a file that never reached the disk.
        os.fsync(file.fileno())


def _options(schema: pa.Schema) -> dict:
    """Of the Parquet writer: images are compressed already, and neither statistics nor a dictionary of them help."""
    others = [field for field in schema if field.name != "image"]
    options = {"compression": "zstd", "write_statistics": [field.name for field in others]}
    if len(others) < len(schema):
        leaves = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in others]
        options["compression"] = {"image": "none"} | dict.fromkeys(leaves, "zstd")
        options["use_dictionary"] = leaves
    return options


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write `path` into a DataError."""
    try:
        yield
    except OSError as error:
        # A quota and a limit on a file's size are mended as a full disk is.
        reason = "the disk is full" if disk_full(error) else error.strerror or str(error)
        raise DataError(
            f"Can't write {path}: {reason}. Make room there and run the same command again; finished files are kept."
        ) from error
