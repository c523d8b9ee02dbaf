"""One taste: its pictures and verdicts as they are, and every way of changing them.

A change moves a file first and writes its event second. Killed in between, the picture counts all the same (a file
without an event counts by its time of change), and doing the same again changes nothing more: pictures are known by the
SHA-256 of their files. Every change is made under a lock that all processes of the machine share.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from ..files import file_sha256, reason_of, write_atomic
from ..history_folder import MOVING, VERDICTS, entries_of, picture_entries, picture_files, prompt_of
from ..pictures import open_picture, to_pixels
from . import journal, revisions
from .index import Index
from .journal import Event, WordEvent
from .names import TasteError, printable
from .origin import Origin, one_line, origin_of
from .revisions import REVISION_DIGITS, revision_of
from .stored import THUMB_SIDE, checked_picture, free_name, move, move_all, move_into
from .words import STATES, Words, checked_word

TRASH = ".trash"
THUMBS = ".thumbs"
LOCK = ".lock"
LOCK_SECONDS = 30.0
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Picture:
    """A picture of a taste. verdict: "liked" or "disliked"; time: of its verdict, seconds since 1970; sha256: of its
    file, "" where the file hasn't been read yet; frozen: of an earlier revision."""

    sha256: str
    folder: str
    name: str
    verdict: str
    time: float
    origin: Origin = Origin()
    source: str = ""
    frozen: bool = False

    @property
    def path(self) -> Path:
        """The file. A path for each of 5,000 pictures would take longer than listing them."""
        return Path(self.folder, self.name)


@dataclass(frozen=True)
class Change:
    """What an act did: the events it wrote, and what it couldn't do with which file and why."""

    events: tuple[Event | WordEvent, ...]
    refused: tuple[tuple[str, str], ...] = ()


