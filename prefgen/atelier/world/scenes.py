"""A scene: everything that a picture of the world shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .subjects import COMPANIONS, NUMBERS, SETTINGS, SUBJECTS
from .traits import CONTINUOUS, NAMED, random_traits


@dataclass(frozen=True)
class Scene:
    """What a picture shows. A pure description: the same scene is always the same picture.

    named: one kind for every named trait, in the order of NAMED; values: one number for every continuous trait, in the
    order of CONTINUOUS; seed: of what no trait says (where ornaments lie, small shifts).
    """

    subject: str
    number: str
    setting: str
    companion: str
    named: tuple[str, ...]
    values: tuple[float, ...]
    seed: int = 0

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each named trait."""
        return dict(zip(NAMED, self.named, strict=True))

    @property
    def numbers(self) -> dict[str, float]:
        """Value of each continuous trait."""
        return dict(zip(CONTINUOUS, self.values, strict=True))

    def with_traits(self, named: Mapping[str, str] = {}, values: Mapping[str, float] = {}, **changes) -> Scene:  # noqa: B006
        """The same scene with some traits, or other fields, changed."""
        kinds = self.kinds | dict(named)
        numbers = self.numbers | dict(values)
        return replace(
            self, named=tuple(kinds[t] for t in NAMED), values=tuple(numbers[t] for t in CONTINUOUS), **changes
        )


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with everything drawn uniformly, but most pictures hold one subject and half of them no companion."""
    kinds, values = random_traits(rng)
    number = NUMBERS[rng.choice(3, p=(0.7, 0.15, 0.15))]
    companion = "none" if rng.random() < 0.5 else _any(rng, COMPANIONS, skip=1)
    return Scene(
        subject=_any(rng, SUBJECTS),
        number=number,
        setting=_any(rng, SETTINGS),
        companion=companion,
        named=tuple(kinds.values()),
        values=tuple(values.values()),
        seed=int(rng.integers(2**31)),
    )


def _any(rng: np.random.Generator, names: Mapping[str, str], skip: int = 0) -> str:
    """One of the names, all equally likely, but the first `skip`."""
    return list(names)[skip + int(rng.integers(len(names) - skip))]
