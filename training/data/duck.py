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


# What DuckDB's errors mean for a person, the first that fits: (classes, words of which the text has one, the sentence).
# DuckDB tells some causes apart by its words alone; without words the class decides.
CAUSES = (
    (
        duckdb.Error,
        ("conflicting lock", "already open", "used by another process"),
        "Another command works in {folder}: wait for it, or stop it ({reason}).",
    ),
    (
        duckdb.OutOfMemoryException,
        ("max_temp_directory_size", "no space"),
        "DuckDB has no room to spill to in {folder} ({reason}): make room there, and run it again.",
    ),
    (
        duckdb.OutOfMemoryException,
        (),
        "DuckDB's memory is full ({reason}): {more_memory}, and run it again.",
    ),
    (
        duckdb.IOException,
        ("not a valid duckdb", "version number", "corrupt", "checksum", "serializ", "deserializ", "storage"),
        "What lies in {folder} is damaged or of another version of DuckDB ({reason}): delete it, run it again.",
    ),
    (
        (duckdb.BinderException, duckdb.CatalogException),
        (),
        "A table of {folder} has other columns than the layout ({reason}): make the set again.",
    ),
    (
        duckdb.Error,
        ("no space", "quota", "disk full", "file too large"),
        "Can't work in {folder} ({reason}): make room there, and run it again.",
    ),
    (
        (duckdb.IOException, duckdb.TransactionException),
        (),
        "Can't work in {folder} ({reason}): see that it can be read and written and that its disk has room, and run it "
        "again.",
    ),
    (
        (
            duckdb.ConversionException,
            duckdb.InvalidInputException,
            duckdb.InvalidTypeException,
            duckdb.TypeMismatchException,
            duckdb.OutOfRangeException,
            duckdb.DataError,
        ),
        (),
        "A table of {folder} holds values that don't belong there ({reason}): make the set again.",
    ),
    (
        duckdb.Error,
        (),
        "DuckDB failed in {folder} ({reason}): delete what the command left there, and run it again.",
    ),
)


def _sentence(folder: Path, options: str, error: duckdb.Error) -> str:
    """What an error means for a person."""
    text = str(error).strip()
    reason = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    more_memory = f"give it more by {options}" if options else "close other programs"
    fitting = (
        sentence
        for classes, words, sentence in CAUSES
        if isinstance(error, classes) and (not words or any(word in text.lower() for word in words))
    )
    return next(fitting).format(folder=folder, reason=reason, more_memory=more_memory)
