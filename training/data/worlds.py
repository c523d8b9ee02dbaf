"""Whose taste the stages learn: users, their histories, the pictures that training aims at.

Two worlds: the atelier's simulated users, sampled without end from a pool of pictures, and a data set of the common
schema (training/data/schema.py), whose users have the pictures that they have.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefgen.atelier import captions, users
from prefgen.atelier.users import User
from prefgen.files import file_sha256, read_text
from prefgen.pictures import LONG_SIDE, PUBLISHED, PictureError, read_picture

from .agents import vocabulary
from .atelier_users import ATTRIBUTE_INDEX, PoolSampler, interleaved, users_of
from .errors import DataError
from .picture_pool import PicturePool, label_names
from .schema import LIKED, TEST, TRAIN
from .store import TRAITS, images_at

DECODERS = min(8, os.cpu_count() or 1)
# Of either verdict, how many pictures of an atelier's user say what their prompts do.
VERDICTS = 16


@dataclass(frozen=True)
class History:
    """Pictures [n] (their numbers in the world), verdicts [n] (True: liked), the prompts they were made with."""

    pictures: np.ndarray
    liked: np.ndarray
    prompts: list[str]


@dataclass(frozen=True)
class Target:
    """A picture that a user likes, the prompt that asked for it, and the prompt with the taste written into it (none
    when nobody knows the taste in words). avoided: what the user dislikes as a negative prompt, where that is known;
    taste: number of the user's taste that the picture shows."""

    picture: int
    prompt: str
    enriched: str | None
    avoided: str | None = None
    taste: int = 0

    @property
    def against(self) -> str:
        """The prompt with what the user dislikes in it."""
        return f"{self.prompt}, {self.avoided}"


class World(ABC):
    """The users of one world. A user is a number; everything random comes from the generator that is given.

    name: of the world; attributes: "family/name" of every attribute that a taste can have, in a fixed order; none where
    they are unknown or hidden, and then no taste is known either. traits: {user: (liked, disliked) in an MLLM's words}.
    """

    name: str
    attributes: list[str]
    traits: Mapping[int, tuple[list[str], list[str]]] = {}
    # How often training reads a history without its prompts (data.drop_prompts).
    drop_prompts: float = 0.0
    # Pictures as a history keeps them, by their numbers, that were read before they are asked for.
    prefetched: Mapping[int, np.ndarray] = {}

    @abstractmethod
    def users(self, split: str, count: int = 0) -> list[int]:
        """The first `count` users of "train" or "test", all with 0. DataError when there are fewer."""

    @abstractmethod
    def history(self, user: int, rng: np.random.Generator, liked: int, disliked: int) -> History:
        """So many liked and disliked pictures, by turns; a data set's user may have fewer."""

    def others(self, user: int, rng: np.random.Generator, history: History) -> History:
        """More of a user's pictures than a history has, for questions about one that it doesn't show; a user who has no
        others gives those again."""
        return self.history(user, rng, len(history.pictures) + 1, len(history.pictures) + 1)

    @abstractmethod
    def target(self, user: int, rng: np.random.Generator) -> Target:
        """A picture that the user likes, of a prompt that training may see."""

    @abstractmethod
    def all_targets(self, users: list[int]) -> list[Target] | None:
        """All that `target` may give for these users, or None where there is no end to it."""

    @abstractmethod
    def tastes(self, user: int) -> list[list[int]]:
        """For each of the user's tastes the numbers of its liked attributes; empty when unknown."""

    @abstractmethod
    def verdicts(self, user: int) -> dict[str, tuple[int, int]]:
        """{prompt: how many of its pictures the user likes and dislikes}, of prompts that training may see."""

    @abstractmethod
    def dislikes(self, user: int) -> list[int]:
        """Numbers of the disliked attributes; empty when unknown."""

    def has_disliked(self, user: int) -> bool:
        """Whether a history can show a picture that the user dislikes."""
        return True

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of the world's pictures and of what is known of its users, for caches."""

    @abstractmethod
    def phrase(self, attribute: int) -> str:
        """How a prompt says it."""

    @abstractmethod
    def pictures(self, numbers, long_side: int | None = LONG_SIDE) -> list[np.ndarray]:
        """Pictures as uint8 [H, W, 3] with at most `long_side` pixels a side, by default what a history keeps, None for
        all of them; numbers that ascend are read fastest."""

    def sizes(self, numbers) -> list[tuple[int, int]]:
        """Height and width of pictures as they are."""
        return [picture.shape[:2] for picture in self.pictures(numbers, None)]

    def decoded(self, numbers: np.ndarray) -> dict[int, np.ndarray]:
        """{number: picture} for `prefetched`; empty where reading costs nothing."""
        return {}

    def texts(self, user: int) -> list[str]:
        """Each taste in the words of a prompt: "pastel palette, thick outline, ..."."""
        return [", ".join(self.phrase(a) for a in taste) for taste in self.tastes(user)]


