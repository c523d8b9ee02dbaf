"""The questions that the MLLM learns to read histories by, and their answers.

The paper (arXiv 2512.06020) fine-tunes its MLLM on preference questions over several pictures; its questions aren't
public, these are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefgen.atelier.attributes import FAMILIES
from prefgen.files import file_sha256, read_text
from prefgen.mllm.prompt import AVOID_QUESTION, CLOSING_QUESTION

from . import world_questions
from .errors import DataError
from .people_world import PeopleWorld
from .readers import Conversation
from .schema import DISLIKED, LIKED, TRAIN
from .vqa import questions
from .worlds import DataSetWorld, History, World

WOULD = "Would this user like this picture?"
YES = "yes"
NO = "no"


def closing(world: World, user: int, rng: np.random.Generator, liked: int, disliked: int) -> Conversation:
    """A history with the closing question."""
    return Conversation(world.history(user, rng, liked, disliked), CLOSING_QUESTION, taste_answer(world, user))


def taste_answer(world: World, user: int) -> str:
    """The whole taste in words: every taste's liked attributes, then what is avoided; "" when unknown."""
    if not world.tastes(user):
        return ""
    liked = " or ".join(world.texts(user))
    avoided = _phrases(world, world.dislikes(user))
    return f"likes {liked} ; avoids {avoided}" if avoided else f"likes {liked}"


def would(world: World, user: int, history: History, rng: np.random.Generator, liked: bool) -> Conversation:
    """Whether the user would like one more picture, which is not in the history where the user has another.

    DataError for a user without a picture of that verdict: any other picture's answer would be wrong.
    """
    more = world.others(user, rng, history)
    candidates = [p for p, verdict in zip(more.pictures, more.liked, strict=True) if verdict == liked]
    unseen = [p for p in candidates if p not in history.pictures]
    judged = unseen or candidates or history.pictures[history.liked == liked].tolist()
    if not judged:
        raise DataError(f"User {user} of {world.name} has no {LIKED if liked else DISLIKED} picture to be asked about.")
    return Conversation(history, WOULD, YES if liked else NO, np.array([judged[0]], np.int64))


class Questions:
    """Other questions than the closing one. DataError where they are missing, or were made of another set.

    The atelier's are made as they are asked: in the second edition those of `world_questions`, in the first one family,
    what is avoided, whether the user would like one more picture. A data set's are those that `training.data.vqa` made
    of it, of one split.
    """

    def __init__(self, world: World, folder: Path | None, split: str = TRAIN):
        self.world = world
        self.table = None
        if isinstance(world, DataSetWorld) and not _asked_as_they_come(world, folder):
            self.table = _table_of(world, folder, split)
            if not world.attributes:
                # What two words answer is known of the verdicts alone.
                self.table = self.table.filter(pc.is_in(self.table["kind"], pa.array(sorted(questions.ANSWERS))))
            places = zip(world.index["shard"].to_pylist(), world.index["row"].to_pylist(), strict=True)
            self.picture = {place: number for number, place in enumerate(places)}
            self.rows: dict[int, list[int]] = {}
            for row, user in enumerate(self.table["user"].to_pylist()):
                self.rows.setdefault(user, []).append(row)

    def ask(self, user: int, rng: np.random.Generator, liked: int, disliked: int) -> Conversation:
        """One question about a user."""
        if self.table is None:
            return _question(self.world, user, self.world.history(user, rng, liked, disliked), rng)
        if not len(self.table):
            raise DataError(
                f"No questions could be made of {self.world.folder}, as for a set whose users dislike nothing: set "
                "train_mllm.others=0."
            )
        # A user without a question of their own asks another's.
        return self._conversation(int(rng.choice(self.rows.get(user) or range(len(self.table)))))

    def closed(self, users: int, each: int, split: str) -> Iterator[tuple[int, str, Conversation]]:
        """(user, kind, question) of the first users' questions that two words can answer (data/vqa/questions.py).

        users: 0 for all. A data set has its own; of the atelier `each` a user are made, answers by turns.
        """
        if self.table is not None:
            for user in sorted(self.rows)[: users or None]:
                for row in self.rows[user]:
                    kind = self.table["kind"][row].as_py()
                    if kind in questions.ANSWERS:
                        yield user, kind, self._conversation(row)
            return
        for user in self.world.users(split, users):
            for number in range(each):
                rng = np.random.default_rng([user, number, 43])
                sizes = rng.integers(*questions.SIDE, size=2).tolist()
                history = self.world.history(user, rng, *sizes)
                first = bool((user + number) % 2)
                yield user, questions.WOULD, would(self.world, user, history, rng, first)
                if isinstance(self.world, PeopleWorld):
                    if asked := world_questions.which(self.world, user, history, rng, first):
                        yield user, questions.WHICH, asked

    def _conversation(self, row: int) -> Conversation:
        question = self.table.slice(row, 1).to_pylist()[0]
        pictures = question["history"]
        history = History(
            self._numbers(pictures),
            np.array([picture["liked"] for picture in pictures], bool),
            [picture["prompt"] or "" for picture in pictures],
        )
        return Conversation(history, question["question"], question["answer"], self._numbers(question["asked"]))

    def _numbers(self, pictures: list[dict]) -> np.ndarray:
        return np.array([self.picture[picture["shard"], picture["row"]] for picture in pictures], np.int64)


