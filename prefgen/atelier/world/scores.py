"""How well pictures suit a user, from what they show.

alignment: every opinion scores 0 for a picture without preference and 1 for a perfect one, by construction; the mean
over a user's opinions. specificity: how free a picture stays where the user has no opinion, 0 for a copy of the history
and 1 for a picture without preference. Neither says enough alone: their harmonic mean is the one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .prompts import OPEN, Prompt
from .scenes import Scene
from .subjects import CLASSES, COMPANIONS, SETTINGS
from .traits import CONTINUOUS, NAMED, visible
from .users import BAND, Example, Taste, User

# Of the distance of chance: a judge whose own error is larger can't say whether a picture suits a user in this trait.
# Taken off every distance, its error would make any picture perfect.
UNREAD = 0.5
LEAST_RANGE = 0.05  # of d(none) - d(cloner): below, a trait can't tell a copy from a free picture


@dataclass(frozen=True)
class Alignment:
    """Mean scores of one picture; None where the user has no such opinion that counts here."""

    named: float | None
    continuous: float | None
    semantic: float | None
    all: float


def liked_kind(shows: bool, kinds: int) -> float:
    """0 at chance, 1 where it is shown."""
    chance = 1 / kinds
    return (float(shows) - chance) / (1 - chance)


def avoided_kind(shows: bool, chance: float) -> float:
    """0 at chance, 1 where it isn't shown."""
    return 1 - float(shows) / chance


def liked_value(scene: Scene, name: str, centre: float, error: float = 0.0) -> float:
    """1 at the centre, 0 at the distance of chance; 0 where the picture doesn't show the trait.

    error: the judge's own mean distance from the truth, which is taken off.
    """
    trait = CONTINUOUS[name]
    if not visible(name, scene.kinds, scene.numbers):
        return 0.0
    distance = max(0.0, trait.distance(scene.numbers[name], centre) - error)
    return 1 - distance / trait.mean_distance(centre)


def unread(errors: Mapping[str, float]) -> list[str]:
    """The continuous traits that a judge with these mean distances from the truth can't read: no opinion about them is
    scored."""
    # Two random points lie a third of a line apart, or half of the largest distance on a circle.
    chance = {name: 1 / 2 if trait.period else 1 / 3 for name, trait in CONTINUOUS.items()}
    return [name for name, error in errors.items() if error > UNREAD * chance[name]]


def of_taste(scene: Scene, taste: Taste, errors: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """Scores of a taste's named likes, and of the continuous ones that the judge can read."""
    kinds = scene.kinds
    named = [liked_kind(kinds[trait] == kind, len(NAMED[trait])) for trait, kind in taste.named.items()]
    left_out = unread(errors)
    values = [
        liked_value(scene, name, centre, errors.get(name, 0.0))
        for name, centre in taste.values.items()
        if name not in left_out
    ]
    return named, values


def of_open_slots(scene: Scene, person: User, prompt: Prompt) -> list[float]:
    """Scores of favourites, aversions and company, where the prompt leaves them open."""
    scores = []
    if prompt.subject == OPEN and prompt.kind in person.favourites:
        scores.append(liked_kind(scene.subject == person.favourites[prompt.kind], len(CLASSES[prompt.kind])))
    if prompt.subject == OPEN and prompt.kind in person.aversions:
        scores.append(avoided_kind(scene.subject == person.aversions[prompt.kind], 1 / len(CLASSES[prompt.kind])))
    field, name = person.company
    if getattr(prompt, field) == OPEN:
        count = len(SETTINGS if field == "setting" else COMPANIONS) - 1
        scores.append(liked_kind(getattr(scene, field) == name, count))
    return scores


def alignment(scene: Scene, person: User, prompt: Prompt, errors: Mapping[str, float] = {}) -> Alignment:  # noqa: B006
    """How well one picture, or what a judge read off it, suits a user; by the taste that fits best."""
    kinds = scene.kinds
    trait, low, high = person.band
    avoided = [avoided_kind(kinds[name] == kind, 1 / len(NAMED[name])) for name, kind in person.avoided.items()]
    banned = [avoided_kind(low <= scene.numbers[trait] <= high, BAND)]
    if trait in unread(errors):
        banned = []
    elif not visible(trait, kinds, scene.numbers):
        banned = [0.0]
    semantic = of_open_slots(scene, person, prompt)
    by_taste = []
    for taste in person.tastes:
        named, values = of_taste(scene, taste, errors)
        every = float(np.mean([*named, *avoided, *values, *banned, *semantic]))
        by_taste.append(Alignment(_mean([*named, *avoided]), _mean([*values, *banned]), _mean(semantic), every))
    return max(by_taste, key=lambda score: score.all)


def _mean(scores: Sequence[float]) -> float | None:
    return float(np.mean(scores)) if scores else None


def distances(scene: Scene, liked: Sequence[Example], traits: Sequence[str]) -> np.ndarray:
    """Mean distance of a picture from a user's liked ones in each of some traits, [len(traits)], 0..1.

    Where one of two pictures doesn't show a continuous trait, they lie as far apart as chance.
    """
    kinds = scene.kinds
    numbers = scene.numbers
    rows = []
    for name in traits:
        if name in NAMED:
            rows.append([float(example.scene.kinds[name] != kinds[name]) for example in liked])
            continue
        trait = CONTINUOUS[name]
        seen = visible(name, kinds, numbers)
        rows.append(
            [
                trait.distance(numbers[name], other.numbers[name])
                if seen and visible(name, other.kinds, other.numbers)
                else trait.mean_distance(numbers[name])
                for other in (example.scene for example in liked)
            ]
        )
    return np.array(rows).mean(1)


def specificity(own: np.ndarray, none: np.ndarray, cloner: np.ndarray) -> float | None:
    """(d - d_cloner) / (d_none - d_cloner), both summed over a user's traits, clipped to 0..1.

    Mean distances [traits] from the liked pictures: of a method's pictures, of pictures without preference, of copies.
    Traits that don't tell the last two apart are left out; None if none is left. Summed before they are divided: trait
    by trait, the noise of a few pictures is as large as the room between a copy and a free picture, and clipping turns
    it into a loss (the renderer's own perfect pictures would score 0.87).
    """
    room = none - cloner
    telling = room >= LEAST_RANGE
    if not telling.any():
        return None
    return float(np.clip((own - cloner)[telling].sum() / room[telling].sum(), 0, 1))


def harmonic(alignment_mean: float, specificity_mean: float) -> float:
    """The one number of a row: harmonic mean of its two means, alignment clipped at 0."""
    one = max(0.0, alignment_mean)
    total = one + specificity_mean
    return 0.0 if total == 0 else 2 * one * specificity_mean / total
