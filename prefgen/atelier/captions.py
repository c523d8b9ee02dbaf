"""Prompts of the atelier: neutral ones, enriched ones, and which of them training never sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from .attributes import FAMILIES, PROPS, SUBJECTS

_PHRASE = {(a.family, a.name): a.phrase for values in FAMILIES.values() for a in values}


def neutral(subject: str, prop: str = "none") -> str:
    """The prompt that asks for the subject and nothing else: "a sailing boat and a moon"."""
    return f"{SUBJECTS[subject]} {PROPS[prop]}".strip()


def taste_phrases(attributes: Mapping[str, str]) -> list[str]:
    """{family: name} -> phrases in FAMILIES order."""
    return [_PHRASE[family, attributes[family]] for family in FAMILIES if family in attributes]


def enriched(subject: str, prop: str, attributes: Mapping[str, str], rng: np.random.Generator | None = None) -> str:
    """The prompt with attributes written into it; their order is shuffled when a generator is given."""
    phrases = taste_phrases(attributes)
    if rng is not None:
        rng.shuffle(phrases)
    return ", ".join([neutral(subject, prop), *phrases])


def heldout_prompts() -> list[tuple[str, str]]:
    """(subject, prop) of the 20 prompts that no training stage sees: one prop a subject, picked by hash.

    Each prop is held out for about a third of the subjects, so that it is learnt from the others.
    """
    props = [p for p in PROPS if p != "none"]
    order = sorted(SUBJECTS, key=lambda s: hashlib.sha256(f"prompt {s}".encode()).hexdigest())
    chosen = {subject: props[i % len(props)] for i, subject in enumerate(order)}
    return [(subject, chosen[subject]) for subject in SUBJECTS]


def train_prompts() -> list[tuple[str, str]]:
    """(subject, prop) of the 60 prompts that training may use."""
    heldout = set(heldout_prompts())
    return [(s, p) for s in SUBJECTS for p in PROPS if (s, p) not in heldout]


def corpus() -> list[str]:
    """Every phrase of the world, for building vocabularies."""
    lines = [neutral(s, p) for s in SUBJECTS for p in PROPS]
    lines += list(_PHRASE.values()) + [", ".join(_PHRASE.values()), *FAMILIES]
    return lines