class AtelierWorld(World):
    """The atelier's simulated users, whose histories are sampled from the pool (training/data/atelier_users.py)."""

    name = "atelier"

    def __init__(self, runs: Path, attributes: bool = True):
        self.pool = PicturePool(runs)
        self.sampler = PoolSampler(self.pool.labels[:, 2:])
        self.attributes = [f"{family}/{name}" for family, name in ATTRIBUTE_INDEX] if attributes else []
        self._people: dict[int, User] = {}

    def users(self, split: str, count: int = 0) -> list[int]:
        if not count:
            raise DataError("The atelier's users have no end: say how many.")
        people = users_of(split, count)
        self._people |= {person.id: person for person in people}
        return [person.id for person in people]

    def person(self, user: int) -> User:
        """The simulated user of a number."""
        if user not in self._people:
            self._people[user] = users.user(user)
        return self._people[user]

    def history(self, user: int, rng: np.random.Generator, liked: int, disliked: int) -> History:
        pictures, verdicts = self.sampler.history(self.person(user), liked, disliked, rng)
        return History(pictures, verdicts, [""] * len(pictures))

    def target(self, user: int, rng: np.random.Generator) -> Target:
        person = self.person(user)
        taste = person.tastes[rng.integers(len(person.tastes))]
        number = int(self.sampler.liked(person, taste, 1, rng)[0])
        subject, prop, _ = label_names(self.pool.labels[number])
        enriched = captions.enriched(subject, prop, dict(taste.liked), rng)
        return Target(number, captions.neutral(subject, prop), enriched if self.attributes else None)

    def all_targets(self, users: list[int]) -> None:
        return None

    def tastes(self, user: int) -> list[list[int]]:
        if not self.attributes:
            return []
        return [[ATTRIBUTE_INDEX[tuple(pair)] for pair in taste.liked] for taste in self.person(user).tastes]

    def verdicts(self, user: int) -> dict[str, tuple[int, int]]:
        history = self.history(user, np.random.default_rng([user, VERDICTS]), VERDICTS, VERDICTS)
        prompts = [captions.neutral(*label_names(self.pool.labels[number])[:2]) for number in history.pictures]
        return counted(prompts, history.liked)

    def dislikes(self, user: int) -> list[int]:
        if not self.attributes:
            return []
        return [ATTRIBUTE_INDEX[tuple(pair)] for pair in self.person(user).disliked]

    @property
    def digest(self) -> str:
        return self.pool.digest

    def phrase(self, attribute: int) -> str:
        family, name = list(ATTRIBUTE_INDEX)[attribute]
        return captions.taste_phrases({family: name})[0]

    def pictures(self, numbers, long_side: int | None = LONG_SIDE) -> list[np.ndarray]:
        return [np.array(self.pool.pictures[i]) for i in numbers]


