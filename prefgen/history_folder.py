"""A folder of liked and disliked pictures: what in it counts, in which order, and reading it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .files import guessed_text, is_hidden, is_hidden_name, reason_of
from .pictures import PictureError, picture_suffixes, printable, read_picture

VERDICTS = ("liked", "disliked")
# Of prefgen.tastes, in the folder itself: the journal, and what stands there while loose pictures move into `liked`.
JOURNAL = "taste.jsonl"
MOVING = ".moving"
# How many unreadable pictures are named where none can be read.
NAMED = 5


@dataclass(frozen=True)
class FolderPicture:
    """A picture as it was read: uint8 [H, W, 3], and its prompt, "" for none."""

    pixels: np.ndarray
    prompt: str


class HistoryFolder:
    """The pictures of a history folder, oldest first.

    `liked` and `disliked` are subfolders in any case and may be links. Pictures directly in the folder count as liked
    where no subfolder `liked` holds any, and while they move there. A file's time is that of its last change; files of
    one time go by name, with numbers in it as numbers. Raises FileNotFoundError for a folder that isn't there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = printable(self.path.name)
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"The history folder {self.name} is not there: choose another, or create it with a "
                "`liked` subfolder of pictures."
            )
        self.revision = ""  # of a taste with a journal, see tastes/reading.py
        self.prompts: dict[Path, str] = {}
        self._files: dict[str, list[Path]] = {verdict: [] for verdict in VERDICTS}
        self._folders = [e for e in entries_of(self.path) if e.name.lower() in VERDICTS and e.is_dir()]
        for folder in self._folders:
            self._files[folder.name.lower()] += picture_files(folder)
        self._loose = not self._files["liked"] or (self.path / MOVING).exists()
        if self._loose:
            self._files["liked"] += picture_files(self.path)

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The pictures of each verdict, oldest first; looks at the time of every file."""
        return {verdict: in_order(files) for verdict, files in self._files.items()}

    def use(self, files: dict[str, list[Path]], prompts: dict[Path, str]) -> None:
        """Take these pictures of each verdict, oldest first, with these prompts in place of those beside them."""
        self._files = self.files = files
        self.prompts = prompts

    def check(self) -> None:
        """Raises ValueError with one sentence where there is no liked picture; looks at names alone."""
        if not self._files["liked"]:
            raise ValueError(
                f"The history folder {self.name} has no pictures in its `liked` subfolder: put at least one "
                "there, as PNG, JPEG, WebP or whatever else Pillow opens."
            )

    def fingerprint(self) -> str:
        """Changes with every picture, every prompt and their order; looks at names, sizes and times alone."""
        digest = hashlib.sha256()
        for verdict, files in self.files.items():
            for file in files:
                for part in (file, prompt_file(file)):
                    digest.update(f"{verdict} {_stamp(part)}\n".encode(errors="surrogatepass"))
        # Verdicts have an order of their own where a journal says when they were given.
        digest.update(_stamp(self.path / JOURNAL).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def read(
        self,
        limits: dict[str, int],
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> tuple[dict[str, list[FolderPicture]], list[PictureError]]:
        """(the newest `limits[verdict]` pictures of each verdict, oldest first; those that can't be read).

        progress(done, total) is called after every picture; interrupt() is called before it and may raise. Raises
        PictureError or ValueError with one sentence where no liked picture is left.
        """
        self.check()
        self._warn_of_pictures_elsewhere()
        total = sum(min(limits[verdict], len(files)) for verdict, files in self.files.items())
        done = 0
        broken: list[PictureError] = []
        pictures: dict[str, list[FolderPicture]] = {verdict: [] for verdict in VERDICTS}
        for verdict, files in self.files.items():
            waiting = list(files)
            while waiting and len(pictures[verdict]) < limits[verdict]:
                if interrupt:
                    interrupt()
                newest = waiting.pop()
                try:
                    pictures[verdict].append(FolderPicture(read_picture(newest), self.prompt_of(newest)))
                except PictureError as error:
                    # An older picture takes its place.
                    broken.append(error)
                    continue
                done += 1
                if progress:
                    progress(done, total)
            pictures[verdict].reverse()
            if waiting:
                logging.warning(
                    "PrefGen reads the newest %d %s pictures of %s; %d older ones are left out.",
                    len(pictures[verdict]),
                    verdict,
                    self.name,
                    len(waiting),
                )
            # Before the disliked ones are read: without a liked picture nothing can be done with them.
            if verdict == "liked" and not pictures[verdict]:
                raise _nothing_left(self.name, broken)
        return pictures, broken

    def prompt_of(self, file: Path) -> str:
        """A picture's prompt, "" for none."""
        return self.prompts[file] if file in self.prompts else prompt_of(file)

    def _warn_of_pictures_elsewhere(self) -> None:
        """Warn of pictures that have no verdict: in this folder, where it isn't the liked one, and those further in."""
        folders = [e for folder in self._folders for e in entries_of(folder) if e.is_dir() and not is_hidden(e)]
        if not self._loose:
            folders.insert(0, self.path)
        for folder in folders:
            if count := len(picture_files(folder)):
                logging.warning(
                    "PrefGen passes over %d pictures in %s: they lie directly in neither liked nor disliked of %s.",
                    count,
                    printable(folder.name),
                    self.name,
                )


def picture_files(folder: Path) -> list[Path]:
    """Pictures directly in a folder, in no particular order: whatever has a picture's suffix and isn't hidden."""
    suffixes = picture_suffixes()
    return [file for file in entries_of(folder) if file.suffix.lower() in suffixes and not is_hidden(file)]


def picture_entries(folder: Path) -> list[os.DirEntry]:
    """Pictures directly in a folder, in no order; [] where there is no such folder. What counts is what
    `picture_files` counts, listed without a path for each."""
    suffixes = picture_suffixes()
    try:
        with os.scandir(folder) as entries:
            named = [entry for entry in entries if os.path.splitext(entry.name)[1].lower() in suffixes]
    except FileNotFoundError:
        return []
    if os.name == "nt":
        return [entry for entry in named if not is_hidden(Path(entry.path))]
    return [entry for entry in named if not is_hidden_name(entry.name)]


def entries_of(folder: Path) -> list[Path]:
    """What lies in a folder. Raises ValueError with one sentence where that can't be known."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        reason = reason_of(error)
        raise ValueError(
            f"The history folder {printable(folder.name)} can't be opened ({reason}): let ComfyUI read it, or choose "
            "another."
        ) from error


def in_order(files: Iterable[Path]) -> list[Path]:
    """Oldest first by the time of the last change, then by name with numbers as numbers: 2.png before 10.png."""
    return sorted(files, key=lambda file: (_time(file), _natural(file.name), file.name, str(file)))


def prompt_file(file: Path) -> Path:
    """The text file beside a picture that holds its prompt; it need not be there."""
    shouted = file.with_suffix(".TXT")
    return shouted if shouted.is_file() else file.with_suffix(".txt")


def prompt_of(file: Path) -> str:
    """The prompt in the text file beside a picture, on one line; "" where there is none."""
    text = prompt_file(file)
    try:
        return " ".join(guessed_text(text.read_bytes()).split()) if text.is_file() else ""
    except OSError as error:
        logging.warning("PrefGen can't read the prompt %s (%s).", printable(text.name), error.strerror or "damaged")
        return ""


def left_out(broken: list[PictureError], name: str) -> str:
    """One message on the pictures of a history that can't be read; "" where all can."""
    if not broken:
        return ""
    if len(broken) == 1:
        return f"Left out of {name}: {broken[0]}"
    named = "; ".join(f"{error.name} ({error.reason})" for error in broken)
    return f"Left out of {name}, {len(broken)} pictures that can't be read: {named}. Replace or remove them."


def _nothing_left(name: str, broken: list[PictureError]) -> ValueError:
    if len(broken) == 1:
        return broken[0]
    named = ", ".join(error.name.split(" in ")[0] for error in broken[:NAMED])
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    reason = broken[0].reason
    return ValueError(
        f"None of the liked pictures of {name} can be read: {named}{more} (the first because {reason}). Replace them."
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name.casefold())
    return [(1, int(part), "") if part.isdecimal() else (2, 0, part) for part in parts if part]


def _time(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        # A link to nowhere: the oldest, and refused by name when it is read.
        return 0


def _stamp(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return f"{file.name} none"
    return f"{file.parent.name}/{file.name} {status.st_size} {status.st_mtime_ns}"
