"""Simulated users: what they like and dislike, the histories they leave, and how well a picture suits them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import captions
from .attributes import FAMILIES
from .renderer import Scene, random_scene

# Probabilities: that a liked picture shows a liked attribute, a disliked one a disliked attribute, and that a user has
# two tastes.
LIKED_PRESENT = 0.9
DISLIKED_PRESENT = 0.8
TWO_TASTES = 0.2

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Taste:
    """Liked (family, name) pairs, at most one a family."""

    liked: Pairs


@dataclass(frozen=True)
class User:
    """One or two tastes, and what is disliked in either."""

    id: int
    tastes: tuple[Taste, ...]
    disliked: Pairs


@dataclass(frozen=True)
class Example:
    """One picture of a history: its scene, the verdict, the prompt it was made with."""

    scene: Scene
    liked: bool
    prompt: str


def split(user_id: int) -> str:
    """ "train" or "test" (one in ten), by a hash of the id, so that no user is ever in both."""
    # 26 of a byte's 256 values.
    return "test" if hashlib.sha256(f"user {user_id}".encode()).digest()[0] < 26 else "train"


def user(user_id: int, seed: int = 0) -> User:
    """The user of an id: a pure function."""
    rng = np.random.default_rng([seed, user_id, 77])
    disliked = _pairs(rng, set())
    first = _pairs(rng, set(disliked))
    tastes = [Taste(first)]
    while rng.random() < TWO_TASTES and len(tastes) == 1:
        second = _pairs(rng, set(disliked) | set(first))
        if len({f for f, _ in second}) >= 3:
            tastes.append(Taste(second))
    return User(user_id, tuple(tastes), disliked)


def _pairs(rng: np.random.Generator, excluded: set) -> Pairs:
    """One attribute in each of 4 to 6 families, none of the excluded ones."""
    families = rng.choice(list(FAMILIES), int(rng.integers(4, 7)), replace=False)
    pairs = []
    for family in families.tolist():
        names = [a.name for a in FAMILIES[family] if (family, a.name) not in excluded]
        pairs.append((family, names[rng.integers(len(names))]))
    return tuple(sorted(pairs, key=lambda pair: list(FAMILIES).index(pair[0])))


def history(person: User, n_liked: int, n_disliked: int, seed: int, prompts=None) -> list[Example]:
    """Liked, then disliked examples.

    A liked picture follows one taste (each attribute with p = 0.9) and shows nothing disliked. A disliked one shows
    each disliked attribute with p = 0.8, at least two, and liked attributes half as often as chance would. All else
    is uniform. Item i is a pure function of (user, verdict, i, seed): a longer history begins with the shorter one.
    """
    prompts = captions.train_prompts() if prompts is None else prompts
    examples = []
    for liked, count in ((True, n_liked), (False, n_disliked)):
        for i in range(count):
            rng = np.random.default_rng([seed, person.id, int(liked), i])
            subject, prop = prompts[rng.integers(len(prompts))]
            scene = (_liked_scene if liked else _disliked_scene)(person, rng, subject, prop)
            examples.append(Example(scene, liked, captions.neutral(subject, prop)))
    return examples


def _liked_scene(person: User, rng, subject: str, prop: str) -> Scene:
    taste = person.tastes[rng.integers(len(person.tastes))]
    shown = {family: name for family, name in taste.liked if rng.random() < LIKED_PRESENT}
    while True:
        scene = random_scene(rng, subject, prop, shown)
        if not set(person.disliked) & set(scene.attributes):
            return scene


def _disliked_scene(person: User, rng, subject: str, prop: str) -> Scene:
    liked = {pair for taste in person.tastes for pair in taste.liked}
    while True:
        shown = {family: name for family, name in person.disliked if rng.random() < DISLIKED_PRESENT}
        scene = random_scene(rng, subject, prop, shown)
        if len(shown) >= 2 and all(rng.random() < 0.5 for _ in liked & set(scene.attributes)):
            return scene


def alignment(attributes: Mapping[str, str], person: User) -> float:
    """Share of the liked families satisfied (by the taste that fits best) minus share of disliked attributes present.

    attributes: {family: name} read off a picture. Returns -1..1.
    """
    satisfied = max(np.mean([attributes[f] == n for f, n in taste.liked]) for taste in person.tastes)
    present = np.mean([attributes[f] == n for f, n in person.disliked])
    return float(satisfied - present)


def _examples() -> dict[str, int]:
    """Three test users whose first tastes name three different palettes, in order of id."""
    by_palette: dict[str, int] = {}
    number = 0
    while len(by_palette) < 3:
        person = user(number)
        palette = dict(person.tastes[0].liked).get("palette")
        if split(number) == "test" and len(person.tastes) == 1 and palette:
            by_palette.setdefault(palette, number)
        number += 1
    return dict(zip(("ada", "bruno", "chiyo"), by_palette.values(), strict=True))


EXAMPLE_USERS: dict[str, int] = _examples()
