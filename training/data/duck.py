"""DuckDB as the data sets use it: tables in and out, files read by their names alone, errors in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from .errors import DataError

BATCH_ROWS = 16_384  # of a query that is streamed


@contextmanager
def open_set(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the set's tables as the views pictures (of the index, without images), users and pairs.

    DataError for what DuckDB can't read, then or inside.
    """
    options = {"memory_limit": "1GB", "temp_directory": str(folder / ".work" / "spill")}
    with explained(folder), duckdb.connect(config=options) as db:
        for view, file in (("pictures", "index"), ("users", "users"), ("pairs", "pairs")):
            db.execute(f"CREATE VIEW {view} AS SELECT * FROM {parquet([folder / f'{file}.parquet'])}")
        yield db


def scalar(db: duckdb.DuckDBPyConnection, query: str, parameters: Sequence = ()):
    """The one value of a query."""
    return db.execute(query, list(parameters)).fetchall()[0][0]


def stream(db: duckdb.DuckDBPyConnection, query: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """A query's rows as tables of a schema, BATCH_ROWS at once; columns that the query lacks are empty lists or null.

    Nothing else may run on the connection meanwhile.
    """
    for batch in db.sql(query).to_arrow_reader(BATCH_ROWS):
        columns = []
        for field in schema:
            if field.name in batch.schema.names:
                columns.append(batch.column(field.name).cast(field.type))
            elif pa.types.is_list(field.type):
                columns.append(pa.array([[]] * len(batch), field.type))
            else:
                columns.append(pa.nulls(len(batch), field.type))
        yield pa.table(columns, schema)


def parquet(paths: Iterable[str | Path]) -> str:
    """SQL that reads these Parquet files and no other."""
    # Characters that DuckDB takes for a pattern stand for themselves in brackets. Without hive_partitioning = false a
    # folder named `user=3` would silently put that column in the place of the file's own.
    names = [re.sub(r"([*?\[])", r"[\1]", str(Path(path).absolute())).replace("'", "''") for path in paths]
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"read_parquet([{quoted}], hive_partitioning = false)"


def check_place(folder: Path) -> None:
    """DataError for a folder in which DuckDB can't open a database file: it takes what follows a ? for options, and a
    backslash for the border of a folder."""
    sign = next((sign for sign in "?\\" if sign in folder.absolute().as_posix()), None)
    if sign:
        raise DataError(f"{folder}: DuckDB can't work below a folder with {sign} in its name: name another folder.")


@contextmanager
def explained(folder: Path, options: str = "") -> Iterator[None]:
    """Turns DuckDB's errors inside into a DataError that says what helps. folder: where it works, or what it reads.

    options: the command's own that gives DuckDB more memory, if it has one.
    """
    try:
        yield
    except duckdb.Error as error:
        raise DataError(_sentence(folder, options, error)) from error


DAMAGED = ("not a valid duckdb", "version number", "corrupt", "checksum", "serializ", "deserializ", "storage")
NO_ROOM = ("no space", "quota", "disk full", "file too large")
WRONG_VALUES = (
    duckdb.ConversionException,
    duckdb.InvalidInputException,
    duckdb.InvalidTypeException,
    duckdb.TypeMismatchException,
    duckdb.OutOfRangeException,
    duckdb.DataError,
)


def _sentence(folder: Path, options: str, error: duckdb.Error) -> str:
    """What an error means for a person. DuckDB tells some causes apart by its words alone."""
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__

    def says(*words: str) -> bool:
        return any(word in text.lower() for word in words)

    if says("conflicting lock", "already open", "used by another process"):
        return f"Another command works in {folder}: wait for it, or stop it ({reason})."
    if isinstance(error, duckdb.OutOfMemoryException):
        if says("max_temp_directory_size", "no space"):
            return f"DuckDB has no room to spill to in {folder} ({reason}): make room there, and run it again."
        remedy = f"give it more by {options}" if options else "close other programs"
        return f"DuckDB's memory is full ({reason}): {remedy}, and run it again."
    if isinstance(error, duckdb.IOException) and says(*DAMAGED):
        return f"What lies in {folder} is damaged or of another version of DuckDB ({reason}): delete it, run it again."
    if isinstance(error, (duckdb.BinderException, duckdb.CatalogException)):
        return f"A table of {folder} has other columns than the layout ({reason}): make the set again."
    if says(*NO_ROOM):
        return f"Can't work in {folder} ({reason}): make room there, and run it again."
    if isinstance(error, (duckdb.IOException, duckdb.TransactionException)):
        remedy = "see that it can be read and written and that its disk has room"
        return f"Can't work in {folder} ({reason}): {remedy}, and run it again."
    if isinstance(error, WRONG_VALUES):
        return f"A table of {folder} holds values that don't belong there ({reason}): make the set again."
    return f"DuckDB failed in {folder} ({reason}): delete what the command left there, and run it again."
