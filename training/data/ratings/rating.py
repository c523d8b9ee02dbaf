"""What every kind of source is read into: ratings, and what was dropped on the way, by which rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from prefgen.files import whole_letters

from ..pickapic import looks

# How a source says what its people like.
VERDICTS = "verdicts"  # a rating's value is 1 (liked) or -1
SCORES = "scores"  # any number, more is better
CHOICES = "choices"  # 1 for the picture that won, -1 for the other

# What a rule drops.
ROW = "row"
PICTURE = "picture"
MERGED = "picture of a user"
USER = "user"

UNREADABLE = "unreadable"
INCOMPLETE = "incomplete"
UNRATED = "unrated"
TIED = "tied"
OUTSIDE = "outside"
MISSING = "missing"
FAULTY = "rating of a faulty picture"
SAME = "the same picture"
REPEATED = "repeated"
OLDER = "older"
CONTRADICTORY = "contradictory"
FLAT = "one score for all"
NEUTRAL = "neutral"
EVEN = "even"
FEW = "too few"
SURPLUS = "surplus"

# In the order in which they are applied: (unit, what it drops).
RULES = {
    UNREADABLE: (ROW, "can't be read as a row"),
    INCOMPLETE: (ROW, "no user or no picture named"),
    UNRATED: (ROW, "no verdict, score or choice, or one that isn't a number or a known word"),
    TIED: (ROW, "neither picture of a choice was chosen"),
    OUTSIDE: (ROW, "the picture's name is an absolute path, a web address, or leads out of the source's folder"),
    MISSING: (PICTURE, "no such file, or no bytes in its row"),
    looks.BROKEN: (PICTURE, "can't be decoded, or would unpack to a decompression bomb"),
    looks.TINY: (PICTURE, f"a side below {looks.MIN_SIDE} pixels"),
    looks.DARK: (PICTURE, f"no part brighter than {looks.DARK_BELOW} of 255"),
    looks.UNIFORM: (PICTURE, f"no two parts further apart than {looks.UNIFORM_BELOW} of 255"),
    FAULTY: (ROW, "a rating or choice in which such a picture took part"),
    SAME: (ROW, "a choice between two pictures of the same bytes"),
    REPEATED: (ROW, "the same user rated the same picture before: equal verdicts count once, scores are averaged"),
    OLDER: (ROW, "the user rated the same picture otherwise later"),
    CONTRADICTORY: (MERGED, "liked and disliked by the same user, and no time says which came last"),
    FLAT: (USER, "gave every picture the same score"),
    NEUTRAL: (MERGED, "a score in the middle of the user's own scale"),
    EVEN: (MERGED, "won as often as it lost"),
    FEW: (USER, "fewer than the minimum of liked or of disliked pictures"),
    SURPLUS: (MERGED, "the larger side of a history, past the allowed ratio to the smaller"),
}
ONLY_OF = {  # rules that a source of another scale can't meet
    TIED: CHOICES,
    SAME: CHOICES,
    EVEN: CHOICES,
    CONTRADICTORY: VERDICTS,
    FLAT: SCORES,
    NEUTRAL: SCORES,
}

LIKED_WORDS = {"1", "true", "yes", "like", "liked", "good", "up"}
DISLIKED_WORDS = {"0", "-1", "false", "no", "dislike", "disliked", "bad", "down"}
FIRST_WORDS = {"a", "image_a", "left"}
SECOND_WORDS = {"b", "image_b", "right"}
TIE_WORDS = {"tie", "tied", "both", "neither", "draw", "equal"}
MILLISECONDS_FROM = 1e11  # a time from here on is in milliseconds: in seconds it would be the year 5138


class Key(NamedTuple):
    """Where a picture lies: a file below the source's folder, and inside it a zip's entry or "column:row"."""

    file: str
    inner: str = ""


class Rating(NamedTuple):
    """One user's word on one picture. place: for people, such as "ratings.csv, row 3"; choice: the same number for both
    pictures of a choice, else -1; time: seconds since 1970."""

    place: str
    user: str
    image: Key
    value: float
    prompt: str = ""
    time: float | None = None
    choice: int = -1


class Dropped(NamedTuple):
    """What a rule dropped: a row by its place, a picture by its name, a picture of a user, or a user."""

    rule: str
    place: str = ""
    picture: str = ""
    user: str = ""


@dataclass
class Source:
    """Ratings as read. root: the folder that keys are relative to; form: "tastes", "table", "dataset" or "pamela";
    digest: SHA-256 of what they were read from, without the pictures' own bytes where those are files."""

    root: Path
    form: str
    scale: str
    digest: str = ""
    rows: int = 0
    ratings: list[Rating] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def add(self, place: str, row: Mapping[str, Any], image: Any, other: Any = None) -> None:
        """One row: its columns user, liked, score or choice, prompt and time by these names, and the Key of its picture
        or None; for a choice those of both. A Key's file "" stands for a name that leads out of the folder."""
        self.rows += 1
        user = text_of(row.get("user"))
        keys = [image, other] if self.scale == CHOICES else [image]
        if not user or any(key is None for key in keys):
            self.dropped.append(Dropped(INCOMPLETE, place, user=user))
            return
        if any(not key.file for key in keys):
            self.dropped.append(Dropped(OUTSIDE, place, user=user))
            return
        values = self._values(row)
        if isinstance(values, str):
            self.dropped.append(Dropped(values, place, user=user))
            return
        choice = self.rows if self.scale == CHOICES else -1
        prompt = " ".join(text_of(row.get("prompt")).split())
        time = time_of(row.get("time"))
        for key, value in zip(keys, values, strict=True):
            self.ratings.append(Rating(place, user, key, value, prompt, time, choice))

    def _values(self, row: Mapping[str, Any]) -> list[float] | str:
        """The value of each picture of a row, or the rule that drops it."""
        if self.scale == SCORES:
            score = number_of(row.get("score"))
            return UNRATED if score is None else [score]
        if self.scale == VERDICTS:
            word = word_of(row.get("liked"))
            return [1.0] if word in LIKED_WORDS else [-1.0] if word in DISLIKED_WORDS else UNRATED
        word = word_of(row.get("choice"))
        if word in TIE_WORDS:
            return TIED
        # The choice may be the name of the picture itself.
        first = word in FIRST_WORDS or word == word_of(row.get("image_a"))
        second = word in SECOND_WORDS or word == word_of(row.get("image_b"))
        if not word or first == second:
            return UNRATED
        return [1.0, -1.0] if first else [-1.0, 1.0]


