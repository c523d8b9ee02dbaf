"""Simulated users over any vocabulary: about 50 weighted opinions each, and what their pictures show.

The paper (arXiv 2512.06020) gives each agent about 50 attributes and samples pairs of liked and disliked pictures; how
is not known. Here a few opinions are strong, as of the atelier's users (one attribute a family, one taste or two); the
others are mild and only lean a picture. Everything is a pure function of (vocabulary, seed, user, item).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prefgen.atelier import users as atelier_users

from ..schema import DISLIKED, LIKED, user_split
from .vocabulary import Vocabulary

OPINIONS = (45, 56)  # how many a user has, half open; fewer when the vocabulary has fewer
# Ranges of the weights; `shown` tells strong from mild by the lower end of STRONG.
STRONG = (0.6, 1.0)
MILD = (0.05, 0.3)
SHARPNESS = 6.0  # an attribute's odds in its family are exp(SHARPNESS * weight)
STRONG_FAMILIES = (6, 10)  # of one taste in a vocabulary of the real world, half open
SHOWN = 0.9  # a family with a strong opinion is shown so often, where pictures don't show every family
SHOWN_OTHERS = 2  # families without one that a picture shows on average, at most


@dataclass(frozen=True)
class Agent:
    """tastes: one or two float32 [attributes] of liking, 0..1. dislikes: float32 [attributes], 0..1."""

    id: int
    tastes: tuple[np.ndarray, ...]
    dislikes: np.ndarray

    @property
    def split(self) -> str:
        """TRAIN or TEST."""
        return user_split(self.id)


@dataclass(frozen=True)
class Item:
    """One picture to be made. key: the prompt's, for the renderer; attributes: indices in the vocabulary."""

    user: int
    number: int
    liked: bool
    key: str
    prompt: str
    attributes: tuple[int, ...]
    seed: int

    @property
    def verdict(self) -> str:
        """LIKED or DISLIKED."""
        return LIKED if self.liked else DISLIKED

    @property
    def picture(self) -> str:
        """Its name in the set."""
        return f"{self.user:07d}-{self.number:03d}"


def picture_count(user: int, users: int, pictures: int) -> int:
    """Pictures of a user, so that the counts of all users sum to `pictures` exactly and differ by one at most."""
    return (user + 1) * pictures // users - user * pictures // users


def heldout_pair(count: int) -> int:
    """The pair that evaluation asks about: the last complete one (items 2 * pair and 2 * pair + 1); -1 for none.

    A user with fewer than two pairs keeps all pictures in the history.
    """
    return count // 2 - 1 if count >= 4 else -1


def agent(vocabulary: Vocabulary, seed: int, user: int) -> Agent:
    """The user of an id. In the atelier the strong opinions are those of `prefgen.atelier.users.user`."""
    rng = np.random.default_rng([seed, user, 31])
    if vocabulary.name == "atelier":
        liked, disliked = _atelier_opinions(vocabulary, seed, user)
    else:
        liked, disliked = _strong_opinions(vocabulary, rng)
    tastes = tuple(np.zeros(len(vocabulary.keys), np.float32) for _ in liked)
    dislikes = np.zeros(len(vocabulary.keys), np.float32)
    for weights, attributes in zip([*tastes, dislikes], [*liked, disliked], strict=True):
        weights[attributes] = rng.uniform(*STRONG, len(attributes))
    _add_mild_opinions(vocabulary, rng, tastes, dislikes)
    return Agent(user, tastes, dislikes)


def _atelier_opinions(vocabulary: Vocabulary, seed: int, user: int) -> tuple[list[list[int]], list[int]]:
    """Attributes that each taste likes strongly, and those that are disliked strongly, of the atelier's own users."""
    person = atelier_users.user(user, seed)

    def indices(pairs) -> list[int]:
        return [vocabulary.index[f"{family}/{name}"] for family, name in pairs]

    return [indices(taste.liked) for taste in person.tastes], indices(person.disliked)


