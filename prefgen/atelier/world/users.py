"""Simulated users: what they like and dislike, what they happen to ask for, and the histories they leave.

Opinions are of three kinds, about nine in all: named (a palette), continuous (how bold a line, at which angle hatching
runs) and semantic (which animal, where a prompt says "an animal"). Habits are traits that most of a user's pictures
share, liked and disliked alike, without an opinion about them: only the difference of liked and disliked tells a habit
from a taste. Everything is a pure function of the user's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .prompts import HELD_OUT_SUBJECTS, OPEN, Prompt, random_prompt
from .scenes import Scene, random_scene
from .subjects import CLASSES, COMPANIONS, SETTINGS
from .traits import CONTINUOUS, NAMED

TOLERANCE = 0.12  # of the range: how far from its centre a liked value may lie
FOLLOWED = 0.9  # share of a liked picture's liked traits that it shows
HABIT = 0.8  # share of a user's pictures that show a habit
TWO_TASTES = 0.2
WITH_HABITS = 0.5
MOSTLY_DISLIKES = 1 / 3
BAND = 0.3  # width of a disliked band, of the range
HARD = 0.5  # share of the disliked pictures that are hard negatives; the others are only wrong
SHARED = 0.6  # share of the liked traits that a hard negative shows before something is made wrong
OWN_SLOTS = 0.4  # share of a history's prompts that leave open what the user has an opinion about
AWAY = 0.35  # how far, of the range, a hard negative moves a liked value

# What named trait a continuous one needs to be seen at all.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stroke_width": ("line", ("ink", "coloured", "sticker")),
    "wobble": ("shape", ("drawn", "cutout")),
    "wavelength": ("shape", ("drawn", "cutout")),
    "roundness": ("shape", ("drawn", "cutout")),
    "density": ("ornament", ("stars", "confetti", "bubbles", "leaves")),
    "spacing": ("fill", ("hatched", "halftone")),
    "hatch_angle": ("fill", ("hatched",)),
    "light_angle": ("light", ("side", "shadow")),
    "saturation": ("palette", tuple(name for name in NAMED["palette"] if name != "monochrome")),
    "hue": ("palette", tuple(name for name in NAMED["palette"] if name != "monochrome")),
}


@dataclass(frozen=True)
class Taste:
    """What is liked together. named: {trait: kind}; values: {trait: centre}."""

    named: Mapping[str, str]
    values: Mapping[str, float]


@dataclass(frozen=True)
class User:
    """One or two tastes, and what holds beside either.

    avoided: {named trait: kind}; band: (continuous trait, low, high) that is disliked; favourites and aversions:
    {class: subject}; company: ("setting" or "companion", name) that is liked where a prompt leaves it open; habits: a
    taste in form alone, without an opinion; few_likes: knows mostly what it dislikes.
    """

    id: int
    tastes: tuple[Taste, ...]
    avoided: Mapping[str, str]
    band: tuple[str, float, float]
    favourites: Mapping[str, str]
    aversions: Mapping[str, str]
    company: tuple[str, str]
    habits: Taste
    few_likes: bool

    def opinions(self) -> set[str]:
        """Traits that the user has an opinion about, and those that must be so for a liked one to be seen."""
        return _needed(list(self.tastes)) | set(self.avoided) | {self.band[0]}


@dataclass(frozen=True)
class Example:
    """One picture of a history: its scene, the verdict, the prompt that it was made with."""

    scene: Scene
    liked: bool
    prompt: Prompt


def split(user_id: int) -> str:
    """ "train" or "test" (one in ten), by a hash of the number, so that no user is ever in both."""
    return "test" if hashlib.sha256(f"user {user_id}".encode()).digest()[0] < 26 else "train"


def user(user_id: int) -> User:
    """The user of a number."""
    rng = np.random.default_rng([2, user_id])
    tastes = [_taste(rng)]
    if rng.random() < TWO_TASTES:
        tastes.append(_taste(rng))
    taken = _needed(tastes)
    free = [name for name in NAMED if name not in taken]
    avoided = {}
    if free:
        trait = free[rng.integers(len(free))]
        avoided[trait] = _any(rng, NAMED[trait])
    taken |= set(avoided)
    band = _band(rng, [name for name in CONTINUOUS if name not in taken])
    taken.add(band[0])
    loved, hated = rng.choice(list(CLASSES), 2, replace=False)
    favourites = {str(loved): _favourite(rng, str(loved), split(user_id))}
    aversions = {str(hated): _any(rng, CLASSES[str(hated)])}
    where = "setting" if rng.random() < 0.5 else "companion"
    company = (where, _any(rng, [name for name in (SETTINGS if where == "setting" else COMPANIONS) if name != "none"]))
    habits = _habits(rng, taken) if rng.random() < WITH_HABITS else Taste({}, {})
    few_likes = bool(rng.random() < MOSTLY_DISLIKES)
    return User(user_id, tuple(tastes), avoided, band, favourites, aversions, company, habits, few_likes)


def _needed(tastes: list[Taste]) -> set[str]:
    """Traits of the tastes, and those that must be so for them to be seen."""
    values = {name for taste in tastes for name in taste.values}
    named = {name for taste in tastes for name in taste.named}
    hidden = {NEEDS[name][0] for name in values & set(NEEDS)} | ({"wobble"} if "wavelength" in values else set())
    return values | named | hidden


def _any(rng: np.random.Generator, names) -> str:
    return list(names)[rng.integers(len(names))]


def _favourite(rng: np.random.Generator, kind: str, part: str) -> str:
    """A subject of a class; in training none of those that are held out."""
    return _any(rng, [name for name in CLASSES[kind] if part == "test" or name not in HELD_OUT_SUBJECTS])


def _taste(rng: np.random.Generator) -> Taste:
    """Two or three named likes and four or five liked values; what a value needs to be seen is liked with it."""
    named: dict[str, str] = {}
    values: dict[str, float] = {}
    # Traits without words are twice as likely: what words can say is little of what people mean by taste.
    weights = np.array([1.0 if trait.bins else 2.0 for trait in CONTINUOUS.values()])
    count = int(rng.integers(4, 6))
    for trait in rng.choice(list(CONTINUOUS), count, replace=False, p=weights / weights.sum()).tolist():
        needed, kinds = NEEDS.get(trait, ("", ()))
        if needed and named.get(needed, kinds[0]) not in kinds:
            continue
        if len(kinds) == 1 or trait == "light_angle":
            named[needed] = _any(rng, kinds)
        values[trait] = float(rng.uniform(CONTINUOUS[trait].low, CONTINUOUS[trait].high))
    for trait in rng.permutation(list(NAMED)).tolist():
        if len(named) >= 2 + rng.integers(2):
            break
        allowed = _allowed(trait, values)
        if trait not in named and allowed:
            named[trait] = _any(rng, allowed)
    return Taste(named, values)


def _allowed(trait: str, values: Mapping[str, float]) -> list[str]:
    """The kinds of a named trait under which all these continuous ones are seen."""
    needs = [set(kinds) for name, (needed, kinds) in NEEDS.items() if needed == trait and name in values]
    return [kind for kind in NAMED[trait] if all(kind in kinds for kinds in needs)]


def _band(rng: np.random.Generator, free: list[str]) -> tuple[str, float, float]:
    trait = CONTINUOUS[free[rng.integers(len(free))]]
    width = BAND * (trait.high - trait.low)
    low = float(rng.uniform(trait.low, trait.high - width))
    return trait.name, low, low + width


def _habits(rng: np.random.Generator, taken: set[str]) -> Taste:
    """One named and one continuous trait that most of the pictures share, outside all opinions."""
    named = [name for name in NAMED if name not in taken]
    values = [
        name for name in CONTINUOUS if name not in taken and name not in ("wavelength", "hatch_angle", "light_angle")
    ]
    kinds = {}
    if named:
        trait = _any(rng, named)
        kinds[trait] = _any(rng, NAMED[trait])
    numbers = {}
    if values:
        name = _any(rng, values)
        numbers[name] = float(rng.uniform(CONTINUOUS[name].low, CONTINUOUS[name].high))
    return Taste(kinds, numbers)


# --- scenes that follow a taste ---


def near(rng: np.random.Generator, name: str, centre: float, width: float = TOLERANCE) -> float:
    """A value of a continuous trait within `width` of its centre; ranges wrap around or end."""
    trait = CONTINUOUS[name]
    span = trait.high - trait.low
    value = centre + rng.uniform(-width, width) * span
    if trait.period:
        return float(trait.low + (value - trait.low) % span)
    return float(np.clip(value, trait.low, trait.high))


def follow(
    scene: Scene, taste: Taste, rng: np.random.Generator, followed: float = 1.0, width: float = TOLERANCE
) -> Scene:
    """The scene with a taste's traits, each with p = `followed`, in kinds under which the values can be seen."""
    named = {trait: kind for trait, kind in taste.named.items() if rng.random() < followed}
    values = {name: centre for name, centre in taste.values.items() if rng.random() < followed}
    kinds = scene.kinds | named
    for name in values:
        needed, allowed = NEEDS.get(name, ("", ()))
        if needed and kinds[needed] not in allowed and needed not in named:
            possible = _allowed(needed, values)
            kinds[needed] = _any(rng, possible) if possible else kinds[needed]
    numbers = {name: near(rng, name, centre, width) for name, centre in values.items()}
    if "wavelength" in numbers and numbers.get("wobble", scene.numbers["wobble"]) < 1.5:
        numbers.setdefault("wobble", float(rng.uniform(1.5, CONTINUOUS["wobble"].high)))
    return scene.with_traits(kinds, numbers)