def _table_of(world: DataSetWorld, folder: Path | None, split: str):
    """The questions of a split, as `training.data.vqa` wrote them."""
    if folder is None:
        raise DataError("data.questions is missing: make them by `python -m training.data.vqa DATA FOLDER`.")
    try:
        config = json.loads(read_text(folder / "report.json"))["config"]
        table = pq.read_table(folder / f"{split}.parquet", partitioning=None)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} holds no questions of training.data.vqa: run it on {world.folder}.") from error
    if config["source_sha256"] != file_sha256(world.folder / "manifest.json"):
        raise DataError(f"The questions in {folder} were made of another set than {world.folder}: make them anew.")
    return table


def _asked_as_they_come(world: World, folder: Path | None) -> bool:
    """Whether a set's questions are made as they are asked: of the second edition's users, where none are named."""
    return isinstance(world, PeopleWorld) and folder is None


def _question(world: World, user: int, history: History, rng: np.random.Generator) -> Conversation:
    """A question that is made as it is asked, of a kind that this user's history can answer."""
    if not isinstance(world, PeopleWorld):
        return _atelier_question(world, user, history, rng)
    kinds = world_questions.KINDS if world.attributes else ("which", "would")
    kind = kinds[rng.integers(len(kinds))]
    first = bool(rng.integers(2))
    asked = None
    if kind == "which":
        asked = world_questions.which(world, user, history, rng, first)
    elif kind == "shared":
        asked = world_questions.shared(world, history)
    elif kind == "avoid":
        asked = world_questions.avoid(world, user, history)
    elif kind == "favourite":
        asked = world_questions.favourite(world, user, history, rng)
    return asked or would(world, user, history, rng, first)


def _atelier_question(world: World, user: int, history: History, rng: np.random.Generator) -> Conversation:
    """A question of one of three kinds, each as often as the others."""
    kind = rng.choice(["family", "avoid", "picture"] if world.attributes else ["picture"])
    if kind == "family":
        family = str(rng.choice(list(FAMILIES)))
        liked = [
            world.phrase(a)
            for taste in world.tastes(user)
            for a in taste
            if world.attributes[a].startswith(f"{family}/")
        ]
        answer = " or ".join(dict.fromkeys(liked)) or "nothing in particular"
        return Conversation(history, f"Which {family} does this user like ?", answer)
    if kind == "avoid":
        return Conversation(history, AVOID_QUESTION, _phrases(world, world.dislikes(user)))
    return would(world, user, history, rng, bool(rng.integers(2)))


def _phrases(world: World, attributes: list[int]) -> str:
    return ", ".join(world.phrase(a) for a in attributes)
