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


def phrases(scene: Scene) -> list[str]:
    """How the scene's look is said: one phrase for every named trait and every visible trait that has bins."""
    kinds = scene.kinds
    numbers = scene.numbers
    said = [NAMED[trait][kind] for trait, kind in kinds.items()]
    for name in COARSE:
        if visible(name, kinds, numbers):
            said.append(CONTINUOUS[name].bins[CONTINUOUS[name].bin(numbers[name])])
    return said


def caption(scene: Scene, rng: np.random.Generator, keep: float = 0.5, open_share: float = 0.4) -> str:
    """The scene in words: open words for the subject in `open_share` of the captions, each phrase with p = `keep`."""
    subject = OPEN if rng.random() < open_share else scene.subject
    asked = asked_words(subject, CLASS_OF[scene.subject], scene.number, scene.setting, scene.companion)
    said = [phrase for phrase in phrases(scene) if rng.random() < keep]
    rng.shuffle(said)
    return ", ".join([asked, *said])
