"""Preference questions about the second edition's users, in the words that its tokenizer knows.

Which of two, whether, what the liked pictures share that the disliked ones lack, what is avoided, and which subject of
a class is the favourite. The third is answered by the history's pictures, the last two by what the user said.
"""

from __future__ import annotations

import numpy as np

from prefgen.atelier.world.subjects import CLASSES, SUBJECTS
from prefgen.mllm.prompt import AVOID_QUESTION

from .people_world import PeopleWorld
from .readers import Conversation
from .vqa.questions import Picture, traits_of
from .worlds import History

WHICH = "Which of these two would this user like more?"
SHARED = "What do the liked pictures share that the disliked ones lack?"
FAVOURITE = "What is this user's favourite {kind}?"
FIRST, SECOND = "first", "second"
NOTHING = "nothing in particular"
# Of what few pictures share there is much: the most telling ones are enough.
MOST_SHARED = 8
KINDS = ("which", "would", "shared", "avoid", "favourite")


def which(
    world: PeopleWorld, user: int, history: History, rng: np.random.Generator, first: bool
) -> Conversation | None:
    """Which of a liked and a disliked picture the user likes more, none of them in the history; None where the user has
    no other pictures. first: whether the first one is the liked one."""
    more = world.others(user, rng, history)
    unseen = [(number, liked) for number, liked in zip(more.pictures, more.liked, strict=True)]
    unseen = [(number, liked) for number, liked in unseen if number not in history.pictures]
    sides = [[number for number, liked in unseen if liked == verdict] for verdict in (first, not first)]
    if not all(sides):
        return None
    shown = np.array([side[0] for side in sides], np.int64)
    return Conversation(history, WHICH, FIRST if first else SECOND, shown)


def shared(world: PeopleWorld, history: History) -> Conversation | None:
    """What the liked pictures share that the disliked ones lack; None where they share nothing."""
    traits = traits_of(tuple(_pictures(world, history)), liked=True)[:MOST_SHARED]
    words = [world.phrase_of(trait.replace(" ", "/", 1)) for trait in traits]
    return Conversation(history, SHARED, ", ".join(words)) if words else None


def avoid(world: PeopleWorld, user: int, history: History) -> Conversation | None:
    """What the user avoids; None where no word says it."""
    words = [world.phrase(attribute) for attribute in world.dislikes(user)]
    return Conversation(history, AVOID_QUESTION, ", ".join(words)) if words else None


def favourite(world: PeopleWorld, user: int, history: History, rng: np.random.Generator) -> Conversation:
    """The favourite subject of a class: one that the user has in half of the questions."""
    favourites = world.person(user).favourites
    others = [kind for kind in CLASSES if kind not in favourites]
    kinds = list(favourites) if rng.random() < 0.5 else others
    kind = kinds[rng.integers(len(kinds))]
    answer = SUBJECTS[favourites[kind]] if kind in favourites else NOTHING
    return Conversation(history, FAVOURITE.format(kind=kind), answer)


def _pictures(world: PeopleWorld, history: History) -> list[Picture]:
    shown = [frozenset(world.index["attributes"][int(number)].as_py() or ()) for number in history.pictures]
    return [
        Picture("", bool(liked), prompt, attributes, False, 0, 0)
        for liked, prompt, attributes in zip(history.liked, history.prompts, shown, strict=True)
    ]
