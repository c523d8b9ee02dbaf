"""Tastes out of and into the store: zip files for friends and backups, and folders that other programs have sorted."""

from __future__ import annotations

import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from ..files import guessed_text, is_hidden
from ..history_folder import VERDICTS, picture_files, prompt_of
from ..pictures import PictureError, picture_suffixes
from .bare import bare
from .names import FORBIDDEN, TasteError, file_name, printable
from .origin import Origin, one_line, stars_of, verdict_of_stars
from .stored import MAX_BYTES
from .taste import Taste
from .words import ADDED, STRUCK, checked_word

MANIFEST = "taste.json"
FORMAT = 1
MAX_FILES = 20_000
MAX_TOTAL = 8 << 30  # bytes, unpacked
MAX_MANIFEST = 32 << 20
MAX_WORDS = 200  # of a side that are added, and that are struck out
MAX_TEXT_FILE = 1 << 16  # bytes

# What zipfile raises for a file that isn't a zip, and for an entry that is damaged, locked or packed in a way that this
# Python doesn't know (LZMA has an error of its own, and some builds of Python have no LZMA).
NO_ZIP = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError)
LZMA_ERROR: type[Exception] = getattr(getattr(zipfile, "lzma", None), "LZMAError", zlib.error)
DAMAGED_ENTRY = (*NO_ZIP, zlib.error, LZMA_ERROR, RuntimeError, EOFError, KeyError)


@dataclass
class Imported:
    """What an import did. added, there: pictures that are new and that were there already; refused: (file, reason)."""

    added: int = 0
    there: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)


def export_zip(taste: Taste, target: BinaryIO, private: bool = False) -> list[tuple[str, str]]:
    """Write a taste as a zip: NAME/liked/..., NAME/disliked/... and NAME/taste.json, which holds order, verdicts and
    the words that were added or struck out.

    private: with EXIF, GPS and prompts; else pictures are written without them (their checksums, and with them the
    revision, are then others). Returns (file, reason) of what couldn't be read and isn't in it.
    """
    # As it is, but for signs that no zip can hold: a folder of another system may be called by such.
    folder = FORBIDDEN.sub("_", taste.name)
    left_out = []
    rows = []
    taken: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for picture in taste.pictures():
            try:
                data = picture.path.read_bytes()
                suffix = picture.path.suffix
                if not private:
                    data, suffix = bare(data, picture.path.name)
            except (OSError, PictureError) as error:
                left_out.append((picture.path.name, _why(error)))
                continue
            name = file_name(picture.path.name, suffix, taken[picture.verdict])
            taken[picture.verdict].append(name)
            place = f"{picture.verdict}/{name}"
            # A fixed date: the file's own would say when the picture was made.
            archive.writestr(zipfile.ZipInfo(f"{folder}/{place}"), data)
            row: dict[str, object] = {"file": place, "verdict": picture.verdict}
            if private:
                origin = {
                    "prompt": taste.prompt_of(picture),
                    "seed": picture.origin.seed,
                    "model": picture.origin.model,
                }
                row |= {"time": picture.time} | {key: value for key, value in origin.items() if value not in ("", None)}
            rows.append(row)
        manifest = {"format": FORMAT, "name": folder, "pictures": rows, "words": taste.words().shown()}
        text = json.dumps(manifest, ensure_ascii=False, indent=1).encode(errors="replace")
        archive.writestr(zipfile.ZipInfo(f"{folder}/{MANIFEST}"), text)
    return left_out


