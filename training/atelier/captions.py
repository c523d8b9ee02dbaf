"""Captions that name some of what a picture of the pool shows."""

from __future__ import annotations

import numpy as np

from prefgen.atelier import captions
from prefgen.atelier.attributes import FAMILIES

from ..data.picture_pool import CLASS_COUNTS, label_names

# How often an attribute list names every family; else any number of them from one to all is equally likely.
ALL_NAMED = 0.3


def random_caption(labels, rng: np.random.Generator, neutral: float, bare: float = 0.0) -> tuple[str, np.ndarray]:
    """A caption of one picture and the mask bool [12] of what it names.

    labels: class numbers [12]. neutral: share of captions without attributes; bare: share of attribute lists without a
    subject.
    """
    subject, prop, attributes = label_names(labels)
    named = np.zeros(len(CLASS_COUNTS), bool)
    kind = rng.random()
    if kind < neutral:
        named[:2] = True
        return captions.neutral(subject, prop), named
    families = list(FAMILIES)
    count = len(families) if rng.random() < ALL_NAMED else int(rng.integers(1, len(families) + 1))
    chosen = set(rng.choice(len(families), count, replace=False).tolist())
    subset = {family: attributes[family] for i, family in enumerate(families) if i in chosen}
    named[[i + 2 for i in chosen]] = True
    if kind < neutral + bare:
        phrases = captions.taste_phrases(subset)
        rng.shuffle(phrases)
        return ", ".join(phrases), named
    named[:2] = True
    return captions.enriched(subject, prop, subset, rng), named