class Taste:
    """The taste that lies in a folder. Raises TasteError, one sentence, for whatever can't be done."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = self.folder.name
        if not self.folder.is_dir():
            raise TasteError(f"The taste {printable(self.name)} isn't there any more: choose another.")
        self._lock = FileLock(self.folder / LOCK, timeout=LOCK_SECONDS)

    # --- what is there ---

    def pictures(self, read_new: bool = True) -> list[Picture]:
        """All pictures, oldest verdict first; of files with the same content the one with the newest verdict.

        read_new: whether files that nobody has looked at yet are read for their checksum. Without it, a folder of
        thousands is listed at once; such files have sha256 "" and may be there twice.
        """
        index = Index(self.folder)
        history = journal.read(self.folder)
        # What was undone doesn't count: a picture that goes back to its place gets its old time back as well.
        acts, _ = journal.acts(history)
        events = {(event.sha256, event.after): event for act in acts for event in act}
        origins = {event.sha256: event for event in history if event.source}
        listed: list[Picture] = []
        for verdict, entry in self._files():
            try:
                status = entry.stat()
            except OSError:  # moved away meanwhile, or a link to nowhere
                continue
            sha256 = index.sha256(entry.path, status, read=read_new)
            event = events.get((sha256, verdict))
            rated = origins.get(sha256)
            listed.append(
                Picture(
                    sha256,
                    os.path.dirname(entry.path),
                    entry.name,
                    verdict,
                    event.time if event else status.st_mtime,
                    Origin(rated.prompt, rated.seed, rated.model) if rated else Origin(),
                    rated.source if rated else "",
                )
            )
        index.save()
        listed.sort(key=lambda picture: (picture.time, picture.name, picture.verdict))
        newest = {picture.sha256: picture for picture in listed}
        return [picture for picture in listed if not picture.sha256 or newest[picture.sha256] is picture]

    def counts(self) -> dict[str, int]:
        """{verdict: how many files}: by names alone."""
        names = [verdict for verdict, _ in self._files()]
        return {verdict: names.count(verdict) for verdict in VERDICTS}

    def acts(self) -> tuple[list[list[Event | WordEvent]], list[list[Event | WordEvent]]]:
        """(acts that count, acts that were undone), the last one last: what undo and redo would turn to."""
        return journal.acts(journal.read_all(self.folder))

    def words(self) -> Words:
        """The words that were added and struck out."""
        return Words.of_events(event for event in journal.read_all(self.folder) if isinstance(event, WordEvent))

    def prompt_of(self, picture: Picture) -> str:
        """A picture's prompt: of a revision as it was then, else of the text file beside it, else what the picture's
        own metadata said when it was rated."""
        return picture.origin.prompt if picture.frozen else prompt_of(picture.path) or picture.origin.prompt

    def revision(self, pictures: Iterable[Picture] | None = None) -> str:
        """The first 8 hexadecimal digits of SHA-256 over the lines `sha256 verdict prompt`, oldest verdict first."""
        return revision_of(self.rows(self.pictures() if pictures is None else pictures))

    def rows(self, pictures: Iterable[Picture]) -> list[tuple[str, str, str]]:
        """[(sha256, verdict, prompt)]: what a revision is made of. Looks for every picture's text file."""
        return [(picture.sha256, picture.verdict, self.prompt_of(picture)) for picture in pictures]

    def _files(self) -> Iterator[tuple[str, os.DirEntry]]:
        """(verdict, entry) of every picture that counts: those of history_folder.HistoryFolder."""
        inner = self._verdict_folders()
        loose = not any(picture_entries(folder) for folder in inner["liked"]) or (self.folder / MOVING).exists()
        for verdict, folders in inner.items():
            for folder in folders + ([self.folder] if loose and verdict == "liked" else []):
                for entry in picture_entries(folder):
                    yield verdict, entry

    def _verdict_folders(self) -> dict[str, list[Path]]:
        folders: dict[str, list[Path]] = {verdict: [] for verdict in VERDICTS}
        for entry in entries_of(self.folder):
            if entry.name.lower() in folders and entry.is_dir():
                folders[entry.name.lower()].append(entry)
        return folders

    # --- changes ---

    def rate(
        self,
        data: bytes,
        verdict: str,
        name: str = "picture",
        source: str = "upload",
        origin: Origin | None = None,
        group: str = "",
        moment: float | None = None,
        prompt: str = "",
    ) -> Change:
        """Like or dislike a picture's file. One that is there already changes its verdict, if that is another.

        name: what it is called where it comes from; origin: what it was made with (default: what it says itself).
        moment: when it was rated, seconds since 1970 (default: now). prompt: of a text file beside it, which goes
        before what the picture says itself.
        """
        if verdict not in VERDICTS:
            raise TasteError(f"A picture is liked or disliked, not {printable(verdict)}.")
        suffix = checked_picture(data, name)
        sha256 = hashlib.sha256(data).hexdigest()
        with self.changing():
            before, path = self._place_of(sha256)
            if before == verdict:
                return Change(())
            target = self._move(path, verdict) if path else self._add(data, verdict, name, suffix)
            origin = origin or origin_of(target)
            prompt = one_line(prompt) or origin.prompt
            event = Event(
                sha256,
                target.name,
                before,
                verdict,
                source,
                prompt,
                origin.seed,
                origin.model,
                group=group or uuid.uuid4().hex,
                time=time.time() if moment is None else moment,
            )
            return self._write([event], back=[(target, path)])

    def place(self, sha256s: Iterable[str], verdict: str) -> Change:
        """Give pictures of this taste another verdict, or ("") move them to the trash: one act, undone as one."""
        if verdict not in (*VERDICTS, ""):
            raise TasteError(f"A picture is liked or disliked, not {printable(verdict)}.")
        with self.changing():
            return self._place([(sha256, verdict) for sha256 in sha256s], uuid.uuid4().hex)

    def undo(self) -> Change:
        """Take the last act back; its pictures go where they were before."""
        with self.changing():
            done, _ = self.acts()
            if not done:
                raise TasteError(f"There is nothing to undo in {printable(self.name)}.")
            return self._turn([(event, event.before) for event in reversed(done[-1])])

    def redo(self) -> Change:
        """Do again what was undone last, as long as nothing else was done since."""
        with self.changing():
            _, undone = self.acts()
            if not undone:
                raise TasteError(f"There is nothing to do again in {printable(self.name)}.")
            return self._turn([(event, event.after) for event in undone[-1]])

    def say(self, word: str, side: str, state: str) -> Change:
        """Add a word to what describes a side, strike it out, or ("") leave it to the MLLM again."""
        return self.say_all([(word, side, state)])

    def say_all(self, words: Iterable[tuple[str, str, str]]) -> Change:
        """The same of several (word, side, state), as one act."""
        states: dict[tuple[str, str], str] = {}
        for word, side, state in words:
            if side not in VERDICTS or state not in STATES:
                raise TasteError("A word is added or struck out, and of what is liked or disliked.")
            states[checked_word(word), side] = state
        group = uuid.uuid4().hex
        with self.changing():
            there = self.words().state_of
            said = [(*of, there(*of), state) for of, state in states.items() if there(*of) != state]
            return self._write([WordEvent(*each, group=group) for each in said], back=[])

    def _turn(self, turns: list[tuple[Event | WordEvent, str]]) -> Change:
        """Bring what the events of one act changed to the states beside them."""
        undoes = turns[0][0].group
        words = self.words()
        group = uuid.uuid4().hex
        said = [
            WordEvent(event.word, event.side, words.state_of(event.word, event.side), state, undoes, group=group)
            for event, state in turns
            if isinstance(event, WordEvent)
        ]
        if said:
            return self._write(said, back=[])
        moves = [(event.sha256, state) for event, state in turns if isinstance(event, Event)]
        return self._place(moves, group, undoes)

    def _place(self, moves: list[tuple[str, str]], group: str, undoes: str = "") -> Change:
        """Move pictures, known by their checksums, to a verdict's folder or the trash, and write it down."""
        events: list[Event] = []
        back: list[tuple[Path, Path | None]] = []
        refused: list[tuple[str, str]] = []
        places = self._places()
        for sha256, verdict in moves:
            there = places.get(sha256)
            if there is None:
                refused.append((sha256[:REVISION_DIGITS], "it is in no folder of the taste any more"))
                continue
            before, path = there
            if before == verdict:
                continue
            try:
                target = self._move(path, verdict)
            except OSError as error:
                refused.append((path.name, reason_of(error)))
                continue
            places[sha256] = (verdict, target)
            back.append((target, path))
            events.append(Event(sha256, target.name, before, verdict, group=group, undoes=undoes))
        if not events and refused:
            raise TasteError(f"The picture {printable(refused[0][0])} can't be moved: {refused[0][1]}.")
        return replace(self._write(events, back), refused=tuple(refused))

    def _place_of(self, sha256: str) -> tuple[str, Path | None]:
        """(verdict, file) of one picture; ("", None) of one that isn't there, and ("", file) of one in the trash."""
        there = next((picture for picture in self.pictures() if picture.sha256 == sha256), None)
        if there:
            return there.verdict, there.path
        index = Index(self.folder)
        removed = picture_entries(self.folder / TRASH)
        in_trash = next((Path(e.path) for e in removed if index.sha256(e.path, e.stat()) == sha256), None)
        index.save()
        return "", in_trash

    def _places(self) -> dict[str, tuple[str, Path]]:
        """{sha256: (verdict, file)} of every picture; verdict "" in the trash."""
        index = Index(self.folder)
        removed = picture_entries(self.folder / TRASH)
        places = {index.sha256(entry.path, entry.stat()): ("", Path(entry.path)) for entry in removed}
        index.save()
        return places | {picture.sha256: (picture.verdict, picture.path) for picture in self.pictures()}

    def _add(self, data: bytes, verdict: str, name: str, suffix: str) -> Path:
        """Write a new picture under a free name: a reader sees the whole file or none."""
        folder = self._folder_of(verdict)
        path = folder / free_name(folder, name, suffix)
        try:
            write_atomic(path, data)
        except OSError as error:
            raise self._unwritten(error) from error
        return path

    def _move(self, path: Path, verdict: str) -> Path:
        """Move a picture, with the text file beside it, to a verdict's folder or the trash."""
        return move_into(path, self._folder_of(verdict))

    def _folder_of(self, verdict: str) -> Path:
        """The folder for pictures of a verdict, or the trash; made where it is missing.

        Loose pictures count as liked only as long as nothing lies in `liked`: they move in before the first one does.
        """
        if not verdict:
            folder = self.folder / TRASH
        else:
            folder = next(iter(self._verdict_folders()[verdict]), self.folder / verdict)
        try:
            folder.mkdir(exist_ok=True)
            if verdict == "liked" and ((self.folder / MOVING).exists() or not picture_entries(folder)):
                self._move_loose_into(folder)
        except OSError as error:
            raise self._unwritten(error) from error
        return folder

    def _move_loose_into(self, folder: Path) -> None:
        """Killed in between, loose pictures count in both places, and the next verdict moves the rest."""
        moving = self.folder / MOVING
        if loose := picture_files(self.folder):
            moving.touch()
            try:
                move_all(loose, folder)
            except OSError:
                moving.unlink(missing_ok=True)
                raise
        moving.unlink(missing_ok=True)

    def _write(self, events: Sequence[Event | WordEvent], back: list[tuple[Path, Path | None]]) -> Change:
        """Append events; where that fails, put files back. back: (each file, where it was or None)."""
        if not events:
            return Change(())
        try:
            journal.append(self.folder, *events)
        except OSError as error:
            for target, origin in reversed(back):
                if origin is None:
                    target.unlink(missing_ok=True)
                else:
                    move(target, origin)
            raise self._unwritten(error) from error
        return Change(tuple(events))

    def _unwritten(self, error: OSError) -> TasteError:
        reason = reason_of(error)
        return TasteError(
            f"Nothing was changed in {printable(self.name)}: {reason}. Make room there or let ComfyUI write."
        )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Alone among all processes of the machine."""
        try:
            with self._lock:
                yield
        except Timeout as error:
            raise TasteError(f"Another program is changing {printable(self.name)}: try again in a moment.") from error
        except OSError as error:
            raise self._unwritten(error) from error

    # --- revisions ---

    def keep_revision(self, rows: list[tuple[str, str, str]] | None = None) -> str:
        """Write down which pictures make up the taste as it is, so that name@revision finds them later. Returns it.

        rows: of its pictures, where they are read already.
        """
        rows = self.rows(self.pictures()) if rows is None else rows
        return revisions.keep(self.folder, rows)

    def frozen(self, revision: str) -> list[Picture]:
        """The pictures of an earlier revision, from the folders and the trash, in its order. TasteError names what is
        missing."""
        rows = revisions.rows_of(self.folder, revision)
        places = {sha256: path for sha256, (_, path) in self._places().items()}
        missing = [sha256 for sha256, _, _ in rows if sha256 not in places]
        if missing:
            names = {event.sha256: event.file for event in journal.read(self.folder)}
            shown = ", ".join(printable(names.get(sha256, sha256[:REVISION_DIGITS])) for sha256 in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise TasteError(
                f"{printable(self.name)}@{revision} can't be read: {shown}{more} left the taste and its trash. Put the "
                "files back, or choose the taste without its revision."
            )
        return [
            Picture(
                sha256,
                str(places[sha256].parent),
                places[sha256].name,
                verdict,
                float(number),
                Origin(prompt),
                frozen=True,
            )
            for number, (sha256, verdict, prompt) in enumerate(rows)
        ]

    # --- what the browser shows ---

    def stored_thumbnail(self, sha256: str) -> bytes | None:
        """The thumbnail of a checksum, None where none was made yet. Lists nothing: a panel asks for hundreds."""
        path = self.folder / THUMBS / f"{sha256}.webp"
        return path.read_bytes() if SHA256.fullmatch(sha256) and path.is_file() else None

    def thumbnail(self, picture: Picture) -> bytes:
        """A WebP of at most THUMB_SIDE pixels a side, made once. Raises PictureError."""
        path = self.folder / THUMBS / f"{picture.sha256 or file_sha256(picture.path)}.webp"
        if path.is_file():
            return path.read_bytes()
        with open_picture(picture.path) as image:
            pixels = to_pixels(image, THUMB_SIDE)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "WEBP", quality=82)
        try:
            write_atomic(path, out.getvalue())
        except OSError as error:
            logging.info("PrefGen keeps no thumbnail of %s: %s.", printable(picture.path.name), error.strerror)
        return out.getvalue()

    def empty_trash(self) -> int:
        """Delete what was removed, for good; how many files. Old revisions may then miss pictures."""
        trash = self.folder / TRASH
        with self.changing():
            paths = [path for path in entries_of(trash) if path.is_file()] if trash.is_dir() else []
            for path in paths:
                path.unlink(missing_ok=True)
            return len(paths)
