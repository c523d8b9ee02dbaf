"""Ratings in tables: CSV, JSON lines, Parquet, and Hugging Face data sets on disk."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefgen.files import TextError, file_sha256, read_text, visible_files

from ..errors import DataError
from .images import ARROW, PARQUET, cell_bytes, key_of
from .rating import CHOICES, SCORES, UNREADABLE, VERDICTS, Dropped, Key, Source, text_of

TEXT = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json")
SUFFIXES = (*TEXT, PARQUET)
DELIMITERS = ",;\t|"
# Columns that a table may have; which of the last three groups it has says its scale.
COMMON = ("user", "prompt", "time")
SCALES = {VERDICTS: ("image", "liked"), SCORES: ("image", "score"), CHOICES: ("image_a", "image_b", "choice")}
COLUMNS = {*COMMON, *(name for names in SCALES.values() for name in names)}
IMAGES = {"image", "image_a", "image_b"}
BATCH = 1024  # rows of Parquet and Arrow at once
EMBEDDED_BATCH = 64  # of such with pictures in them


def read_tables(root: Path, files: list[Path], form: str, columns: Mapping[str, str]) -> Source:
    """The ratings of tables that have the same columns. root: the folder that pictures' names are relative to; columns:
    {ours: the table's own name}. DataError for a table that can't be read or lacks a column."""
    source = None
    digest = hashlib.sha256()
    for file in files:
        names, rows = _opened(file)
        scale = _scale(file, names, columns)
        source = source or Source(root, form, scale)
        if scale != source.scale:
            raise DataError(f"{file} has {scale}, {files[0]} has {source.scale}: import them apart.")
        used = [*COMMON, *SCALES[scale]]
        own = {name: columns.get(name, name) for name in used}
        for number, row in rows([name for name in own.values() if name in names]):
            place = f"{file.relative_to(root).as_posix()}, row {number}"
            if row is None:
                source.rows += 1
                source.dropped.append(Dropped(UNREADABLE, place))
                continue
            cells = {name: row.get(theirs) for name, theirs in own.items()}
            images = [_image(root, file, own[name], number, cells[name]) for name in used if name in IMAGES]
            source.add(place, cells, *images)
        digest.update(file_sha256(file).encode())
    assert source is not None
    source.digest = digest.hexdigest()
    return source


def dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a Hugging Face data set on disk, all of its splits; [] for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent for path in folder.glob("*/state.json"))
    else:
        splits = [folder] if (folder / "state.json").is_file() else []
    files = []
    for split in splits:
        try:
            listed = [entry["filename"] for entry in json.loads(read_text(split / "state.json"))["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{split / 'state.json'} is damaged: save the data set again.") from error
        # The names are a stranger's; what isn't there is named when it is opened.
        files += [split / Path(str(name)).name for name in listed]
    return files


def parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below a folder, in the order of their names."""
    return visible_files(folder, f"**/*{PARQUET}")


def _scale(file: Path, names: Iterable[str], columns: Mapping[str, str]) -> str:
    """How a table with these columns says what people like."""
    there = {name for name in COLUMNS if columns.get(name, name) in names}
    scales = [scale for scale, needed in SCALES.items() if there >= set(needed)]
    if "user" in there and len(scales) == 1:
        return scales[0]
    listed = ", ".join(sorted(names)[:12]) or "none"
    if len(scales) > 1:
        what = " and ".join(SCALES[scale][-1] for scale in scales)
        raise DataError(
            f"{file} has the columns {what}: leave all but one out, such as by --columns {what.split()[0]}=."
        )
    raise DataError(
        f"{file} needs the columns user, image and one of liked or score, or user, image_a, image_b and choice; it has "
        f"{listed}. Other names go by --columns user=NAME image=NAME score=NAME."
    )


def _opened(file: Path):
    """(names of the columns, rows(those to read) -> (number, row or None)) of one table."""
    try:
        if file.suffix.lower() in (PARQUET, ARROW):
            return _columnar(file)
        text = read_text(file)
    except TextError as error:
        raise DataError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file} can't be read ({reason}): fetch or write it again.") from error
    return _csv(file, text) if file.suffix.lower() in (".csv", ".tsv", ".txt") else _json(file, text)


