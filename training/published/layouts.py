"""The two published layouts, told apart by what is in them, as rows: who judged which picture how.

agents: user -> list of [negative file, positive file, prompt], its last element the user's metadata (PrefGen's
simulated users as Premier reads them); or a list of users whose items are [picture, prompt], all liked (Premier's
README).
frames: a DataFrame whose columns hold raw image bytes (learn-user-pref).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from ..data.errors import DataError
from ..data.schema import DISLIKED, LIKED
from . import tree
from .unpickler import Refused

AGENTS, FRAMES = "agents", "frames"
NO_USER, MISSING, UNMATCHED = "no user", "missing picture", "held-out row without its pair"
BAD_REFERENCE, BAD_PAIR = "incomplete reference", "incomplete pair"
COLUMNS = "user_id reference_list reference_list_bad reference_prompt_list image0 image1 prompt label0".split()
CAPTION, POSITIVE = "caption", "positive_image"  # columns of a user's CSV


class Row(NamedTuple):
    """A picture that a user judged."""

    user: str
    number: int  # of the choice, in the order of the file
    asked: bool  # held out for evaluation, not part of the history
    verdict: str
    prompt: str
    picture: str


@dataclass(frozen=True)
class Options:
    """What a person may set; files and folders for the layout `agents` alone."""

    images: Path | None = None
    users: Path | None = None  # JSON list of the users to take, in this order
    heldout: Path | None = None  # folder of {user}_test.csv
    skip_missing: bool = False

    def config(self) -> dict:
        """For the set's configuration: what is in the files, not where they lie."""
        config: dict = {"skip_missing": self.skip_missing, "images": self.images is not None}
        config["users_sha256"] = None if self.users is None else hashlib.sha256(_bytes(self.users)).hexdigest()
        config["heldout_sha256"] = None
        if self.heldout is not None:
            listed = sorted((p.name, p.stat().st_size) for p in self.heldout.glob("*_test.csv"))
            if not listed:
                raise DataError(f"{self.heldout} has no {{user}}_test.csv: name the folder of the users' CSV files.")
            config["heldout_sha256"] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return config