class DataSetWorld(World):
    """The users of a folder of the common schema. Its index is in memory, its pictures stay on the disk.

    Picture i is row i of the index. Held-out pictures are in no history and never a target; a user needs at least two
    liked pictures to be read. attributes: whether those that the set knows may be used. DataError for a folder that is
    no such set, or not finished.
    """

    def __init__(self, folder: Path, attributes: bool = True):
        self.folder = Path(folder)
        self.name = str(self.folder)
        if not (self.folder / "manifest.json").exists():
            raise DataError(f"{self.folder} is not a finished data set: it has no manifest.json.")
        columns = ["user", "verdict", "prompt", "attributes", "split", "heldout", "shard", "row"]
        try:
            self.index = pq.read_table(self.folder / "index.parquet", columns=columns, partitioning=None)
            users = pq.read_table(self.folder / "users.parquet", partitioning=None)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise DataError(
                f"{self.folder} can't be read ({error}): run `python -m training.data check` on it."
            ) from error
        self.owner = self.index["user"].to_numpy()
        self.is_liked = np.array(self.index["verdict"].to_pylist()) == LIKED
        self.usable = ~self.index["heldout"].to_numpy(zero_copy_only=False)
        self.split = np.array(self.index["split"].to_pylist())
        self._people = {row["user"]: row for row in users.to_pylist()}
        if not attributes:
            self._people = {user: row | {"tastes": [], "dislikes": []} for user, row in self._people.items()}
        # Rows of the index by user, in the order of the history.
        order = np.argsort(self.owner, kind="stable")
        borders = np.flatnonzero(np.diff(self.owner[order])) + 1
        self._rows = {int(self.owner[rows[0]]): rows for rows in np.split(order, borders) if len(rows)}
        opinions = (taste for p in self._people.values() for taste in (*(p["tastes"] or ()), p["dislikes"] or ()))
        self.attributes = sorted({opinion["attribute"] for taste in opinions for opinion in taste})
        self._attribute_numbers = {name: i for i, name in enumerate(self.attributes)}

    def users(self, split: str, count: int = 0) -> list[int]:
        readable = [
            user
            for user, person in sorted(self._people.items())
            if person["split"] == split and len(self._history_rows(user, liked=True)) >= 2
        ]
        if len(readable) < max(count, 1):
            raise DataError(
                f"{self.folder} has {len(readable)} users of the {split} split with two liked pictures or more, "
                f"{max(count, 1)} are needed: make a larger set, or ask for fewer (0: all)."
            )
        return readable[:count] if count else readable

    def _history_rows(self, user: int, liked: bool) -> np.ndarray:
        """The user's pictures of one verdict, without the held-out ones, in the order of the history."""
        rows = self._rows.get(user, np.empty(0, np.int64))
        return rows[(self.is_liked[rows] == liked) & self.usable[rows]]

    def history(self, user: int, rng: np.random.Generator, liked: int, disliked: int) -> History:
        sides = [self._history_rows(user, liked=True), self._history_rows(user, liked=False)]
        counts = [min(n, len(side)) for n, side in zip((liked, disliked), sides, strict=True)]
        chosen = [rng.choice(side, n, replace=False) for side, n in zip(sides, counts, strict=True)]
        order = interleaved(*counts)
        pictures = np.concatenate(chosen)[order].astype(np.int64)
        return History(pictures, order < counts[0], [self.prompt(i) for i in pictures])

    def prompt(self, picture: int) -> str:
        return self.index["prompt"][int(picture)].as_py() or ""

    def heldout_prompts(self) -> list[str]:
        """Prompts that no stage trains on, each once, in order."""
        return sorted({self.prompt(i) for i in np.flatnonzero(self.split == TEST)})

    def unseen_liked(self, user: int, seen: np.ndarray) -> np.ndarray:
        """The user's liked pictures that are not among `seen`, the held-out ones too."""
        rows = self._rows.get(user, np.empty(0, np.int64))
        return np.setdiff1d(rows[self.is_liked[rows]], seen)

    def target(self, user: int, rng: np.random.Generator) -> Target:
        return self._target_of(user, int(rng.choice(self._target_rows(user))))

    def all_targets(self, users: list[int]) -> list[Target]:
        return [self._target_of(user, int(number)) for user in users for number in self._target_rows(user)]

    def _target_rows(self, user: int) -> np.ndarray:
        rows = self._history_rows(user, liked=True)
        # A user of the test split has no picture whose user and prompt are both for training.
        trainable = rows[self.split[rows] == TRAIN] if self._people[user]["split"] == TRAIN else rows
        return trainable if len(trainable) else rows

    def _target_of(self, user: int, number: int) -> Target:
        prompt = self.prompt(number)
        shown = set(self.index["attributes"][number].as_py() or ())
        # The taste that this picture was made to show, where a user has two.
        fitting = max(self.tastes(user), key=lambda taste: sum(self.attributes[a] in shown for a in taste), default=[])
        phrases = [self.phrase(a) for a in fitting] or list(self.traits.get(user, ([], []))[0])
        # A picture's own order, so that the states of its text can be cached.
        np.random.default_rng(number).shuffle(phrases)
        return Target(number, prompt, ", ".join([prompt, *phrases]) if phrases else None)

    def verdicts(self, user: int) -> dict[str, tuple[int, int]]:
        rows = np.concatenate([self._history_rows(user, liked) for liked in (True, False)])
        rows = rows[self.split[rows] == TRAIN]
        return counted([self.prompt(row) for row in rows], self.is_liked[rows])

    @cached_property
    def traits(self) -> Mapping[int, tuple[list[str], list[str]]]:
        return read_traits(self.folder, self.digest)

    def tastes(self, user: int) -> list[list[int]]:
        return [self._numbers(taste) for taste in self._people[user]["tastes"] or ()]

    def dislikes(self, user: int) -> list[int]:
        return self._numbers(self._people[user]["dislikes"] or ())

    def _numbers(self, opinions) -> list[int]:
        return [self._attribute_numbers[opinion["attribute"]] for opinion in opinions]

    def has_disliked(self, user: int) -> bool:
        return len(self._history_rows(user, liked=False)) > 0

    @cached_property
    def digest(self) -> str:
        # It holds the checksum of every file.
        return file_sha256(self.folder / "manifest.json")

    def phrase(self, attribute: int) -> str:
        return self._phrases[attribute]

    @cached_property
    def _phrases(self) -> list[str]:
        """A vocabulary's own words for the attributes of ours, the name for any other."""
        phrases: dict[str, str] = {}
        for source in (vocabulary.atelier(), vocabulary.load()):
            phrases |= dict(zip(source.keys, source.phrases, strict=True))
        return [phrases.get(name, name.rpartition("/")[2].replace("_", " ")) for name in self.attributes]

    def pictures(self, numbers, long_side: int | None = LONG_SIDE) -> list[np.ndarray]:
        numbers = np.asarray(numbers, np.int64)
        ready = self.prefetched if long_side == LONG_SIDE else {}
        absent = np.array([number for number in numbers.tolist() if number not in ready], np.int64)
        ready = ready | self.decoded(absent, long_side)
        return [ready[number] for number in numbers.tolist()]

    def decoded(self, numbers: np.ndarray, long_side: int | None = LONG_SIDE) -> dict[int, np.ndarray]:
        """{number: picture}, read from the disk and decoded by several threads."""
        files = dict(images_at(self.folder, *(self.index[name].to_numpy()[numbers] for name in ("shard", "row"))))

        def decode(place: int) -> np.ndarray:
            try:
                return read_picture(files[place] or b"", long_side, formats=PUBLISHED)
            except PictureError as error:
                raise DataError(
                    f"Picture {numbers[place]} of {self.folder} can't be read ({error.reason}): run "
                    "`python -m training.data check` on the set."
                ) from error

        # Pillow's decoders and its resizing let other threads run.
        with ThreadPoolExecutor(max(1, min(DECODERS, len(numbers)))) as threads:
            return dict(zip(numbers.tolist(), threads.map(decode, range(len(numbers))), strict=True))