def import_zip(taste: Taste, source: BinaryIO, tick: Callable[[int, int], None] | None = None) -> Imported:
    """Take the pictures of a zip into a taste: those in folders called liked and disliked, in the order of its
    manifest, and its words, but for those that the taste has already. Nothing is unpacked by its own name, and
    everything is bounded before it is read."""
    try:
        archive = zipfile.ZipFile(source)
    except NO_ZIP as error:
        raise TasteError("This isn't a zip file that can be read: export it again, or choose another.") from error
    pictures = rated_entries(archive)
    # Before the pictures, so that the first undo takes these back.
    there = taste.words()
    taste.say_all(said for said in _words(archive) if not there.state_of(said[0], said[1]))
    done = Imported()
    group = uuid.uuid4().hex
    for number, (entry, verdict, row, text) in enumerate(pictures):
        name = PurePosixPath(entry.filename).name
        try:
            data = bounded(archive, entry)
            origin = _origin(row)
            change = taste.rate(data, verdict, name, "import", origin, group, prompt="" if origin else text)
            _count(done, change.events)
        except TasteError as error:
            done.refused.append((printable(name), str(error)))
        except DAMAGED_ENTRY as error:
            done.refused.append((printable(name), f"damaged or locked in the zip ({type(error).__name__})"))
        if tick:
            tick(number + 1, len(pictures))
    return done


class RatedEntry(NamedTuple):
    """A picture in a zip. row: of the manifest, {} where it has none; text: of the text file beside it, "" for none."""

    entry: zipfile.ZipInfo
    verdict: str
    row: dict
    text: str


def rated_entries(archive: zipfile.ZipFile) -> list[RatedEntry]:
    """The pictures in folders called liked and disliked, in the order of the manifest. Raises
    TasteError for a zip without any, and for one that holds too much."""
    entries = archive.infolist()
    if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_TOTAL:
        raise TasteError(f"The zip holds more than {MAX_FILES} files or {MAX_TOTAL >> 30} GB: import it in parts.")
    rows = _rows(archive)
    pictures = [entry for entry in entries if _verdict_of(entry.filename) and _is_picture(entry.filename)]
    if not pictures:
        raise TasteError("The zip has no pictures in folders called liked or disliked: sort them into these first.")
    order = {place: number for number, place in enumerate(rows)}
    pictures.sort(key=lambda entry: (order.get(_place_of(entry.filename), len(order)), entry.filename))
    texts = {_stem(entry.filename): entry for entry in entries if entry.filename.lower().endswith(".txt")}
    return [
        RatedEntry(
            entry,
            _verdict_of(entry.filename),
            rows.get(_place_of(entry.filename), {}),
            _text(archive, texts.get(_stem(entry.filename))),
        )
        for entry in pictures
    ]


def user_of(filename: str) -> str:
    """The name of an entry's taste: of the folder around its folder of verdicts; "" for none."""
    return PurePosixPath(_place_of(filename)[0]).name


def bounded(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """An entry's bytes. TasteError where it holds more than a picture may, whatever it says of itself."""
    with archive.open(entry) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise TasteError(f"it has more than {MAX_BYTES >> 20} MB: shrink it first")
    return data


def import_folder(taste: Taste, folder: Path, verdict: str = "") -> Imported:
    """Take the pictures of a folder into a taste.

    verdict: of all of them. Without it: those of sub folders called liked and disliked by these, and the others by
    their stars (xmp:Rating in the file or a sidecar): 4 and 5 liked, 1 and rejected disliked, the rest left out.
    """
    done = Imported()
    group = uuid.uuid4().hex
    for path, of_folder in _sorted_pictures(folder):
        try:
            chosen = verdict or of_folder or verdict_of_stars(stars_of(path))
            if not chosen:
                continue
            if path.stat().st_size > MAX_BYTES:
                raise TasteError(f"more than {MAX_BYTES >> 20} MB")
            change = taste.rate(path.read_bytes(), chosen, path.name, "import", group=group, prompt=prompt_of(path))
            _count(done, change.events)
        except (TasteError, OSError) as error:
            done.refused.append((printable(path.name), _why(error)))
    if not done.added and not done.there and not done.refused:
        raise TasteError(
            f"{printable(folder.name)} has no pictures with a verdict: put them into folders called liked and "
            "disliked, or give them stars."
        )
    return done


def _sorted_pictures(folder: Path) -> Iterator[tuple[Path, str]]:
    """(picture, verdict of its folder or "") of a folder and all below it, oldest first in each."""
    for root, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(Path(root, name)))
        here = Path(root)
        inside = [part.lower() for part in here.relative_to(folder).parts]
        of_folder = next((part for part in reversed(inside) if part in VERDICTS), "")
        # A link to nowhere is refused by its name later on.
        times = {path: path.stat().st_mtime if path.exists() else 0.0 for path in picture_files(here)}
        for path in sorted(times, key=lambda path: (times[path], path.name)):
            yield path, of_folder