def _strong_opinions(vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[list[list[int]], list[int]]:
    """The same for any vocabulary: an attribute in each of 6 to 9 families, for the dislikes and for each taste."""
    disliked = _one_a_family(vocabulary, rng, set())
    tastes = [_one_a_family(vocabulary, rng, set(disliked))]
    if rng.random() < atelier_users.TWO_TASTES:
        tastes.append(_one_a_family(vocabulary, rng, set(disliked) | set(tastes[0])))
    return tastes, disliked


def _one_a_family(vocabulary: Vocabulary, rng: np.random.Generator, taken: set[int]) -> list[int]:
    """Different families, one attribute each, none taken and no two that exclude each other."""
    chosen: list[int] = []
    count = min(int(rng.integers(*STRONG_FAMILIES)), len(vocabulary.families))
    for family in rng.permutation(len(vocabulary.families))[:count].tolist():
        start, stop = vocabulary.families[family]
        barred = taken.union(*(vocabulary.excludes[i] for i in chosen))
        free = [i for i in range(start, stop) if i not in barred]
        if free:
            chosen.append(free[rng.integers(len(free))])
    return chosen


def _add_mild_opinions(
    vocabulary: Vocabulary, rng: np.random.Generator, tastes: tuple[np.ndarray, ...], dislikes: np.ndarray
) -> None:
    """Fill up to OPINIONS with mild likings and dislikes, half and half, of attributes without an opinion."""
    strong = set(np.flatnonzero(np.maximum.reduce([*tastes, dislikes])).tolist())
    count = max(0, int(rng.integers(*OPINIONS)) - len(strong))
    others = [attribute for attribute in rng.permutation(len(vocabulary.keys)).tolist() if attribute not in strong]
    for attribute in others[:count]:
        weights = tastes[rng.integers(len(tastes))] if rng.random() < 0.5 else dislikes
        # A taste doesn't like two attributes that exclude each other: the second is disliked instead.
        if weights is not dislikes and any(weights[other] for other in vocabulary.excludes[attribute]):
            weights = dislikes
        weights[attribute] = rng.uniform(*MILD)


def items(vocabulary: Vocabulary, person: Agent, seed: int, numbers: Iterable[int]) -> list[Item]:
    """These pictures of a user: liked (even numbers) and disliked by turns, each two on the same prompt."""
    return [_item(vocabulary, person, seed, number) for number in numbers]


def _item(vocabulary: Vocabulary, person: Agent, seed: int, number: int) -> Item:
    prompts = vocabulary.prompts[person.split]
    key, prompt = prompts[np.random.default_rng([seed, person.id, number // 2, 32]).integers(len(prompts))]
    rng = np.random.default_rng([seed, person.id, number, 33])
    liked = number % 2 == 0
    attributes = shown(vocabulary, person, liked, rng)
    return Item(person.id, number, liked, key, prompt, attributes, int(rng.integers(2**31)))


def shown(vocabulary: Vocabulary, person: Agent, liked: bool, rng: np.random.Generator) -> tuple[int, ...]:
    """Attributes of one picture, at most one a family, none excluding another.

    A liked picture follows one taste and shows nothing that is strongly disliked; a disliked one shows at least two
    strong dislikes, and likings of either taste less often than chance would.
    """
    if liked:
        opinion = person.tastes[rng.integers(len(person.tastes))] - person.dislikes
    else:
        opinion = person.dislikes - np.maximum.reduce(person.tastes)
    while True:
        attributes = _draw(vocabulary, opinion, rng)
        strong_dislikes = (person.dislikes[list(attributes)] >= STRONG[0]).sum()
        if (strong_dislikes == 0) if liked else (strong_dislikes >= 2):
            return attributes


def _draw(vocabulary: Vocabulary, opinion: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """One attribute of each family that the picture shows. opinion: float32 [attributes], -1..1."""
    # Gumbel's trick: the highest noisy score of a family is a draw with odds exp(SHARPNESS * opinion).
    score = SHARPNESS * opinion + rng.gumbel(size=len(opinion))
    if vocabulary.every_family:
        return tuple(int(start + score[start:stop].argmax()) for start, stop in vocabulary.families)
    families = len(vocabulary.families)
    cared_for = np.zeros(families, bool)
    cared_for[vocabulary.family_of[opinion >= STRONG[0]]] = True
    is_shown = rng.random(families) < np.where(cared_for, SHOWN, SHOWN_OTHERS / families)
    chosen: list[int] = []
    # Families with a strong opinion choose first, so that a chance attribute never keeps one out.
    for family in sorted(np.flatnonzero(is_shown).tolist(), key=lambda family: not cared_for[family]):
        start, stop = vocabulary.families[family]
        for attribute in chosen:
            score[list(vocabulary.excludes[attribute])] = -np.inf
        best = int(start + score[start:stop].argmax())
        if np.isfinite(score[best]):
            chosen.append(best)
    return tuple(sorted(chosen))
