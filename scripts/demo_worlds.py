"""What `make demo` shows of either edition of the embedded models: its users and prompts, and what its judge sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from prefgen.atelier import captions, models, users
from prefgen.atelier.editions import FIRST, SECOND
from prefgen.atelier.judge import load_judge
from prefgen.atelier.renderer import render
from prefgen.atelier.world import judge as second_judge
from prefgen.atelier.world import render as second_render
from prefgen.atelier.world import scores, tastes
from prefgen.atelier.world import users as second_users
from prefgen.atelier.world.subjects import CLASS_OF, SUBJECTS
from prefgen.atelier.world.traits import NAMED
from training.evaluation.world import requests

LIKED = 8
DISLIKED = 8
HISTORY_SEED = 1


class DemoWorld(Protocol):
    """One edition. side: of its pictures, in pixels; names: of users who have one; meaning: of its alignment, in a
    sentence."""

    side: int
    names: dict[int, str]
    meaning: str

    def people(self, count: int) -> list[Any]:
        """Users of the tests."""
        ...

    def prompts(self) -> list[Any]:
        """Prompts of the tests."""
        ...

    def text(self, prompt: Any) -> str:
        """A prompt in words."""
        ...

    def enriched(self, person: Any, prompt: Any) -> str:
        """The prompt with a user's true taste in it."""
        ...

    def history(self, person: Any) -> list[tuple[np.ndarray, bool]]:
        """(picture uint8 [H, W, 3], liked) of LIKED and DISLIKED pictures."""
        ...

    def opinions(self, person: Any) -> tuple[str, str]:
        """(likes, dislikes) in words."""
        ...

    def read(self, pictures: Sequence[np.ndarray], asked: Sequence[tuple[Any, Any]]) -> list[tuple[float, bool]]:
        """(alignment with the user, whether the subject is there) of pictures uint8 [H, W, 3]. asked: their (user,
        prompt)."""
        ...


class FirstWorld:
    """128 px; subjects and props, and attributes that words name."""

    side = FIRST.image_size
    names = {number: name.title() for name, number in users.EXAMPLE_USERS.items()}
    meaning = "Share of the user's liked attributes in the picture, less the share of disliked ones."

    def people(self, count: int) -> list[users.User]:
        """The bundled examples, who are on the sheet, then the others by number."""
        numbers = list(self.names)
        others = (number for number in itertools.count() if users.split(number) == "test" and number not in numbers)
        numbers += itertools.islice(others, max(0, count - len(numbers)))
        return [users.user(number) for number in numbers[:count]]

    def prompts(self) -> list[tuple[str, str]]:
        return captions.heldout_prompts()

    def text(self, prompt: tuple[str, str]) -> str:
        return captions.neutral(*prompt)

    def enriched(self, person: users.User, prompt: tuple[str, str]) -> str:
        return captions.enriched(*prompt, dict(person.tastes[0].liked))

    def history(self, person: users.User) -> list[tuple[np.ndarray, bool]]:
        examples = users.history(person, LIKED, DISLIKED, HISTORY_SEED)
        return [(render(example.scene), example.liked) for example in examples]

    def opinions(self, person: users.User) -> tuple[str, str]:
        sides = (person.tastes[0].liked, person.disliked)
        likes, dislikes = (", ".join(captions.taste_phrases(dict(side))) for side in sides)
        return likes, dislikes

    def read(self, pictures: Sequence[np.ndarray], asked: Sequence[tuple]) -> list[tuple[float, bool]]:
        readings = load_judge().read(np.stack(pictures))
        return [
            (users.alignment(reading["attributes"], person), reading["subject"] == prompt[0])
            for reading, (person, prompt) in zip(readings, asked, strict=True)
        ]


class SecondWorld:
    """256 px; tastes that words can't say, and prompts that leave something open. Users are the first ones that no
    choice was made with."""

    side = SECOND.image_size
    names: dict[int, str] = {}
    meaning = "0 is a picture without preference, 1 one that shows every opinion of the user."

    def people(self, count: int) -> list[second_users.User]:
        return requests.reported_users(count)

    def prompts(self) -> list:
        return requests.heldout_prompts()

    def text(self, prompt) -> str:
        return prompt.text

    def enriched(self, person: second_users.User, prompt) -> str:
        return tastes.enriched_text(person, person.tastes[0], prompt)

    def history(self, person: second_users.User) -> list[tuple[np.ndarray, bool]]:
        examples = second_users.history(person, LIKED, DISLIKED, HISTORY_SEED)
        return [(second_render.render(example.scene), example.liked) for example in examples]

    def opinions(self, person: second_users.User) -> tuple[str, str]:
        """Names, bins and favourites: what words can say of it."""
        favourites = [SUBJECTS[subject] for subject in person.favourites.values()]
        avoided = [NAMED[trait][kind] for trait, kind in person.avoided.items()]
        aversions = [SUBJECTS[subject] for subject in person.aversions.values()]
        likes = ", ".join([*tastes.taste_words(person.tastes[0]), *favourites])
        return likes, ", ".join([*avoided, *aversions])

    def read(self, pictures: Sequence[np.ndarray], asked: Sequence[tuple]) -> list[tuple[float, bool]]:
        """Of an open prompt any subject of its class is there."""
        pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1
        rows = []
        for reading, (person, prompt) in zip(second_judge.load_judge("b").read(pixels), asked, strict=True):
            subject = reading.scene.subject
            right = subject == prompt.subject if prompt.subject else CLASS_OF[subject] == prompt.kind
            rows.append((scores.alignment(reading.scene, person, prompt).all, right))
        return rows


def demo_world() -> DemoWorld:
    """The edition whose weights there are."""
    return SecondWorld() if models.edition() is SECOND else FirstWorld()
