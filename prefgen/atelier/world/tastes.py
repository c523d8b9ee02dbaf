"""What can be said of a user's taste where something was asked for: in kinds and numbers, and in words.

A prompt's open slots are filled with what the user would have there; what a prompt names stays as it is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .prompts import OPEN, Prompt
from .subjects import SUBJECTS
from .traits import CONTINUOUS, NAMED
from .users import Taste, User


@dataclass(frozen=True)
class Said:
    """kinds: {class of `labels.CLASSES`: its kind}; values: {continuous trait: value}. All else isn't said."""

    kinds: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


def liked_of(person: User, taste: Taste, prompt: Prompt) -> Said:
    """All that a user likes in one taste, and favourites and company where the prompt leaves them open."""
    complete = filled(person, prompt)
    slots = {
        name: getattr(complete, name)
        for name in ("subject", "setting", "companion")
        if getattr(prompt, name) == OPEN and getattr(complete, name) != OPEN
    }
    return Said(slots | dict(taste.named), dict(taste.values))


def disliked_of(person: User, prompt: Prompt) -> Said:
    """All that a user dislikes: a disliked band by its middle, an aversion where the prompt leaves the subject open."""
    trait, low, high = person.band
    aversion = {"subject": person.aversions[prompt.kind]} if _averse(person, prompt) else {}
    return Said(aversion | dict(person.avoided), {trait: (low + high) / 2})


def filled(person: User, prompt: Prompt) -> Prompt:
    """The prompt with favourites and company in its open slots, as far as the user has any."""
    changes: dict[str, str] = {}
    if prompt.subject == OPEN and prompt.kind in person.favourites:
        changes["subject"] = person.favourites[prompt.kind]
    where, name = person.company
    if getattr(prompt, where) == OPEN:
        changes[where] = name
    return replace(prompt, **changes)


def enriched_text(person: User, taste: Taste, prompt: Prompt) -> str:
    """The prompt with a taste in words: favourites in the open slots, names, and the right bins."""
    return ", ".join([filled(person, prompt).text, *taste_words(taste)])


def taste_words(taste: Taste) -> list[str]:
    """How prompts say a taste's look; values without bins can't be said."""
    named = [NAMED[trait][kind] for trait, kind in taste.named.items()]
    return named + [words for name, value in taste.values.items() if (words := bin_words(name, value))]


def avoided_text(person: User, prompt: Prompt) -> str:
    """What a user dislikes as a negative prompt, "" where words can't say any of it."""
    trait, low, high = person.band
    words = [NAMED[name][kind] for name, kind in person.avoided.items()]
    if _averse(person, prompt):
        words.insert(0, SUBJECTS[person.aversions[prompt.kind]])
    return ", ".join(filter(None, [*words, bin_words(trait, (low + high) / 2)]))


def bin_words(name: str, value: float) -> str:
    """How captions say a continuous trait's value, "" for one without bins."""
    trait = CONTINUOUS[name]
    return trait.bins[trait.bin(value)] if trait.bins else ""


def _averse(person: User, prompt: Prompt) -> bool:
    return prompt.subject == OPEN and prompt.kind in person.aversions