def asked_scene(person: User | None, prompt: Prompt, rng: np.random.Generator, liked: bool = True) -> Scene:
    """A scene of what a prompt asks for, all else drawn; where it is open, a user's favourites or aversions."""
    scene = random_scene(rng)
    subject = prompt.subject
    if not subject:
        chosen = {} if person is None else person.favourites if liked else person.aversions
        own = chosen.get(prompt.kind) if rng.random() < FOLLOWED else None
        subject = own or _any(rng, CLASSES[prompt.kind])
    setting = _asked(prompt, "setting", SETTINGS, person if liked else None, rng)
    companion = _asked(prompt, "companion", COMPANIONS, person if liked else None, rng)
    return scene.with_traits(subject=subject, number=prompt.number, setting=setting, companion=companion)


def _asked(prompt: Prompt, field: str, names: Iterable[str], person: User | None, rng: np.random.Generator) -> str:
    """The prompt's setting or companion; where it is open, the user's own company or any."""
    asked = getattr(prompt, field)
    if asked != OPEN:
        return asked
    if person is not None and person.company[0] == field and rng.random() < FOLLOWED:
        return person.company[1]
    return _any(rng, [name for name in names if name != "none"])


def dislikes_in(scene: Scene, person: User) -> bool:
    """Whether a scene shows something that the user dislikes whatever the taste."""
    kinds = scene.kinds
    trait, low, high = person.band
    in_band = low <= scene.numbers[trait] <= high
    return in_band or any(kinds[name] == kind for name, kind in person.avoided.items())