def text_of(value: Any) -> str:
    """A cell as text; "" for none. 7.0, which is how a table with gaps stores 7, is "7"; half a letter, which JSON may
    hold and no table, is "?"."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return whole_letters(str(value)).strip()


def word_of(value: Any) -> str:
    """A cell as a word to compare."""
    return text_of(value).casefold()


def number_of(value: Any) -> float | None:
    """A cell as a finite number; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def time_of(value: Any) -> float | None:
    """A cell as seconds since 1970: a number in seconds or milliseconds, a date as ISO 8601 writes it, or None."""
    number = number_of(value)
    if number is not None:
        return number / 1000 if number >= MILLISECONDS_FROM else number
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(text_of(value).replace("Z", "+00:00"))
        # Without a zone it is taken for UTC: another machine must read the same.
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def counts(dropped: Iterable[Dropped], scale: str) -> list[dict]:
    """[{name, rule, unit, dropped}] in the order of the rules, those alone that such a source can meet."""
    numbers = dict.fromkeys(RULES, 0)
    for each in dropped:
        numbers[each.rule] += 1
    return [
        {"name": name, "rule": f"{name}: {text}", "unit": unit, "dropped": numbers[name]}
        for name, (unit, text) in RULES.items()
        if ONLY_OF.get(name, scale) == scale
    ]
