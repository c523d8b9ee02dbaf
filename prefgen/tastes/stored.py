"""A taste's picture files: what may become one, under which name, and moving one with the text file beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..history_folder import picture_files, prompt_file
from ..pictures import PictureError, open_picture, to_pixels
from .names import TasteError, file_name, printable

MAX_BYTES = 256 << 20  # of one picture's file
THUMB_SIDE = 256
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}


def free_name(folder: Path, wanted: str, suffix: str, brings_text: bool = False) -> str:
    """A name for a picture in a folder, by which it gets no other picture's text file and gives none its own.

    brings_text: whether its own text file comes with it.
    """
    names = os.listdir(folder)
    # A text file is the prompt of every picture of its stem.
    stems = (os.path.splitext(name) for name in names)
    taken = [stem + suffix for stem, kind in stems if brings_text or kind.lower() == ".txt"]
    return file_name(wanted, suffix, names + taken)


def move_into(path: Path, folder: Path) -> Path:
    """Move a picture with its text file into a folder; where it is then."""
    target = folder / free_name(folder, path.name, path.suffix, brings_text=prompt_file(path).is_file())
    move(path, target)
    return target


def move_all(paths: Iterable[Path], folder: Path) -> None:
    """Move pictures into a folder, all of them or none: of two halves only one would count."""
    moved: list[tuple[Path, Path]] = []
    try:
        for path in paths:
            moved.append((path, move_into(path, folder)))
    except OSError:
        for path, target in reversed(moved):
            with suppress(OSError):
                move(target, path)
        raise


def move(path: Path, target: Path) -> None:
    """Move a picture with the text file beside it; another picture of its stem keeps that too. All of it or nothing."""
    text = prompt_file(path)
    copy = target.with_suffix(text.suffix) if text.is_file() else None
    # The text is there before its picture and goes after it: killed in between, the picture never lacks it.
    try:
        if copy:
            shutil.copy2(text, copy)
        os.rename(path, target)
    except OSError:
        if copy:
            copy.unlink(missing_ok=True)
        raise
    if copy and not any(file.stem == path.stem for file in picture_files(path.parent)):
        # One that can't be deleted gets no other picture: `free_name` passes it by.
        with suppress(OSError):
            text.unlink()


def checked_picture(data: bytes, name: str) -> str:
    """The suffix of a picture's format. TasteError where the bytes are too many, or no picture that can be read."""
    if len(data) > MAX_BYTES:
        raise TasteError(f"The picture {printable(name)} has more than {MAX_BYTES >> 20} MB: shrink it first.")
    try:
        with open_picture(data, printable(name)) as image:
            form = image.format or ""
            to_pixels(image, THUMB_SIDE)
    except PictureError as error:
        raise TasteError(str(error)) from error
    return SUFFIXES.get(form, f".{form.lower()}")
