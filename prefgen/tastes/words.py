"""Words of a taste: what an artist added to what the MLLM says of their pictures, and what they struck out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import write_atomic
from ..history_folder import VERDICTS
from .journal import WordEvent
from .names import TasteError, folded
from .origin import one_line

ADDED = "added"
STRUCK = "struck"
STATES = (ADDED, STRUCK, "")
UNDERSTOOD = ".words.json"  # beside the journal: disposable, since the MLLM can be asked again
MAX_WORD = 120  # characters: a trait, no prompt


@dataclass(frozen=True)
class Words:
    """state: {(side, folded word): (word as it was typed, "added" or "struck")}, in the order of the acts."""

    state: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of_events(cls, events: Iterable[WordEvent]) -> Words:
        """What holds after events, oldest first. One that is taken back by `undoes` is an event of its own."""
        state: dict[tuple[str, str], tuple[str, str]] = {}
        for event in events:
            key = (event.side, folded(event.word))
            state.pop(key, None)
            if event.after:
                state[key] = (event.word, event.after)
        return cls(state)

    def chosen(self, side: str, state: str) -> tuple[str, ...]:
        """The words of a side that were added or struck out."""
        return tuple(word for (of, _), (word, now) in self.state.items() if of == side and now == state)

    def state_of(self, word: str, side: str) -> str:
        """ "added", "struck" or ""."""
        return self.state.get((side, folded(word)), ("", ""))[1]

    def applied(self, side: str, understood: Sequence[str]) -> tuple[str, ...]:
        """What counts of a side: the words that were understood, without those that were struck out, then those that
        were added. Case makes no difference."""
        left = [word for word in understood if self.state_of(word, side) != STRUCK]
        there = {folded(word) for word in left}
        return (*left, *(word for word in self.chosen(side, ADDED) if folded(word) not in there))

    def digest(self) -> str:
        """8 hexadecimal digits of SHA-256 over the lines `side state word`; "" where nothing was added or struck out.

        A revision of the pictures doesn't hold it: a word changes nothing of what the MLLM reads.
        """
        lines = sorted(f"{side} {now} {word}\n" for (side, word), (_, now) in self.state.items())
        return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()[:8] if lines else ""

    def shown(self) -> dict[str, dict[str, list[str]]]:
        """{"liked": {"added": [...], "struck": [...]}, "disliked": ...}."""
        return {side: {state: list(self.chosen(side, state)) for state in (ADDED, STRUCK)} for side in VERDICTS}


def keep_understood(folder: Path, revision: str, rows: list[dict]) -> None:
    """Write what an MLLM said of a taste at a revision: [{"word", "side", "sure"}], sure in 0..1 or None."""
    text = json.dumps({"revision": revision, "words": rows}, ensure_ascii=False)
    try:
        write_atomic(folder / UNDERSTOOD, text.encode(errors="surrogatepass"))
    except OSError as error:
        logging.warning("PrefGen can't keep what was understood of %s: %s.", folder.name, error.strerror)


def understood(folder: Path) -> dict:
    """{"revision", "words"} as `keep_understood` wrote it; {} where nobody read the taste yet."""
    try:
        content = json.loads((folder / UNDERSTOOD).read_bytes())
        rows = [{key: row[key] for key in ("word", "side", "sure")} for row in content["words"]]
        return {"revision": content["revision"], "words": [row for row in rows if row["side"] in VERDICTS]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def checked_word(word: str) -> str:
    """A word as it is kept: on one line, without signs that part words. TasteError for none, or for half a page."""
    word = one_line(str(word).replace(",", " ").replace(";", " "))
    if not word or len(word) > MAX_WORD:
        raise TasteError(f"A word has 1 to {MAX_WORD} characters: type one trait at a time.")
    return word
