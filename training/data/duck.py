"""DuckDB as the sets use it: files read by their names alone, and its errors in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from .errors import DataError

PATTERN = re.compile(r"([*?\[])")


def parquet(paths: Iterable[str | Path]) -> str:
    """SQL that reads these Parquet files and no other: characters that DuckDB takes for a pattern stand for themselves,
    and a folder named `user=3` is no column (hive partitioning would silently put it in the place of the file's own).
    """
    names = [PATTERN.sub(r"[\1]", str(Path(path).absolute())).replace("'", "''") for path in paths]
    listed = ", ".join(f"'{name}'" for name in names)
    return f"read_parquet([{listed}], hive_partitioning = false)"


def check_place(folder: Path) -> None:
    """DataError for a folder in which DuckDB can't open a database file: it takes what follows a ? for options, and a
    backslash for the border of a folder."""
    odd = next((sign for sign in "?\\" if sign in folder.absolute().as_posix()), None)
    if odd:
        raise DataError(f"{folder}: DuckDB can't work below a folder with {odd} in its name: name another folder.")


@contextmanager
def explained(folder: Path, options: str = "") -> Iterator[None]:
    """Turns DuckDB's errors inside into a DataError that says what helps. folder: where it works, or what it reads.

    options: the command's own that gives DuckDB more memory, if it has one.
    """
    try:
        yield
    except duckdb.Error as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(_sentence(folder, options, error, reason)) from error


def _sentence(folder: Path, options: str, error: duckdb.Error, reason: str) -> str:
    said = str(error).lower()
    if "conflicting lock" in said or "already open" in said or "used by another process" in said:
        return f"Another command works in {folder}: wait for it, or stop it ({reason})."
    if isinstance(error, duckdb.OutOfMemoryException):
        if "max_temp_directory_size" in said or "no space" in said:
            return f"DuckDB has no room to spill to in {folder} ({reason}): make room there, and run it again."
        more = f"give it more by {options}" if options else "close other programs"
        return f"DuckDB's memory is full ({reason}): {more}, and run it again."
    damaged = ("not a valid duckdb", "version number", "corrupt", "checksum", "serializ", "deserializ", "storage")
    if isinstance(error, duckdb.IOException) and any(word in said for word in damaged):
        return f"What lies in {folder} is damaged or of another version of DuckDB ({reason}): delete it, run it again."
    if isinstance(error, (duckdb.BinderException, duckdb.CatalogException)):
        return f"A table of {folder} has other columns than the layout ({reason}): make the set again."
    wrong_values = (
        duckdb.ConversionException,
        duckdb.InvalidInputException,
        duckdb.InvalidTypeException,
        duckdb.TypeMismatchException,
        duckdb.OutOfRangeException,
        duckdb.DataError,
    )
    no_room = any(word in said for word in ("no space", "quota", "disk full", "file too large"))
    if isinstance(error, (duckdb.IOException, duckdb.TransactionException)) or no_room:
        helps = "make room there" if no_room else "see that it can be read and written and that its disk has room"
        return f"Can't work in {folder} ({reason}): {helps}, and run it again."
    if isinstance(error, wrong_values):
        return f"A table of {folder} holds values that don't belong there ({reason}): make the set again."
    return f"DuckDB failed in {folder} ({reason}): delete what the command left there, and run it again."
