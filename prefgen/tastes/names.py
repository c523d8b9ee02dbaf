"""What tastes and pictures may be called, so that the same folder works on Linux, Windows and macOS."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from .. import pictures
from ..errors import MendableError

MAX_NAME = 80  # characters; 255 bytes is the limit of most file systems, and a suffix has to fit
# Windows keeps these for devices, with any suffix and in any case.
DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"}
DEVICES |= {f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"}
# The last are halves of letters: JSON may hold one, and Python makes them of bytes that are no text.
FORBIDDEN = re.compile('[<>:"/\\\\|?*\x00-\x1f\x7f\ud800-\udfff]')


class TasteError(MendableError, ValueError):
    """What can't be done to a taste, in one sentence."""


def checked_name(name: str, taken: Iterable[str] = ()) -> str:
    """A new taste's name as it will be used: NFC, without spaces around it. TasteError says what is wrong with it.

    taken: names that are there already. Two that differ by case alone are one folder on Windows and macOS.
    """
    name = unicodedata.normalize("NFC", str(name)).strip()
    if not name or len(name) > MAX_NAME:
        raise TasteError(f"A taste's name has 1 to {MAX_NAME} characters: choose another.")
    if FORBIDDEN.search(name) or "@" in name:
        raise TasteError(
            f'The name {printable(name)} holds one of @ < > : " / \\ | ? * or a control sign: leave it out.'
        )
    if name.startswith(".") or name.endswith("."):
        raise TasteError(f"The name {printable(name)} begins or ends with a dot: leave it out.")
    if name.split(".")[0].strip().casefold() in DEVICES:
        raise TasteError(f"Windows keeps the name {printable(name)} for itself: choose another.")
    if folded(name) in {folded(other) for other in taken}:
        raise TasteError(f"There is a taste called {printable(name)} already: choose another name.")
    return name


def folded(name: str) -> str:
    """The same for names that are one file on a system that looks away from case or from how accents are spelled."""
    return unicodedata.normalize("NFC", name).casefold()


def file_name(wanted: str, suffix: str, taken: Iterable[str] = ()) -> str:
    """A picture's file name made of what somebody calls it: any system takes it, and nothing else has it.

    suffix: with its dot. taken: names in the folder.
    """
    stem = unicodedata.normalize("NFC", str(wanted)).replace("\\", "/").rsplit("/", 1)[-1]
    stem = stem.rsplit(".", 1)[0] if "." in stem.strip(".") else stem
    stem = FORBIDDEN.sub("_", stem).strip(" .") or "picture"
    if stem.split(".")[0].casefold() in DEVICES:
        stem = f"_{stem}"
    stem = cut(stem, MAX_NAME)
    used = {folded(name) for name in taken}
    name = f"{stem}{suffix}"
    number = 2
    while folded(name) in used:
        name = f"{stem} ({number}){suffix}"
        number += 1
    return name


def cut(text: str, characters: int) -> str:
    """At most so many characters, and at most 200 bytes of UTF-8: file systems count those."""
    return text[:characters].encode()[:200].decode(errors="ignore").strip(" .") or "picture"


def printable(name: str) -> str:
    """A name that fits into a sentence: one line, no control signs, not too long."""
    shown = pictures.printable(name)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
