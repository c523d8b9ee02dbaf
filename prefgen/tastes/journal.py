"""The journal of a taste: one JSON object a line, only ever appended to.

A line is written whole, with its newline, and forced to the disk before anything builds on it. A writer that was killed
may leave half a line: readers pass over it, and the next writer ends it before its own. So nothing that was written is
ever lost, and half a line is never taken for an event.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from ..files import file_state
from ..history_folder import JOURNAL, VERDICTS

VERSION = 1
AnyEvent = TypeVar("AnyEvent", bound="Event | WordEvent")


@dataclass(frozen=True)
class Event:
    """A picture that changed its place. before, after: "liked", "disliked" or "" (in no folder of the taste).

    sha256: of the picture's file; file: its name at that time; time: seconds since 1970; source: output, upload, drop
    or import; prompt, seed, model: what it was made with, where it says so; group: the same for what one act did to
    several pictures; undoes: group of the act that this one takes back or, where that was taken back, does again.
    """

    sha256: str
    file: str
    before: str
    after: str
    source: str = ""
    prompt: str = ""
    seed: int | None = None
    model: str = ""
    undoes: str = ""
    time: float = field(default_factory=time.time)
    group: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class WordEvent:
    """A word of the taste's description that an artist added or struck out.

    side: "liked" or "disliked"; before, after: "added", "struck" or "" (as the MLLM understands it); time, group and
    undoes: as in `Event`.
    """

    word: str
    side: str
    before: str
    after: str
    undoes: str = ""
    time: float = field(default_factory=time.time)
    group: str = field(default_factory=lambda: uuid.uuid4().hex)


def append(folder: Path, *events: Event | WordEvent) -> None:
    """Write events behind what is there; on the disk when it returns. Call it under the taste's lock.

    Raises OSError where there is no room; the journal then is as it was.
    """
    lines = [json.dumps({"version": VERSION} | asdict(event), ensure_ascii=False) for event in events]
    data = "".join(f"{line}\n" for line in lines).encode(errors="surrogatepass")
    with open(folder / JOURNAL, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a writer was killed within a line
                data = b"\n" + data
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def read(folder: Path) -> list[Event]:
    """All events of pictures, oldest first. Lines that aren't ours (half ones, a newer version's) are passed over."""
    return [event for event in read_all(folder) if isinstance(event, Event)]


def read_all(folder: Path) -> list[Event | WordEvent]:
    """All events, of pictures and of words, oldest first."""
    path = folder / JOURNAL
    try:
        return list(_events(str(path), file_state(path)))
    except FileNotFoundError:
        return []


@lru_cache(maxsize=4)
def _events(path: str, _state: tuple) -> tuple[Event | WordEvent, ...]:
    """The same of a file in a state, parsed once: a panel asks for pictures, acts and words after every verdict."""
    lines = Path(path).read_bytes().split(b"\n")
    return tuple(event for event in map(parsed, lines) if event is not None)


def parsed(line: bytes) -> Event | WordEvent | None:
    """The event of a line, None for anything else."""
    try:
        row = json.loads(line)
        if row["version"] != VERSION:
            return None
        kind = WordEvent if "word" in row else Event
        event = kind(**{name: value for name, value in row.items() if name in kind.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return None
    return event if _well_formed(event) else None


def _well_formed(event: Event | WordEvent) -> bool:
    texts: tuple = (event.undoes, event.group)
    if isinstance(event, WordEvent):
        texts += (event.word, event.side)
        states = {"", "added", "struck"}
    else:
        texts += (event.sha256, event.file, event.source, event.prompt, event.model)
        states = {"", *VERDICTS}
    typed = all(isinstance(text, str) for text in texts) and isinstance(event.time, (int, float))
    # JSON in Python knows NaN and Infinity, the browser's doesn't.
    typed = typed and abs(event.time) < 1e12
    sided = isinstance(event, Event) or event.side in VERDICTS
    return typed and sided and {event.before, event.after} <= states


def acts(events: Sequence[AnyEvent]) -> tuple[list[list[AnyEvent]], list[list[AnyEvent]]]:
    """(acts that count, acts that were undone), each the events of one group, the last one last."""
    groups: dict[str, list[AnyEvent]] = {}
    for event in events:
        groups.setdefault(event.group, []).append(event)
    done: list[list[AnyEvent]] = []
    undone: list[list[AnyEvent]] = []
    for act in groups.values():
        target = act[0].undoes
        if not target:
            done.append(act)
            undone.clear()
        elif done and done[-1][0].group == target:
            undone.append(done.pop())
        elif undone and undone[-1][0].group == target:
            done.append(undone.pop())
    return done, undone
