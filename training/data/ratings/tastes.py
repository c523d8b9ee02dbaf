"""Tastes as sources: the store's folders and zips, and any folders called liked and disliked."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from prefgen.files import file_sha256, is_hidden
from prefgen.history_folder import JOURNAL, HistoryFolder, in_order, picture_files
from prefgen.history_folder import VERDICTS as FOLDERS
from prefgen.tastes.exchange import NO_ZIP, rated_entries, user_of
from prefgen.tastes.names import TasteError
from prefgen.tastes.taste import Taste

from ..errors import DataError
from .rating import UNRATED, VERDICTS, Dropped, Key, Source

ZIP = ".zip"


def taste_folders(root: Path) -> list[Path]:
    """`root` itself where it is a taste, else those of its folders that are: with a folder called liked or disliked."""
    if _is_taste(root):
        return [root]
    return [folder for folder in _folders(root) if _is_taste(folder)]


def zips_of(root: Path) -> list[Path]:
    """The zip files of a folder."""
    return [file for file in _entries(root) if file.suffix.lower() == ZIP and file.is_file()]


def read_tastes(root: Path, folders: list[Path], zips: list[Path]) -> Source:
    """A user for each taste, by its name; a zip may hold several. DataError for a folder or zip that can't be read."""
    source = Source(root, "tastes", VERDICTS)
    digest = hashlib.sha256()
    for folder in folders:
        for line in _read_folder(source, folder):
            digest.update(line.encode(errors="surrogatepass"))
    for file in zips:
        _read_zip(source, file)
        digest.update(file_sha256(file).encode())
    source.digest = digest.hexdigest()
    return source


def _read_folder(source: Source, folder: Path) -> Iterator[str]:
    """Add one taste; yields what its digest is made of: names and sizes, verdicts, prompts and times."""
    user = folder.resolve().name
    try:
        rated = list(_by_journal(folder) if (folder / JOURNAL).is_file() else _by_folders(folder))
        sizes = [path.stat().st_size for path, *_ in rated]
    except (TasteError, ValueError, OSError) as error:
        raise DataError(f"{folder} can't be read ({error}).") from error
    for (path, verdict, prompt, time), size in zip(rated, sizes, strict=True):
        name = os.path.relpath(path, source.root).replace(os.sep, "/")
        row = {"user": user, "liked": verdict, "prompt": prompt, "time": time}
        source.add(name, row, Key(name))
        yield f"{name}\0{size}\0{verdict}\0{prompt}\0{time}\n"
    # Beside folders of verdicts, loose pictures have none.
    for path in set(picture_files(folder)) - {each for each, *_ in rated}:
        source.rows += 1
        source.dropped.append(Dropped(UNRATED, path.name, user=user))


def _by_journal(folder: Path) -> Iterator[tuple[Path, str, str, float | None]]:
    """(file, verdict, prompt, time of the verdict) of a taste that was rated in the browser, oldest first."""
    taste = Taste(folder)
    for picture in taste.pictures():
        yield picture.path, picture.verdict, taste.prompt_of(picture), picture.time


def _by_folders(folder: Path) -> Iterator[tuple[Path, str, str, float | None]]:
    """The same of bare folders; a file's time is when it was copied, so their order counts and no time."""
    history = HistoryFolder(folder)
    for verdict, files in history.files.items():
        for file in in_order(files):
            yield file, verdict, history.prompt_of(file), None


def _read_zip(source: Source, file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = rated_entries(archive)
    except (TasteError, *NO_ZIP) as error:
        reason = str(error) if isinstance(error, TasteError) else "it isn't a zip file that can be read"
        raise DataError(f"{file}: {reason}") from error
    place = file.relative_to(source.root).as_posix()
    for entry, verdict, row, text in entries:
        user = user_of(entry.filename) or file.stem
        cells = {"user": user, "liked": verdict, "prompt": row.get("prompt") or text, "time": row.get("time")}
        source.add(f"{place}, {PurePosixPath(entry.filename).name}", cells, Key(place, entry.filename))


def _is_taste(folder: Path) -> bool:
    return any(entry.name.lower() in FOLDERS and entry.is_dir() for entry in _entries(folder))


def _folders(root: Path) -> list[Path]:
    return [entry for entry in _entries(root) if entry.is_dir() and not is_hidden(entry)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} can't be opened ({error.strerror or error}).") from error
