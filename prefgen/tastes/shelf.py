"""All tastes below one folder. Names are looked up in what is there and never joined to a path."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

from ..files import is_hidden, reason_of
from ..history_folder import entries_of
from . import index
from .names import TasteError, checked_name, folded, printable
from .taste import LOCK, THUMBS, Taste

# What the combos that tastes stand in offer beside them: the taste that pictures were read from, and none.
AUTO, NO_TASTE = RESERVED = ("auto", "none")


class Shelf:
    """The tastes in a folder, such as input/prefgen."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def names(self) -> list[str]:
        """Names of all tastes, in alphabetical order whatever their case."""
        if not self.folder.is_dir():
            return []
        names = [entry.name for entry in entries_of(self.folder) if entry.is_dir() and not is_hidden(entry)]
        return sorted(names, key=lambda name: (folded(name), name))

    def taste(self, name: str) -> Taste:
        """A taste by its name. TasteError where there is none."""
        if name not in self.names():
            raise TasteError(f"There is no taste called {printable(name)}: choose another, or make it.")
        return Taste(self.folder / name)

    def new(self, name: str) -> Taste:
        """An empty taste."""
        name = _checked(name, self.names())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).mkdir()
        except FileExistsError as error:
            raise TasteError(f"There is a taste called {printable(name)} already: choose another name.") from error
        except OSError as error:
            raise self._refused(name, error) from error
        return Taste(self.folder / name)

    def copy(self, name: str, new_name: str) -> Taste:
        """A copy with its journal, trash and revisions: both go on apart."""
        source = self.taste(name)
        new_name = _checked(new_name, self.names())
        # Under a hidden name until it is whole, so that nobody sees half a copy.
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        try:
            with source.changing():
                _copy(source.folder, unfinished)
            os.rename(unfinished, self.folder / new_name)
        except OSError as error:
            raise self._refused(new_name, error) from error
        finally:
            # Half a copy; a whole one has its name by now.
            shutil.rmtree(unfinished, ignore_errors=True)
        return Taste(self.folder / new_name)

    def rename(self, name: str, new_name: str) -> Taste:
        """Give a taste another name; one that differs in case alone is another name."""
        source = self.taste(name)
        others = [other for other in self.names() if other != name]
        new_name = _checked(new_name, others)
        try:
            if new_name != name:
                os.rename(source.folder, self.folder / new_name)
        except OSError as error:
            raise self._refused(name, error) from error
        return Taste(self.folder / new_name)

    def forget(self, name: str) -> None:
        """Delete a taste for good: pictures, journal, trash, revisions and thumbnails."""
        taste = self.taste(name)
        # Out of sight at once; what a kill leaves of it is taken away with the next taste that is forgotten.
        hidden = self.folder / f".forgotten-{uuid.uuid4().hex}"
        try:
            with taste.changing():
                pass
            os.rename(taste.folder, hidden)
            for rest in self.folder.glob(".forgotten-*"):
                shutil.rmtree(rest)
        except OSError as error:
            raise self._refused(name, error) from error

    def _refused(self, name: str, error: OSError) -> TasteError:
        reason = reason_of(error)
        return TasteError(
            f"{printable(name)} can't be changed ({reason}): close what has its files open, and try again."
        )


def _checked(name: str, taken: list[str]) -> str:
    """A new taste's name, as `checked_name` says, and none that means something else where a taste is chosen."""
    name = checked_name(name, taken)
    if name.casefold() in RESERVED:
        raise TasteError(f"Nodes offer {printable(name)} beside the tastes, for something else: choose another name.")
    return name


def _copy(folder: Path, place: Path) -> None:
    """Copy a taste's folder, without what is made anew. Raises OSError of the first file that can't be copied."""
    try:
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(LOCK, THUMBS, index.FILE))
    except shutil.Error as error:
        # It goes on to the last file, and keeps of each fault the words: "[Errno 28] No space left on device: 'a.png'".
        _, _, words = error.args[0][0]
        raise OSError(errno.EIO, str(words).partition("] ")[2].partition(": ")[0] or "damaged") from error
