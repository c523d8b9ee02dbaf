"""SOURCE, known by what lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import DataError
from .pamela import annotations, read_pamela
from .rating import Source
from .tables import SUFFIXES, dataset_files, parquet_files, read_tables
from .tastes import ZIP, read_tastes, taste_folders, zips_of


def read_source(path: Path, columns: Mapping[str, str]) -> Source:
    """The ratings of a taste, a folder of tastes or zips, a zip, a table, a folder of Parquet files, PAMELA's folder,
    or a Hugging Face data set on disk. columns: {ours: the table's own name}. DataError for anything else."""
    if path.is_file():
        source = _read_file(path, columns)
    elif path.is_dir():
        source = _read_folder(path, columns)
    else:
        raise DataError(f"{path} isn't there: name a folder, a zip or a table of ratings.")
    if not source.ratings:
        raise DataError(f"{path} has no rating that can be used: {source.rows} rows were read and left out.")
    return source


def _read_file(path: Path, columns: Mapping[str, str]) -> Source:
    suffix = path.suffix.lower()
    if suffix == ZIP:
        return read_tastes(path.parent, [], [path])
    if suffix in SUFFIXES:
        return read_tables(path.parent, [path], "table", columns)
    raise DataError(f"{path} is no zip and no table: CSV, JSON lines and Parquet are read.")


def _read_folder(path: Path, columns: Mapping[str, str]) -> Source:
    if annotations(path):
        return read_pamela(path)
    if files := dataset_files(path):
        return read_tables(path, files, "dataset", columns)
    folders = taste_folders(path)
    # A taste's own folder may hold zips of anything.
    zips = [] if folders == [path] else zips_of(path)
    if folders or zips:
        return read_tastes(path, folders, zips)
    if files := parquet_files(path):
        return read_tables(path, files, "table", columns)
    raise DataError(
        f"{path} has no folders called liked and disliked, no zip of a taste, no Parquet file and no data set: name "
        "the folder of a taste or of several, or the table itself."
    )
