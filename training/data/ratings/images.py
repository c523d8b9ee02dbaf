"""The bytes of a source's pictures, from files, zips, Parquet and Arrow."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from prefgen.tastes.exchange import DAMAGED_ENTRY, NO_ZIP, bounded
from prefgen.tastes.stored import MAX_BYTES

from ..errors import DataError
from .rating import Key

ARROW, PARQUET = ".arrow", ".parquet"
DAMAGED = b"damaged"  # no picture's bytes: judged as broken


def key_of(root: Path, name: str) -> Key:
    """The Key of a picture that a table names, relative to the table. Its file is "" for a name that leads elsewhere:
    an absolute path, a web address, `..`, or a link to outside."""
    name = name.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or (path.parts and path.parts[0].endswith(":")):
        return Key("")
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a circle of links, a name too long
        inside = False
    return Key(path.as_posix() if inside else "")


def images_of(root: Path, keys: Iterable[Key]) -> Iterator[bytes | None]:
    """The bytes of pictures in turn; None for one that isn't there. Keys of one container are read fastest together."""
    container = None
    for key in keys:
        if not key.inner:
            yield _file(root / key.file)
            continue
        if container is None or container.file != key.file:
            container = _opened(root, key.file)
        yield container.read(key.inner)


def _file(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.stat().st_size <= MAX_BYTES else DAMAGED
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError:
        return DAMAGED


def _opened(root: Path, file: str):
    kind = {ARROW: ArrowImages, PARQUET: ParquetImages}.get(Path(file).suffix.lower(), ZipImages)
    try:
        return kind(root, file)
    except (*NO_ZIP, pa.ArrowException) as error:
        raise DataError(f"{root / file} can't be read ({error}): fetch or export it again.") from error


class ZipImages:
    """Entries of a zip by their names."""

    def __init__(self, root: Path, file: str):
        self.file = file
        self.archive = zipfile.ZipFile(root / file)

    def read(self, inner: str) -> bytes | None:
        try:
            return bounded(self.archive, self.archive.getinfo(inner))
        except DAMAGED_ENTRY:
            return DAMAGED


class ArrowImages:
    """Cells of an Arrow stream, as `datasets.save_to_disk` writes it; mapped, not read."""

    def __init__(self, root: Path, file: str):
        self.file = file
        self.table = pa.ipc.open_stream(pa.memory_map(str(root / file))).read_all()

    def read(self, inner: str) -> bytes | None:
        column, _, row = inner.rpartition(":")
        return cell_bytes(self.table[column][int(row)].as_py())


class ParquetImages:
    """Cells of a Parquet file; one row group in memory."""

    def __init__(self, root: Path, file: str):
        self.file = file
        self.parquet = pq.ParquetFile(root / file)
        self.column = ""
        self.group = -1
        self.images = None

    def read(self, inner: str) -> bytes | None:
        column, _, row = inner.rpartition(":")
        number = int(row)
        for group in range(self.parquet.num_row_groups):
            rows = self.parquet.metadata.row_group(group).num_rows
            if number < rows:
                if (group, column) != (self.group, self.column):
                    self.images = self.parquet.read_row_group(group, columns=[column])[column]
                    self.group = group
                    self.column = column
                return cell_bytes(self.images[number].as_py())
            number -= rows
        return None


def cell_bytes(cell) -> bytes | None:
    """The bytes in a cell: bytes, or the struct of `datasets`' Image; None for an empty one."""
    return cell.get("bytes") if isinstance(cell, dict) else cell