def _csv(file: Path, text: str):
    first = text.partition("\n")[0]
    # Excel writes semicolons where the comma is a decimal sign.
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)

    def rows(_: list[str]) -> Iterator[tuple[int, dict | None]]:
        number = 0
        try:
            for number, row in enumerate(reader, 1):
                yield number, None if None in row else row
        except csv.Error as error:
            raise DataError(f"{file} is no CSV table from row {number + 1} on ({error}): write it again.") from error

    try:
        return [name for name in reader.fieldnames or () if name], rows
    except csv.Error as error:
        raise DataError(f"{file} is no CSV table ({error}): write it again.") from error


def _json(file: Path, text: str):
    """JSON lines, or one list of objects."""
    if text.lstrip().startswith("["):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is no JSON ({error}): write it again.") from error
    else:
        # `splitlines` would also part texts that hold one of Unicode's own line separators.
        parsed = [_line(line) for line in text.split("\n") if line.strip()]
    objects = [row if isinstance(row, dict) else None for row in parsed]
    names = {name for row in objects if row for name in row}
    return names, lambda _: enumerate(objects, 1)


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _columnar(file: Path):
    """Parquet or Arrow."""
    if file.suffix.lower() == PARQUET:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow

        def batches(names: list[str]) -> Iterator[pa.RecordBatch]:
            is_embedded = any(_bytes_in(schema.field(name).type) for name in names)
            return parquet.iter_batches(EMBEDDED_BATCH if is_embedded else BATCH, columns=names)
    else:
        stream = pa.ipc.open_stream(pa.memory_map(str(file)))
        schema = stream.schema

        def batches(names: list[str]) -> Iterator[pa.RecordBatch]:
            return (batch.select(names) for batch in stream)

    def rows(names: list[str]) -> Iterator[tuple[int, dict | None]]:
        number = 0
        try:
            for batch in batches(names):
                for row in _rows(batch):
                    yield number, row
                    number += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} is damaged from row {number} on ({error}): fetch it again.") from error

    return schema.names, rows


def _rows(batch: pa.RecordBatch) -> Iterator[dict | None]:
    """The rows of a batch; None for one with a text that isn't UTF-8. In place of a picture's bytes stands True."""
    batch = pa.RecordBatch.from_arrays([_without_bytes(column) for column in batch.columns], batch.schema.names)
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for number in range(len(batch)):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


def _bytes_in(kind: pa.DataType) -> bool:
    """Whether a column holds pictures: bytes, or the struct of bytes and path that `datasets` makes of an Image."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _without_bytes(column: pa.Array) -> pa.Array:
    """A column of pictures as a column of whether there is one, with the paths of those that lie elsewhere."""
    if not _bytes_in(column.type):
        return column
    is_struct = pa.types.is_struct(column.type)
    data = pc.struct_field(column, "bytes") if is_struct else column
    there = pc.fill_null(pc.greater(pc.binary_length(data), 0), False)
    if is_struct and column.type.get_field_index("path") >= 0:
        return pa.StructArray.from_arrays([there, pc.struct_field(column, "path")], ["bytes", "path"])
    return there


def _image(root: Path, file: Path, column: str, row: int, cell: Any) -> Key | None:
    """Where the picture of a cell lies: in it, or in the file that it names. None for an empty cell."""
    if cell_bytes(cell) is True:
        return Key(file.relative_to(root).as_posix(), f"{column}:{row}")
    if cell is False:
        return None
    name = text_of(cell.get("path") if isinstance(cell, dict) else cell)
    return key_of(root, name) if name else None
