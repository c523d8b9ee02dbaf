"""Revisions of a taste: what they are made of, how they are noted, and how they are found again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..files import write_atomic
from . import journal
from .names import TasteError, printable

REVISIONS = ".revisions"
REVISION_DIGITS = 8

Row = tuple[str, str, str]  # sha256, verdict, prompt


def revision_of(rows: Iterable[Row]) -> str:
    """The first 8 hexadecimal digits of SHA-256 over the lines `sha256 verdict prompt`, in this order."""
    lines = "".join(f"{sha256} {verdict} {prompt}\n" for sha256, verdict, prompt in rows)
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()[:REVISION_DIGITS]


def keep(folder: Path, rows: list[Row]) -> str:
    """Write down what a revision of a taste's folder consists of, once; returns its name."""
    revision = revision_of(rows)
    path = folder / REVISIONS / f"{revision}.json"
    if not path.exists():
        try:
            write_atomic(path, json.dumps(rows, ensure_ascii=False).encode(errors="surrogatepass"))
        except OSError as error:
            logging.warning("PrefGen can't note the revision %s of %s: %s.", revision, folder.name, error.strerror)
    return revision


def rows_of(folder: Path, revision: str) -> list[Row]:
    """What a revision consists of: as it was written down, else as the journal says. TasteError where there is none."""
    path = folder / REVISIONS / f"{revision}.json"
    if path.parent.is_dir() and path.name in os.listdir(path.parent):
        # A file that was damaged says nothing; the journal may know.
        with suppress(OSError, ValueError, TypeError):
            rows = [(sha256, verdict, prompt) for sha256, verdict, prompt in json.loads(path.read_bytes())]
            if revision_of(rows) == revision:
                return rows
    # The order of verdicts is the journal's own: an act that was undone moves its pictures back to their places, so
    # revisions between an act and its undoing are found as well, later ones by their files alone.
    placed: dict[str, tuple[str, str]] = {}
    for event in journal.read(folder):
        prompt = event.prompt or placed.get(event.sha256, ("", ""))[1]
        placed.pop(event.sha256, None)
        if event.after:
            placed[event.sha256] = (event.after, prompt)
        rows = [(sha256, *rest) for sha256, rest in placed.items()]
        if revision_of(rows) == revision:
            return rows
    raise TasteError(f"{printable(folder.name)} has no revision {printable(revision)}: choose it without one.")
