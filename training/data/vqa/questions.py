"""Questions about a history, each answerable from the history's pictures and from nothing else.

A pure function of (seed, user, number). No picture with the asked one's prompt stands in its history: where each prompt
has one liked and one disliked picture of a user, the subject alone would give the answer away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from prefgen.mllm.prompt import AVOID_QUESTION, CLOSING_QUESTION

from ..schema import normal_prompt

WOULD, WHICH, SHARED, AVOID, DESCRIBE = "would", "which", "shared", "avoid", "describe"
TEMPLATES = {
    WOULD: (
        "Would this user like this picture?",
        "Is this picture to this user's taste?",
        "Here is one more picture. Will this user like it?",
    ),
    WHICH: (
        "Which of these two would this user like, the first or the second?",
        "Two more pictures. Which one is to this user's taste, the first or the second?",
        "The first or the second: which picture would this user choose?",
    ),
    SHARED: (
        "What do the pictures that this user likes have in common?",
        "Which trait do the liked pictures share?",
        "What keeps coming back in the pictures that this user likes?",
    ),
    AVOID: (
        AVOID_QUESTION,
        "Which trait do the disliked pictures share?",
        "What keeps coming back in the pictures that this user dislikes?",
    ),
    DESCRIBE: (CLOSING_QUESTION, "Describe this user's taste.", "Put this user's taste into words."),
}
CLOSED = (WOULD, WHICH)  # answered by one of two words
ANSWERS = {WOULD: ("yes", "no"), WHICH: ("first", "second")}
SIDE = (2, 9)  # liked and disliked pictures of a history each, half open
OFTEN, SELDOM = 0.6, 0.34  # a trait of one side: share of its pictures that show it at least, of the other's at most


@dataclass(frozen=True)
class Picture:
    """One judged picture of a user, and where it lies."""

    picture: str
    liked: bool
    prompt: str
    attributes: frozenset[str]
    heldout: bool
    shard: int
    row: int


@dataclass(frozen=True)
class Question:
    """history: by turns liked and disliked. asked: the pictures that the question shows, after the history."""

    kind: str
    question: str
    answer: str
    history: tuple[Picture, ...]
    asked: tuple[Picture, ...]


def ask(
    pictures: list[Picture], seed: int, user: int, numbers: Iterable[int], heldout: bool
) -> Iterator[tuple[int, Question]]:
    """(number, question) of one user, by turns of every kind; those that the pictures can't answer are left out.

    heldout: closed questions ask about the user's held-out pictures, otherwise about those of the history. Their
    answers alternate with the user and the number, so that a set of them is in balance.
    """
    candidates = [p for p in pictures if p.heldout == heldout]
    kinds = list(TEMPLATES) if any(p.attributes for p in pictures) else list(CLOSED)
    for number in numbers:
        rng = np.random.default_rng([seed, user, number, 41])
        kind = kinds[number % len(kinds)]
        made = _MAKERS[kind](pictures, candidates, rng, bool((user + number // len(kinds)) % 2))
        if made is not None:
            history, asked, answer = made
            templates = TEMPLATES[kind]
            yield number, Question(kind, templates[rng.integers(len(templates))], answer, history, asked)


Made = tuple[tuple[Picture, ...], tuple[Picture, ...], str] | None


def _would(pictures: list[Picture], candidates: list[Picture], rng: np.random.Generator, first: bool) -> Made:
    asked = _some([p for p in candidates if p.liked == first], rng)
    history = _history(pictures, rng, asked) if asked else None
    return (history, asked, ANSWERS[WOULD][not first]) if history else None


def _which(pictures: list[Picture], candidates: list[Picture], rng: np.random.Generator, first: bool) -> Made:
    liked = _some([p for p in candidates if p.liked], rng)
    others = [p for p in candidates if not p.liked]
    same = [p for p in others if liked and normal_prompt(p.prompt) == normal_prompt(liked[0].prompt)]
    disliked = _some(same or others, rng)
    asked = (*liked, *disliked) if first else (*disliked, *liked)
    history = _history(pictures, rng, asked) if liked and disliked else None
    return (history, asked, ANSWERS[WHICH][not first]) if history else None


def _shared(pictures: list[Picture], _, rng: np.random.Generator, __) -> Made:
    history = _history(pictures, rng)
    traits = history and traits_of(history, liked=True)
    return (history, (), ", ".join(traits)) if traits else None


def _avoid(pictures: list[Picture], _, rng: np.random.Generator, __) -> Made:
    history = _history(pictures, rng)
    traits = history and traits_of(history, liked=False)
    return (history, (), ", ".join(traits)) if traits else None


def _describe(pictures: list[Picture], _, rng: np.random.Generator, __) -> Made:
    history = _history(pictures, rng)
    liked, avoided = (traits_of(history, side) if history else () for side in (True, False))
    words = [f"likes {', '.join(liked)}"] if liked else []
    words += [f"avoids {', '.join(avoided)}"] if avoided else []
    return (history, (), " ; ".join(words)) if words else None


_MAKERS: dict[str, Callable[[list[Picture], list[Picture], np.random.Generator, bool], Made]] = {
    WOULD: _would,
    WHICH: _which,
    SHARED: _shared,
    AVOID: _avoid,
    DESCRIBE: _describe,
}


def traits_of(history: tuple[Picture, ...], liked: bool) -> tuple[str, ...]:
    """Attributes that most pictures of one side show and few of the other, the most telling first: "family name"."""
    sides = [p.attributes for p in history if p.liked == liked], [p.attributes for p in history if p.liked != liked]
    here, there = (Counter(attribute for shown in side for attribute in shown) for side in sides)
    lift = {
        attribute: count / len(sides[0]) - there[attribute] / max(1, len(sides[1]))
        for attribute, count in here.items()
        if count >= OFTEN * len(sides[0]) and there[attribute] <= SELDOM * len(sides[1])
    }
    return tuple(a.replace("/", " ", 1) for a in sorted(lift, key=lambda a: (-lift[a], a)))


def _some(pictures: list[Picture], rng: np.random.Generator) -> tuple[Picture, ...]:
    """One picture; nothing of nothing."""
    return (pictures[rng.integers(len(pictures))],) if pictures else ()


def _history(
    pictures: list[Picture], rng: np.random.Generator, asked: tuple[Picture, ...] = ()
) -> tuple[Picture, ...] | None:
    """Liked and disliked by turns, a random number of each, none held out, asked, or on an asked picture's prompt."""
    barred = {normal_prompt(p.prompt) for p in asked}
    free = [p for p in pictures if not p.heldout and normal_prompt(p.prompt) not in barred]
    sides = []
    for liked in (True, False):
        side = [p for p in free if p.liked == liked]
        if len(side) < SIDE[0]:
            return None
        wanted = int(rng.integers(SIDE[0], min(SIDE[1], len(side) + 1)))
        sides.append([side[i] for i in rng.permutation(len(side))[:wanted]])
    places = [((i + 0.5) / len(side), i) for side in sides for i in range(len(side))]
    order = np.argsort([place for place, _ in places], kind="stable")
    both = [*sides[0], *sides[1]]
    return tuple(both[i] for i in order)