@dataclass
class Source:
    """One file's content on its way out: fill it by reading `rows` to the end."""

    path: Path
    options: Options
    users: dict[str, str | None] = field(default_factory=dict)  # name: metadata as JSON
    pictures: dict[str, bytes | str] = field(default_factory=dict)  # name: bytes, or the name of its file
    sizes: dict[str, int] = field(default_factory=dict)  # of the pictures, in bytes
    dropped: Counter = field(default_factory=Counter)  # rule: how many

    def rows(self, layout: str, content: object) -> Iterator[Row]:
        """Judged pictures in the order of the file. DataError names the file and what is wrong in it."""
        try:
            yield from (self._frame if layout == FRAMES else self._agents)(content)
        except Refused as error:
            raise DataError(f"{self.path} is not read: it {error}.") from error

    def _wrong(self, what: str) -> DataError:
        return DataError(f"{self.path} {what}.")

    # frames

    def _frame(self, node: object) -> Iterator[Row]:
        columns = tree.frame(node)
        for name in COLUMNS:
            if name not in columns:
                raise self._wrong(f"lacks the column {name!r}: name a file of the published data")
        for number, cells in enumerate(zip(*(columns[name] for name in COLUMNS), strict=True)):
            user, liked, disliked, prompts, *asked = cells
            user = _name(self._cell("user_id", user, (int, float, str)))
            if user is None:
                self.dropped[NO_USER] += 1
                continue
            self.users.setdefault(user, None)
            yield from self._references(user, number, liked, disliked, prompts)
            yield from self._asked(user, number, *asked)

    def _references(self, user: str, number: int, *cells: object) -> Iterator[Row]:
        lists = []
        for name, cell in zip(COLUMNS[1:4], cells, strict=True):
            found = [] if _empty(cell) else tree.sequence(cell)
            if found is None:
                raise self._type(name, cell, "lists")
            lists.append(found)
        sides = len(lists[0]), len(lists[1])
        for place, (liked, disliked, prompt) in enumerate(zip_longest(*lists)):
            prompt = self._cell(COLUMNS[3], prompt, (str,))
            for verdict, name, data, length in zip(
                (LIKED, DISLIKED), COLUMNS[1:3], (liked, disliked), sides, strict=True
            ):
                if place < length:
                    data = self._cell(name, data, (bytes,))
                    if not data or _blank(prompt):
                        self.dropped[BAD_REFERENCE] += 1
                    else:
                        yield Row(user, number, False, verdict, prompt, self._named(data))

    def _asked(self, user: str, number: int, first: object, second: object, prompt: object, label: object) -> Iterator:
        first, second = (self._cell(n, c, (bytes,)) for n, c in (("image0", first), ("image1", second)))
        prompt = self._cell("prompt", prompt, (str,))
        label = self._cell("label0", label, (int, float))
        if not first or not second or first == second or _blank(prompt) or label not in (0, 1):
            self.dropped[BAD_PAIR] += 1
            return
        for verdict, data in ((LIKED, first if label else second), (DISLIKED, second if label else first)):
            yield Row(user, number, True, verdict, prompt, self._named(data))

    def _named(self, data: bytes) -> str:
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.pictures.setdefault(name, data)
        self.sizes.setdefault(name, len(data))
        return name

    def _cell(self, column: str, cell: object, wanted: tuple[type, ...]) -> object:
        """A cell of one of these types, or None when it is empty."""
        cell = tree.value(cell)
        cell = cell.item() if hasattr(cell, "item") else cell  # of a column that is an array
        if _empty(cell):
            return None
        if not isinstance(cell, wanted):
            words = {bytes: "raw bytes", str: "strings", list: "lists"}.get(wanted[-1], "numbers")
            raise self._type(column, cell, words)
        return cell

    def _type(self, column: str, cell: object, words: str) -> DataError:
        return self._wrong(f"has the column {column!r} with {tree.meaning(cell)} instead of {words}: fetch it again")

    # agents

    def _agents(self, node: object) -> Iterator[Row]:
        if self.options.images is None:
            raise self._wrong("names its pictures by their files: name their folder with --images")
        if not self.options.images.is_dir():
            raise DataError(f"{self.options.images} is no folder: name the folder of the pictures with --images.")
        self.lost: dict[str, None] = {}
        self.seen_csv = 0
        people = self._people(node)
        number = 0
        for user, items in people.items():
            if not items:
                self.users[user] = None
                continue
            self.users[user] = json.dumps(tree.plain(items[-1]), ensure_ascii=False, sort_keys=True)
            whole = [found for place, item in enumerate(items[:-1]) if (found := self._item(user, place, item))]
            held = self._held(user, whole)
            for place, (disliked, liked, prompt) in enumerate(whole):
                for verdict, name in ((LIKED, liked), (DISLIKED, disliked)):
                    if name is not None:
                        yield Row(user, number + place, place in held, verdict, prompt, name)
            number += len(items)
        if self.options.heldout is not None and not self.seen_csv:
            raise DataError(f"{self.options.heldout} has no {{user}}_test.csv of a user of {self.path}.")
        if self.lost and not self.options.skip_missing:
            total = len(self.lost) + len(self.pictures)
            raise DataError(
                f"{len(self.lost):,} of {total:,} pictures are not in {self.options.images}, such as "
                f"{next(iter(self.lost))!r}: name their folder with --images, or drop their pairs with --skip-missing."
            )

    def _people(self, node: object) -> dict[str, list]:
        """{user's name: its list}, in the order of the file or of --users."""
        keyed = tree.pairs(node)
        keyed = enumerate(tree.sequence(node) or ()) if keyed is None else keyed
        people: dict[str, list] = {}
        for key, items in keyed:
            name, items = _name(tree.value(key)), tree.sequence(items)
            if name is None or not isinstance(items, list):
                raise self._wrong(f"has the user {tree.value(key)!r:.80} without a list: it is no published layout")
            if name in people:
                raise self._wrong(f"has two users named {name!r:.80}")
            people[name] = items
        if self.options.users is None:
            return people
        wanted = _wanted(self.options.users)
        unknown = [name for name in wanted if name not in people]
        if unknown:
            raise DataError(
                f"{self.options.users} names {len(unknown):,} of {len(wanted):,} users that are not in {self.path}, "
                f"such as {unknown[0]!r:.80}."
            )
        return {name: people[name] for name in wanted}

    def _item(self, user: str, place: int, item: object) -> tuple[str | None, str, str] | None:
        """(disliked or None, liked, prompt), or None when a rule drops it."""
        parts = tree.sequence(item)
        parts = parts if isinstance(parts, list) else []
        parts = [tree.value(part) for part in parts]
        if len(parts) not in (2, 3) or not all(part is None or isinstance(part, str) for part in parts):
            raise self._wrong(
                f"has the user {user!r:.80} with an element {place} that is neither [negative, positive, prompt] nor "
                "[picture, prompt]: it is no published layout"
            )
        *files, prompt = parts
        names = [base_name(file or "") for file in files]
        if "" in names or _blank(prompt) or len(set(names)) < len(names):
            self.dropped[BAD_PAIR] += 1
            return None
        if not all([self._there(name) for name in names]):
            self.dropped[MISSING] += 1
            return None
        return (names[0] if len(names) == 2 else None), names[-1], prompt

    def _there(self, name: str) -> bool:
        if name in self.pictures or name in self.lost:
            return name in self.pictures
        path = self.options.images / name
        try:
            there = path.is_file()
            size = path.stat().st_size if there else 0
        except (OSError, ValueError):  # a name too long, or with a zero byte
            there = False
        if there:
            self.pictures[name], self.sizes[name] = name, size
        else:
            self.lost[name] = None
        return there

    def _held(self, user: str, whole: list[tuple]) -> set[int]:
        """Which of a user's pairs are held out: those of its CSV; without --heldout-csv the last of two or more."""
        two_sided = [place for place, pair in enumerate(whole) if pair[0] is not None]
        if self.options.heldout is None:
            return set(two_sided[-1:] if len(two_sided) >= 2 else [])
        if user != base_name(user):  # as untrusted as the pictures' names
            return set()
        path = self.options.heldout / f"{user}_test.csv"
        if not path.is_file():
            return set()
        self.seen_csv += 1
        places = {(whole[place][2], whole[place][1]): place for place in two_sided}
        found = [places.get(row) for row in _csv(path)]
        self.dropped[UNMATCHED] += found.count(None)
        return set(found) - {None}


