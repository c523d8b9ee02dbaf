"""Prompts and captions.

A prompt says what a picture is of, closed ("an owl in a garden") or open ("an animal in a garden", "a house and
something in the sky"): where it is open, taste decides. A caption says a scene's look as well, in names and in bins;
the traits without words are in no caption, which a test holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from .scenes import Scene
from .subjects import (
    CLASS_OF,
    CLASSES,
    COMPANIONS,
    NUMBERS,
    OPEN_COMPANION,
    OPEN_SETTING,
    OPEN_WORDS,
    PLURALS,
    SETTINGS,
    SUBJECTS,
)
from .traits import COARSE, CONTINUOUS, NAMED, visible

OPEN = ""  # what a prompt leaves open
HELD_OUT_SHARE = 6  # one in so many pairs of class and setting is for tests alone
# Never anybody's favourite in training: a test user's may be.
HELD_OUT_SUBJECTS = ("windmill", "guitar")


@dataclass(frozen=True)
class Prompt:
    """What is asked for. subject: a subject or OPEN (any of `kind`); setting and companion: a name, "none" or OPEN."""

    kind: str
    subject: str
    number: str
    setting: str
    companion: str

    @property
    def text(self) -> str:
        """The prompt in words."""
        return asked_words(self.subject, self.kind, self.number, self.setting, self.companion)

    @property
    def heldout(self) -> bool:
        """Whether the prompt is for tests alone: by its pair of class and setting."""
        digest = hashlib.sha256(f"prompt {self.kind} {self.setting or 'open'}".encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0


def asked_words(subject: str, kind: str, number: str, setting: str, companion: str) -> str:
    """ "two owls in a garden and a moon", with open words for what is OPEN."""
    if number == "one":
        words = SUBJECTS[subject] if subject else OPEN_WORDS[kind]
    else:
        words = f"{number} {PLURALS[subject or kind]}"
    where = SETTINGS[setting] if setting else OPEN_SETTING
    company = COMPANIONS[companion] if companion else OPEN_COMPANION
    return " ".join(part for part in (words, where, company and f"and {company}") if part)


def random_prompt(rng: np.random.Generator, heldout: bool | None = None) -> Prompt:
    """A third closed, a third with an open subject, a third with open company or an open setting.

    heldout: only prompts of the tests, only those of training, or (None) any.
    """
    while True:
        kind = list(CLASSES)[rng.integers(len(CLASSES))]
        subject = list(CLASSES[kind])[rng.integers(4)]
        number = NUMBERS[rng.choice(3, p=(0.7, 0.15, 0.15))]
        setting = list(SETTINGS)[rng.integers(len(SETTINGS))]
        companion = "none"
        manner = rng.integers(3)
        if manner == 1:
            subject = OPEN
        elif manner == 2 and rng.random() < 0.5:
            companion = OPEN
        elif manner == 2:
            setting = OPEN
        prompt = Prompt(kind, subject, number, setting, companion)
        if heldout is None or prompt.heldout == heldout:
            return prompt


def fits(scene: Scene, prompt: Prompt) -> bool:
    """Whether a scene shows what was asked for."""
    return (
        CLASS_OF[scene.subject] == prompt.kind
        and prompt.subject in (OPEN, scene.subject)
        and scene.number == prompt.number
        and prompt.setting in (OPEN, scene.setting)
        and prompt.companion in (OPEN, scene.companion)
    )


def phrases(scene: Scene) -> dict[str, str]:
    """How the scene's look is said, {trait: phrase}: every named trait, and every visible trait that has bins."""
    kinds = scene.kinds
    numbers = scene.numbers
    said = {trait: NAMED[trait][kind] for trait, kind in kinds.items()}
    for name in COARSE:
        if visible(name, kinds, numbers):
            said[name] = CONTINUOUS[name].bins[CONTINUOUS[name].bin(numbers[name])]
    return said


@dataclass(frozen=True)
class Caption:
    """A caption, and what it names: keys of `phrases`, and "subject", "number", "setting" and "companion"."""

    text: str
    names: frozenset[str]


def caption(
    scene: Scene, rng: np.random.Generator, keep: float = 0.5, open_share: float = 0.4, bare: bool = False
) -> Caption:
    """The scene in words: open words for the subject in `open_share` of the captions, each phrase with p = `keep`.

    bare: phrases alone, at least one of them.
    """
    subject = OPEN if rng.random() < open_share else scene.subject
    asked = asked_words(subject, CLASS_OF[scene.subject], scene.number, scene.setting, scene.companion)
    look = phrases(scene)
    said = [trait for trait in look if rng.random() < keep]
    if bare and not said:
        said = [list(look)[rng.integers(len(look))]]
    rng.shuffle(said)
    words = [look[trait] for trait in said]
    if bare:
        return Caption(", ".join(words), frozenset(said))
    content = {"number", "setting", "companion"} | ({"subject"} if subject else set())
    return Caption(", ".join([asked, *words]), frozenset(content | set(said)))


def every_word() -> list[str]:
    """Every phrase of the world, for building vocabularies."""
    lines = [asked_words(s, CLASS_OF[s], n, "none", "none") for s in SUBJECTS for n in NUMBERS]
    lines += [asked_words(OPEN, kind, number, "none", "none") for kind in CLASSES for number in NUMBERS]
    lines += [*SETTINGS.values(), *COMPANIONS.values(), OPEN_SETTING, OPEN_COMPANION, "and , "]
    lines += [phrase for kinds in NAMED.values() for phrase in kinds.values()]
    lines += [phrase for name in COARSE for phrase in CONTINUOUS[name].bins]
    return [*lines, *SUBJECTS, *CLASSES, *NAMED]
