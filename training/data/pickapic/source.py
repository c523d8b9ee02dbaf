"""Pick-a-Pic's Parquet as published: listed, checked against the published columns, streamed.

Columns: README of yuvalkirstain/pickapic_v1, _v2 and _v2_no_images. A row is one choice between two pictures; the
no-images variant lacks jpg_0 and jpg_1. A row's number counts through all files in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from prefgen.files import is_hidden

from ..errors import DataError

BATCH = 65_536  # rows read at once
IMAGE_BATCH = 32  # rows read at once with their pictures


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings, perhaps in a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


COLUMNS = {  # of the published ones those that a rule needs: (what it must be, in words; whether a type is that)
    "user_id": ("whole numbers", pa.types.is_integer),
    "caption": ("strings", is_text),
    "image_0_uid": ("strings", is_text),
    "image_1_uid": ("strings", is_text),
    "best_image_uid": ("strings", is_text),
    "label_0": ("floating-point numbers", pa.types.is_floating),
    "label_1": ("floating-point numbers", pa.types.is_floating),
    "has_label": ("booleans", pa.types.is_boolean),
    "are_different": ("booleans", pa.types.is_boolean),
    "created_at": ("timestamps", pa.types.is_timestamp),
}
IMAGE_COLUMNS = {"jpg_0": ("bytes", is_bytes), "jpg_1": ("bytes", is_bytes)}
CHOICES = pa.schema(
    [
        ("number", pa.int64()),
        ("user_id", pa.int64()),
        *((name, pa.string()) for name in ("caption", "image_0_uid", "image_1_uid", "best_image_uid")),
        *((name, pa.float64()) for name in ("label_0", "label_1")),
        *((name, pa.bool_()) for name in ("has_label", "are_different")),
        ("created_at", pa.int64()),  # microseconds since 1970
        ("unreadable", pa.bool_()),  # a text isn't UTF-8; it is null then
    ]
)


@dataclass(frozen=True)
class Unit:
    """Consecutive row groups of one file: what one job reads, and what becomes one shard."""

    file: str
    groups: tuple[int, ...]
    start: int  # number of its first row
    rows: int


@dataclass(frozen=True)
class Source:
    """A folder of Parquet files, local or behind fsspec. Small and picklable: workers open the files themselves."""

    url: str
    files: tuple[str, ...]  # relative to the folder
    rows: tuple[int, ...]
    images: bool
    units: tuple[Unit, ...]
    digest: str  # of the files' names, bytes and rows

    def choices(self) -> Iterator[pa.Table]:
        """All rows as tables of CHOICES."""
        number = 0
        for file in self.files:
            with opened(self.url, file) as parquet:
                for batch in parquet.iter_batches(BATCH, columns=list(COLUMNS)):
                    yield _as_choices(batch, number, file)
                    number += len(batch)

    def pictures(self, unit: Unit, places: np.ndarray) -> Iterator[bytes | None]:
        """The bytes of one unit's pictures at these places (2 * row + side), sorted and unique; None where null."""
        remaining = places.tolist()[::-1]
        start = unit.start
        with opened(self.url, unit.file) as parquet:
            for batch in parquet.iter_batches(IMAGE_BATCH, row_groups=list(unit.groups), columns=list(IMAGE_COLUMNS)):
                sides = [batch.column(name) for name in IMAGE_COLUMNS]
                while remaining and remaining[-1] < 2 * (start + len(batch)):
                    row, side = divmod(remaining.pop(), 2)
                    yield sides[side][row - start].as_py()
                start += len(batch)


def find(url: str, pattern: str, unit_bytes: int) -> Source:
    """The files below a folder that match a pattern, or the one file `url`. unit_bytes: about what a Unit holds.

    DataError: no such folder, no such file in it, a file that is cut short, lacks a column or has one of another type.
    """
    try:
        system, path = _filesystem(url)
        if system.isfile(path):
            files = [PurePosixPath(path).name]
            url = url.rpartition("/")[0] if "://" in url and not Path(url).exists() else str(Path(url).parent)
        else:
            files = _files_below(system, path.rstrip("/"), pattern)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"Can't read {url}: {error}.") from error
    if not files:
        raise DataError(f"{url} has no file {pattern}: name the folder that holds Pick-a-Pic's Parquet files.")
    units: list[Unit] = []
    listed = []  # [file, bytes, rows]
    images = None
    for file in files:
        with opened(url, file) as parquet:
            has_images = _has_images(_schema(parquet, file), file)
            metadata = parquet.metadata
        if images is not None and images != has_images:
            raise DataError(f"{file} has {'' if has_images else 'no '}pictures, unlike {files[0]}: read them apart.")
        images = has_images
        units += _units(metadata, file, sum(rows for *_, rows in listed), unit_bytes)
        listed.append([file, _size(url, file), metadata.num_rows])
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return Source(url, tuple(files), tuple(rows for *_, rows in listed), bool(images), tuple(units), digest)


def _files_below(system: AbstractFileSystem, root: str, pattern: str) -> list[str]:
    """Names of the files that match, relative to the root, without what is hidden or the system's own."""
    below = [path[len(root) :].lstrip("/") for path in sorted(system.glob(f"{escape(root)}/{pattern}"))]
    return [file for file in below if not _is_hidden_below(root, file)]