def detect(path: Path, node: object) -> str:
    """AGENTS or FRAMES. DataError for anything else."""
    if tree.meaning(node) == "frame":
        return FRAMES
    if tree.pairs(node) is not None or isinstance(node, list):
        return AGENTS
    raise DataError(f"{path} holds a {tree.meaning(node)}: neither a frame nor a mapping or a list of users.")


def base_name(name: str) -> str:
    """What of a file name out of a pickle may be looked up in a folder: never a way out of it. "" for nothing."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "" if name in (".", "..") else name


def _empty(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _blank(prompt: str | None) -> bool:
    return prompt is None or not prompt.strip()


def _name(user: object) -> str | None:
    """A user's name; a whole number that a column with gaps holds as 7.0 is 7."""
    if isinstance(user, float) and user.is_integer():
        user = int(user)
    if isinstance(user, bool) or not isinstance(user, (int, str)) or user == "":
        return None
    return str(user)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Can't read {path}: {error.strerror or error}.") from error


def _wanted(path: Path) -> list[str]:
    try:
        listed = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}).") from error
    names = [_name(user) for user in listed] if isinstance(listed, list) else [None]
    if None in names or len(set(names)) < len(names):
        raise DataError(f"{path} is no list of user ids, each once.")
    return names


def _csv(path: Path) -> list[tuple[str, str]]:
    """(caption, base name of the positive picture) of each row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for name in (CAPTION, POSITIVE):
                if name not in (rows.fieldnames or ()):
                    raise DataError(f"{path} lacks the column {name!r}.")
            return [(row[CAPTION] or "", base_name(row[POSITIVE] or "")) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"Can't read {path} as CSV: {error}.") from error
