"""Histories of simulated users, sampled from the pool.

Drawing every history anew would cost more than all of the training. A user's history is therefore sampled from the pool
with the weights that `prefgen.atelier.users.history` would have drawn with, so that any number of users share one set
of cached features and latents.
"""

from __future__ import annotations

import itertools

import numpy as np

from prefgen.atelier.attributes import FAMILIES
from prefgen.atelier.users import DISLIKED_PRESENT, LIKED_PRESENT, Taste, User, split, user

FAMILY_INDEX = {family: i for i, family in enumerate(FAMILIES)}
NAME_INDEX = {(family, a.name): i for family, values in FAMILIES.items() for i, a in enumerate(values)}
ATTRIBUTE_INDEX = {key: i for i, key in enumerate(NAME_INDEX)}
SIZES = np.array([len(values) for values in FAMILIES.values()])


def users_of(part: str, count: int) -> list[User]:
    """The first `count` users of a split ("train" or "test")."""
    ids = (number for number in itertools.count() if split(number) == part)
    return [user(number) for number in itertools.islice(ids, count)]


class PoolSampler:
    """Samples histories and liked pictures of users from a pool.

    attributes [n, families]: class numbers of the pool's pictures.
    """

    def __init__(self, attributes: np.ndarray):
        self.attributes = attributes
        self.columns = [np.ascontiguousarray(column) for column in attributes.T]

    def history(self, person: User, n_liked: int, n_disliked: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """(indices [n], verdicts bool [n]) of one history, liked and disliked interleaved."""
        tastes = rng.integers(len(person.tastes), size=n_liked)
        liked = np.concatenate(
            [self.liked(person, taste, int((tastes == i).sum()), rng) for i, taste in enumerate(person.tastes)]
        )
        rng.shuffle(liked)
        disliked = self.disliked(person, n_disliked, rng)
        order = interleaved(n_liked, n_disliked)
        return np.concatenate([liked, disliked])[order], order < n_liked

    def liked(self, person: User, taste: Taste, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices [count] of different pictures of one taste, none with a disliked attribute."""
        weight = self._log_weight(taste.liked, LIKED_PRESENT)
        weight[self._matches(person.disliked) > 0] = -np.inf
        return gumbel_top(weight, count, rng)

    def disliked(self, person: User, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices [count] of different pictures with at least two disliked attributes, liked ones half as often."""
        weight = self._log_weight(person.disliked, DISLIKED_PRESENT)
        weight[self._matches(person.disliked) < 2] = -np.inf
        liked = {pair for taste in person.tastes for pair in taste.liked}
        return gumbel_top(weight + np.log(0.5) * self._matches(liked), count, rng)

    def _log_weight(self, pairs, present: float) -> np.ndarray:
        """Log weight [n] of pictures in which each (family, name) is present with probability `present`."""
        weight = np.zeros(len(self.attributes), np.float32)
        for family, name in pairs:
            size = SIZES[FAMILY_INDEX[family]]
            shows = self.columns[FAMILY_INDEX[family]] == NAME_INDEX[family, name]
            # The pool is uniform in each family, so a class of `size` has to become present * size times as likely.
            weight += np.where(shows, np.log(present * size), np.log((1 - present) * size / (size - 1)))
        return weight

    def _matches(self, pairs) -> np.ndarray:
        """How many of the pairs each picture shows, [n]."""
        return sum((self.columns[FAMILY_INDEX[f]] == NAME_INDEX[f, n]).astype(np.int8) for f, n in pairs)


def interleaved(n_liked: int, n_disliked: int) -> np.ndarray:
    """Order in which a history is shown: liked and disliked by turns; entries below n_liked are the liked ones."""
    return np.argsort(np.concatenate([np.arange(n_liked), np.arange(n_disliked) + 0.5]), kind="stable")


def gumbel_top(log_weight: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` different indices with probabilities in proportion to exp(log_weight)."""
    if count == 0:
        return np.empty(0, np.int64)
    # The Gumbel top-k trick (arXiv 1903.06059): minus the log of an exponential draw is a Gumbel draw.
    keys = log_weight - np.log(rng.exponential(size=len(log_weight)).astype(np.float32))
    return np.argpartition(-keys, count)[:count]