def _is_hidden_below(root: str, file: str) -> bool:
    """Whether a file, or a folder between it and the root, is hidden or the system's own."""
    parts = PurePosixPath(file).parts
    return any(is_hidden(Path(root, *parts[: i + 1])) for i in range(len(parts)))


def _size(url: str, file: str) -> int:
    system, folder = _filesystem(url)
    return system.size(f"{folder.rstrip('/')}/{file}")


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """(fsspec's file system, path in it). What lies on this machine is no URL, whatever signs its name has."""
    if Path(url).exists():
        return LocalFileSystem(), Path(url).absolute().as_posix()
    return url_to_fs(url)


@contextmanager
def opened(url: str, file: str) -> Iterator[pq.ParquetFile]:
    """One file, read in small pieces. DataError when it can't be read, now or on the way."""
    try:
        system, folder = _filesystem(url)
        with system.open(f"{folder.rstrip('/')}/{file}", "rb") as stream:
            with pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False) as parquet:
                yield parquet
    except MemoryError as error:  # Arrow's is one too
        raise DataError(
            f"The memory is full while {file} in {url} is read: close other programs, or take fewer --processes."
        ) from error
    except pa.ArrowNotImplementedError as error:
        raise DataError(
            f"{file} in {url} is written in a way that pyarrow {pa.__version__} can't read ({_reason(error)}): update "
            "pyarrow, or write the file anew."
        ) from error
    except OSError as error:
        if error.errno is None and not isinstance(error, TimeoutError):  # Arrow's own, about what the file holds
            raise _damaged(url, file, error) from error
        raise DataError(
            f"Can't read {file} in {url} ({error.strerror or _reason(error)}): see that it is there and may be read, "
            "and run the same command again."
        ) from error
    except pa.ArrowException as error:
        raise _damaged(url, file, error) from error


def _damaged(url: str, file: str, error: Exception) -> DataError:
    return DataError(f"{file} in {url} is no whole Parquet file ({_reason(error)}): fetch it again.")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _schema(parquet: pq.ParquetFile, file: str) -> pa.Schema:
    """A file's columns. DataError for names that aren't UTF-8."""
    try:
        return parquet.schema_arrow
    except UnicodeDecodeError as error:
        raise DataError(f"{file} has a column whose name isn't UTF-8: fetch the published file.") from error


def _has_images(schema: pa.Schema, file: str) -> bool:
    """Whether a file has pictures. DataError when it is not as published."""
    has_images = any(name in schema.names for name in IMAGE_COLUMNS)
    for name, (words, fits) in (COLUMNS | IMAGE_COLUMNS if has_images else COLUMNS).items():
        if name not in schema.names:
            raise DataError(f"{file} lacks the column {name!r} of Pick-a-Pic: fetch the published file.")
        if schema.names.count(name) > 1:
            raise DataError(f"{file} has the column {name!r} twice: fetch the published file.")
        kind = schema.field(name).type
        if not fits(kind):
            raise DataError(f"{file} has the column {name!r} as {kind} instead of {words}: fetch the published file.")
    return has_images


def _units(metadata: pq.FileMetaData, file: str, start: int, unit_bytes: int) -> Iterator[Unit]:
    """A file's row groups in units; a group that is larger than `unit_bytes` is one by itself."""
    groups: list[int] = []
    rows = 0
    size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if groups and size + group.total_byte_size > unit_bytes:
            yield Unit(file, tuple(groups), start, rows)
            start += rows
            groups = []
            rows = 0
            size = 0
        groups.append(number)
        rows += group.num_rows
        size += group.total_byte_size
    if groups:
        yield Unit(file, tuple(groups), start, rows)


def _as_choices(batch: pa.RecordBatch, number: int, file: str) -> pa.Table:
    """A batch as CHOICES, its first row having this number. DataError for a value that CHOICES can't hold."""
    columns = {"number": pa.array(np.arange(number, number + len(batch)))}
    unreadable = np.zeros(len(batch), bool)
    for name in COLUMNS:
        column = batch.column(name)
        kind = CHOICES.field(name).type
        try:
            if name == "created_at":
                column = column.cast(pa.timestamp("us"), safe=False)
            column = column.cast(kind)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{file} has a value in the column {name!r} that doesn't belong there ({_reason(error)}): fetch the "
                "published file."
            ) from error
        if kind == pa.string():
            column, is_broken = _readable(column)
            unreadable |= is_broken
        columns[name] = column
    columns["unreadable"] = pa.array(unreadable)
    return pa.table(columns, CHOICES)


def _readable(texts: pa.StringArray) -> tuple[pa.StringArray, np.ndarray]:
    """(texts, null where they aren't UTF-8; bool [n]: where that is). Parquet's readers take any bytes for text."""
    try:
        texts.validate(full=True)
        return texts, np.zeros(len(texts), bool)
    except pa.ArrowInvalid:
        pass

    def decoded(data: bytes | None) -> str | None:
        try:
            return None if data is None else data.decode()
        except UnicodeDecodeError:
            return None

    raw = texts.cast(pa.binary()).to_pylist()
    readable = [decoded(data) for data in raw]
    is_broken = [data is not None and text is None for data, text in zip(raw, readable, strict=True)]
    return pa.array(readable, pa.string()), np.array(is_broken, bool)