def counted(prompts: Sequence[str], liked: np.ndarray) -> dict[str, tuple[int, int]]:
    """{prompt: pictures liked, disliked} of pictures' prompts and verdicts, without the empty prompt."""
    counts: dict[str, tuple[int, int]] = {}
    for prompt, verdict in zip(prompts, liked.tolist(), strict=True):
        if prompt:
            likes, dislikes = counts.get(prompt, (0, 0))
            counts[prompt] = (likes + verdict, dislikes + (not verdict))
    return counts


def read_traits(folder: Path, digest: str) -> dict[int, tuple[list[str], list[str]]]:
    """What `training.data.traits` wrote into a set whose manifest has this digest: {user: (liked, disliked)}, empty for
    a set without. DataError for traits of another set, and for damaged ones."""
    report = folder / TRAITS / "report.json"
    if not report.exists():
        return {}
    try:
        source = json.loads(read_text(report))["config"]["source_sha256"]
        rows = pq.read_table(report.with_name("traits.parquet"), partitioning=None).to_pylist()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{report.parent} is damaged: delete it, and tell the traits again.") from error
    if source != digest:
        raise DataError(f"{report.parent} was made of another set: delete it, and tell the traits again.")
    return {row["user"]: (row["liked"], row["disliked"]) for row in rows}