def _count(done: Imported, events: tuple) -> None:
    done.added += bool(events)
    done.there += not events


def _verdict_of(filename: str) -> str:
    """The verdict that an entry's folder says, "" for none."""
    parts = [part.lower() for part in PurePosixPath(filename.replace("\\", "/")).parts[:-1]]
    return next((part for part in reversed(parts) if part in VERDICTS), "")


def _place_of(filename: str) -> tuple[str, str]:
    """(folder of the taste, verdict/file) of an entry, as the manifest in that folder names it."""
    path = PurePosixPath(filename.replace("\\", "/"))
    verdict = _verdict_of(filename)
    parts = [part.lower() for part in path.parts[:-1]]
    # The innermost folder of verdicts counts, as in `_verdict_of`.
    depth = len(parts) - 1 - parts[::-1].index(verdict) if verdict else len(parts)
    return PurePosixPath(*path.parts[:depth]).as_posix(), f"{verdict}/{path.name}"


def _stem(filename: str) -> str:
    """An entry's name without its suffix: a picture and the text file beside it share it."""
    return os.path.splitext(filename.replace("\\", "/"))[0]


def _text(archive: zipfile.ZipFile, text: zipfile.ZipInfo | None) -> str:
    """What a text file beside a picture says; "" where there is none, and of one that can't be read."""
    with suppress(*DAMAGED_ENTRY):
        if text is not None:
            with archive.open(text) as file:
                return one_line(guessed_text(file.read(MAX_TEXT_FILE)))
    return ""


def _is_picture(filename: str) -> bool:
    path = PurePosixPath(filename.replace("\\", "/"))
    hidden = any(is_hidden(Path(part)) for part in path.parts)
    return path.suffix.lower() in picture_suffixes() and not hidden


def _manifests(archive: zipfile.ZipFile) -> Iterator[tuple[str, dict]]:
    """(folder of the taste, manifest) of a zip of ours, which may hold several tastes; none of any other."""
    for entry in archive.infolist():
        if PurePosixPath(entry.filename).name != MANIFEST or entry.file_size > MAX_MANIFEST:
            continue
        with suppress(*DAMAGED_ENTRY, RecursionError):
            with archive.open(entry) as file:
                manifest = json.loads(file.read(MAX_MANIFEST))
            if isinstance(manifest, dict):
                yield PurePosixPath(entry.filename).parent.as_posix(), manifest


def _rows(archive: zipfile.ZipFile) -> dict[tuple[str, str], dict]:
    """{(folder of the taste, verdict/file): its row} of a zip's manifests."""
    rows: dict[tuple[str, str], dict] = {}
    for folder, manifest in _manifests(archive):
        with suppress(KeyError, TypeError):
            rows |= {(folder, row["file"]): row for row in manifest["pictures"] if isinstance(row["file"], str)}
    return rows


def _words(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, str]]:
    """(word, side, state) of a zip's manifests, as `Words.shown` gave them; what is no word is passed over."""
    for _, manifest in _manifests(archive):
        for side, state in product(VERDICTS, (ADDED, STRUCK)):
            with suppress(KeyError, TypeError):
                for word in manifest["words"][side][state][:MAX_WORDS]:
                    with suppress(TasteError):
                        yield checked_word(word if isinstance(word, str) else ""), side, state


def _origin(row: dict) -> Origin | None:
    """What a manifest says that a picture was made with; None where it says nothing."""
    prompt, seed, model = row.get("prompt"), row.get("seed"), row.get("model")
    if prompt is None and seed is None and model is None:
        return None
    return Origin(
        one_line(prompt) if isinstance(prompt, str) else "",
        seed if isinstance(seed, int) else None,
        one_line(model) if isinstance(model, str) else "",
    )


def _why(error: Exception) -> str:
    """Why a file is left out. Without its path on the server, which an OSError's own words end in."""
    if isinstance(error, OSError):
        return (error.strerror or "it can't be read").lower()
    return getattr(error, "reason", "") or str(error)