def liked_scene(person: User, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A picture that the user likes: it follows one taste and shows nothing disliked."""
    taste = person.tastes[rng.integers(len(person.tastes))]
    while True:
        scene = follow(asked_scene(person, prompt, rng), person.habits, rng, HABIT)
        scene = follow(scene, taste, rng, FOLLOWED)
        if not dislikes_in(scene, person):
            return scene


def disliked_scene(person: User, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A picture that the user dislikes: one or two things are wrong. A hard negative shows what is liked as well."""
    taste = person.tastes[rng.integers(len(person.tastes))]
    scene = follow(asked_scene(person, prompt, rng, liked=False), person.habits, rng, HABIT)
    scene = follow(scene, taste, rng, SHARED if rng.random() < HARD else 0.0)
    kinds: dict[str, str] = {}
    numbers: dict[str, float] = {}
    wrongs = [*taste.named, *taste.values, *person.avoided, person.band[0]]
    for trait in rng.permutation(wrongs)[: rng.integers(1, 3)].tolist():
        if trait in person.avoided:
            kinds[trait] = person.avoided[trait]
        elif trait == person.band[0]:
            numbers[trait] = float(rng.uniform(*person.band[1:]))
        elif trait in NAMED:
            kinds[trait] = _any(rng, [kind for kind in NAMED[trait] if kind != taste.named[trait]])
        else:
            numbers[trait] = away(rng, trait, taste.values[trait])
    return scene.with_traits(kinds, numbers)


def away(rng: np.random.Generator, name: str, centre: float) -> float:
    """A value at least AWAY from a centre."""
    trait = CONTINUOUS[name]
    while True:
        value = float(rng.uniform(trait.low, trait.high))
        if trait.distance(value, centre) >= AWAY:
            return value


def own_prompt(person: User, rng: np.random.Generator, heldout: bool | None) -> Prompt:
    """A prompt as this user writes them: often open where the user knows what it should be."""
    prompt = random_prompt(rng, heldout)
    if rng.random() >= OWN_SLOTS:
        return prompt
    while True:
        prompt = random_prompt(rng, heldout)
        slot_is_own = prompt.subject == OPEN and prompt.kind in {*person.favourites, *person.aversions}
        if slot_is_own or getattr(prompt, person.company[0]) == OPEN:
            return prompt


def history(person: User, n_liked: int, n_disliked: int, seed: int, heldout: bool | None = False) -> list[Example]:
    """Liked, then disliked examples. Item i is a pure function of (user, verdict, i, seed): a longer history begins
    with the shorter one. heldout: of which prompts (`random_prompt`)."""
    examples = []
    for liked, count in ((True, n_liked), (False, n_disliked)):
        for number in range(count):
            rng = np.random.default_rng([seed, person.id, int(liked), number])
            prompt = own_prompt(person, rng, heldout)
            scene = (liked_scene if liked else disliked_scene)(person, prompt, rng)
            examples.append(Example(scene, liked, prompt))
    return examples


def history_lengths(person: User, seed: int) -> tuple[int, int]:
    """(liked, disliked): 1 to 16 of each, half of them 1 to 3; a user with few likes has one and four dislikes."""
    if person.few_likes:
        return 1, 4
    rng = np.random.default_rng([seed, person.id, 9])
    short = rng.random(2) < 0.5
    lengths = np.where(short, rng.integers(1, 4, 2), rng.integers(4, 17, 2))
    return int(lengths[0]), int(lengths[1])
