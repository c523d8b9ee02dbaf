"""Questions about a history, each answerable from the history's pictures and from nothing else.

A kind of question is one function below `ask`, with its wordings and, where two words can answer it, its answers in the
line above it. Another wording is another string there; another kind is another such function, and nothing else has to
know of it.

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

WOULD = "would"
WHICH = "which"
SIDE = (2, 9)  # liked and disliked pictures of a history each, half open
# A trait of one side: at least this share of its pictures show it, and at most that share of the other side's.
OFTEN = 0.6
SELDOM = 0.34


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
    candidates = [picture for picture in pictures if picture.heldout == heldout]
    has_attributes = any(picture.attributes for picture in pictures)
    kinds = [kind for kind in KINDS.values() if has_attributes or kind.answers]
    for number in numbers:
        kind = kinds[number % len(kinds)]
        first_is_right = bool((user + number // len(kinds)) % 2)
        rng = np.random.default_rng([seed, user, number, 41])
        draft = kind.make(Material(pictures, candidates, first_is_right, rng))
        if draft is not None:
            wording = kind.wordings[rng.integers(len(kind.wordings))]
            yield number, Question(kind.name, wording, draft.answer, draft.history, draft.asked)


@dataclass(frozen=True)
class Material:
    """What a question is made of: all pictures of a user, those that it may ask about, and for a closed question
    whether the first of its two answers is to be the right one."""

    pictures: list[Picture]
    candidates: list[Picture]
    first_is_right: bool
    rng: np.random.Generator

    def pick(self, pictures: list[Picture]) -> Picture | None:
        """One of these; None of none."""
        return pictures[self.rng.integers(len(pictures))] if pictures else None

    def history(self, asked: tuple[Picture, ...] = ()) -> tuple[Picture, ...] | None:
        """Liked and disliked by turns, a random number of each, none held out, asked, or on an asked picture's prompt.
        None where too few are left."""
        # Pictures whose prompt nobody knows have none in common.
        barred = {normal_prompt(picture.prompt) for picture in asked} - {""}
        others = [p for p in self.pictures if not p.heldout and p not in asked]
        free = [p for p in others if normal_prompt(p.prompt) not in barred]
        sides = []
        for liked in (True, False):
            side = [picture for picture in free if picture.liked == liked]
            if len(side) < SIDE[0]:
                return None
            count = int(self.rng.integers(SIDE[0], min(SIDE[1], len(side) + 1)))
            sides.append([side[i] for i in self.rng.permutation(len(side))[:count]])
        # Each side is spread evenly over the history, whatever their numbers.
        places = [(i + 0.5) / len(side) for side in sides for i in range(len(side))]
        both = [*sides[0], *sides[1]]
        return tuple(both[i] for i in np.argsort(places, kind="stable"))


@dataclass(frozen=True)
class Draft:
    """A question without its words."""

    history: tuple[Picture, ...]
    answer: str
    asked: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of question. answers: the two of a closed one, else None. make: None where the pictures can't answer."""

    name: str
    wordings: tuple[str, ...]
    answers: tuple[str, str] | None
    make: Callable[[Material], Draft | None]


KINDS: dict[str, Kind] = {}  # in the order in which a user is asked
ANSWERS: dict[str, tuple[str, str]] = {}  # of the closed kinds


def question_kind(name: str, *wordings: str, answers: tuple[str, str] | None = None):
    """Decorator: makes a function one of KINDS."""

    def register(make: Callable[[Material], Draft | None]) -> Callable[[Material], Draft | None]:
        KINDS[name] = Kind(name, wordings, answers, make)
        if answers:
            ANSWERS[name] = answers
        return make

    return register


@question_kind(
    WOULD,
    "Would this user like this picture?",
    "Is this picture to this user's taste?",
    "Here is one more picture. Will this user like it?",
    answers=("yes", "no"),
)
def would(material: Material) -> Draft | None:
    """Whether the user would like one more picture."""
    picture = material.pick([p for p in material.candidates if p.liked == material.first_is_right])
    if picture is None:
        return None
    history = material.history((picture,))
    return Draft(history, "yes" if picture.liked else "no", (picture,)) if history else None


@question_kind(
    WHICH,
    "Which of these two would this user like, the first or the second?",
    "Two more pictures. Which one is to this user's taste, the first or the second?",
    "The first or the second: which picture would this user choose?",
    answers=("first", "second"),
)
def which(material: Material) -> Draft | None:
    """Which of a liked and a disliked picture the user likes, of one prompt where there are such."""
    liked = material.pick([p for p in material.candidates if p.liked])
    if liked is None:
        return None
    others = [p for p in material.candidates if not p.liked]
    of_prompt = [p for p in others if normal_prompt(p.prompt) == normal_prompt(liked.prompt)]
    disliked = material.pick(of_prompt or others)
    if disliked is None:
        return None
    asked = (liked, disliked) if material.first_is_right else (disliked, liked)
    history = material.history(asked)
    return Draft(history, "first" if material.first_is_right else "second", asked) if history else None


@question_kind(
    "shared",
    "What do the pictures that this user likes have in common?",
    "Which trait do the liked pictures share?",
    "What keeps coming back in the pictures that this user likes?",
)
def shared(material: Material) -> Draft | None:
    """Traits of the liked side."""
    return _traits(material, liked=True)


@question_kind(
    "avoid",
    AVOID_QUESTION,
    "Which trait do the disliked pictures share?",
    "What keeps coming back in the pictures that this user dislikes?",
)
def avoid(material: Material) -> Draft | None:
    """Traits of the disliked side."""
    return _traits(material, liked=False)


def _traits(material: Material, liked: bool) -> Draft | None:
    history = material.history()
    if history is None:
        return None
    traits = traits_of(history, liked)
    return Draft(history, ", ".join(traits)) if traits else None


@question_kind("describe", CLOSING_QUESTION, "Describe this user's taste.", "Put this user's taste into words.")
def describe(material: Material) -> Draft | None:
    """The traits of both sides, in the words of the closing question's answer."""
    history = material.history()
    if history is None:
        return None
    parts = []
    for verb, liked in (("likes", True), ("avoids", False)):
        traits = traits_of(history, liked)
        if traits:
            parts.append(f"{verb} {', '.join(traits)}")
    return Draft(history, " ; ".join(parts)) if parts else None


def traits_of(history: tuple[Picture, ...], liked: bool) -> tuple[str, ...]:
    """Attributes that most pictures of one side show and few of the other, the most telling first: "family name"."""
    own = [picture.attributes for picture in history if picture.liked == liked]
    other = [picture.attributes for picture in history if picture.liked != liked]
    own_counts, other_counts = (Counter(trait for shown in side for trait in shown) for side in (own, other))
    lift = {
        trait: count / len(own) - other_counts[trait] / max(1, len(other))
        for trait, count in own_counts.items()
        if count >= OFTEN * len(own) and other_counts[trait] <= SELDOM * len(other)
    }
    return tuple(trait.replace("/", " ", 1) for trait in sorted(lift, key=lambda trait: (-lift[trait], trait)))
