"""What the MLLM is asked while it learns to read histories, and what it should answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prefgen.atelier.attributes import FAMILIES
from prefgen.files import file_sha256, read_text
from prefgen.mllm.prompt import AVOID_QUESTION, CLOSING_QUESTION

from .errors import DataError
from .readers import Conversation
from .schema import DISLIKED, LIKED, TRAIN
from .vqa.questions import ANSWERS, SIDE
from .vqa.questions import WOULD as WOULD_KIND
from .worlds import AtelierWorld, DataSetWorld, History, World

WOULD = "Would this user like this picture?"
NO, YES = "no", "yes"


def taste_answer(world: World, user: int) -> str:
    """The whole taste in words: every taste's liked attributes, then what is avoided; "" when unknown."""
    if not world.tastes(user):
        return ""
    liked = " or ".join(world.texts(user))
    avoided = ", ".join(world.phrase(a) for a in world.dislikes(user))
    return f"likes {liked} ; avoids {avoided}" if avoided else f"likes {liked}"


def closing(world: World, user: int, rng: np.random.Generator, liked: int, disliked: int) -> Conversation:
    """A history with the closing question."""
    return Conversation(world.history(user, rng, liked, disliked), CLOSING_QUESTION, taste_answer(world, user))


class Questions:
    """Other questions than the closing one. Of the atelier they are dealt: one family, what is avoided, whether the
    user would like one more picture. Of a data set they are those that `training.data.vqa` made of it, of one split."""

    def __init__(self, world: World, folder: Path | None, split: str = TRAIN):
        self.world, self.table, self.rows = world, None, {}
        if isinstance(world, DataSetWorld):
            self._open(world, folder, split)

    def _open(self, world: DataSetWorld, folder: Path | None, split: str) -> None:
        import json

        import pyarrow.parquet as pq

        if folder is None:
            raise DataError("data.questions is missing: make them by `python -m training.data.vqa DATA FOLDER`.")
        try:
            config = json.loads(read_text(folder / "report.json"))["config"]
            self.table = pq.read_table(folder / f"{split}.parquet", partitioning=None)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} holds no questions of training.data.vqa: run it on {world.folder}.") from error
        if config["source_sha256"] != file_sha256(world.folder / "manifest.json"):
            raise DataError(f"The questions in {folder} were made of another set than {world.folder}: make them anew.")
        places = zip(world.index["shard"].to_pylist(), world.index["row"].to_pylist(), strict=True)
        self.picture = {place: number for number, place in enumerate(places)}
        for row, user in enumerate(self.table["user"].to_pylist()):
            self.rows.setdefault(user, []).append(row)

    def ask(self, user: int, rng: np.random.Generator, liked: int, disliked: int) -> Conversation:
        """One question about a user."""
        if self.table is not None:
            if not len(self.table):
                raise DataError(
                    f"The questions made of {self.world.folder} are none, as of a set whose users dislike nothing: set "
                    "train_mllm.others=0."
                )
            return self._made(int(rng.choice(self.rows.get(user) or range(len(self.table)))))
        history = self.world.history(user, rng, liked, disliked)
        return self._dealt(self.world, user, history, rng)

    def closed(self, users: int, each: int, split: str) -> Iterator[tuple[int, str, Conversation]]:
        """(user, kind, question) of the first users' questions that two words can answer (data/vqa/questions.py).

        users: 0 for all. A data set has its own; of the atelier `each` a user are dealt, answers by turns.
        """
        if self.table is not None:
            for user in sorted(self.rows)[: users or None]:
                for row in self.rows[user]:
                    kind = self.table["kind"][row].as_py()
                    if kind in ANSWERS:
                        yield user, kind, self._made(row)
            return
        for user in self.world.users(split, users):
            for number in range(each):
                rng = np.random.default_rng([user, number, 43])
                sizes = rng.integers(*SIDE, size=2).tolist()
                history = self.world.history(user, rng, *sizes)
                yield user, WOULD_KIND, would(self.world, user, history, rng, bool((user + number) % 2))

    def _made(self, row: int) -> Conversation:
        found = self.table.slice(row, 1).to_pylist()[0]
        seen = found["history"]
        history = History(
            np.array([self.picture[p["shard"], p["row"]] for p in seen], np.int64),
            np.array([p["liked"] for p in seen], bool),
            [p["prompt"] or "" for p in seen],
        )
        shown = np.array([self.picture[p["shard"], p["row"]] for p in found["asked"]], np.int64)
        return Conversation(history, found["question"], found["answer"], shown)

    @staticmethod
    def _dealt(world: AtelierWorld, user: int, history: History, rng: np.random.Generator) -> Conversation:
        kind = rng.choice(["family", "avoid", "picture"])
        if kind == "family":
            family = str(rng.choice(list(FAMILIES)))
            found = [
                world.phrase(a)
                for taste in world.tastes(user)
                for a in taste
                if world.attributes[a].startswith(f"{family}/")
            ]
            answer = " or ".join(dict.fromkeys(found)) if found else "nothing in particular"
            return Conversation(history, f"Which {family} does this user like ?", answer)
        if kind == "avoid":
            return Conversation(history, AVOID_QUESTION, ", ".join(world.phrase(a) for a in world.dislikes(user)))
        liked = bool(rng.integers(2))
        return would(world, user, history, rng, liked)


def would(world: World, user: int, history: History, rng: np.random.Generator, liked: bool) -> Conversation:
    """Whether the user would like one more picture, which is not in the history where the user has another.

    DataError for a user without a picture of that verdict: any other picture's answer would be wrong.
    """
    more = world.history(user, rng, len(history.pictures) + 1, len(history.pictures) + 1)
    fresh = [p for p, verdict in zip(more.pictures, more.liked, strict=True) if verdict == liked]
    unseen = [p for p in fresh if p not in history.pictures]
    judged = unseen or fresh or history.pictures[history.liked == liked].tolist()
    if not judged:
        raise DataError(f"User {user} of {world.name} has no {LIKED if liked else DISLIKED} picture to be asked about.")
    picture = judged[0]
    return Conversation(history, WOULD, YES if liked else NO, np.array([picture], np.int64))
