"""How long training's histories are, and whether they carry the prompts of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .readers import Conversation
from .worlds import History

# Pictures of a verdict, at most, in a history that is short.
SHORT = 3


def drawn_length(rng: np.random.Generator, most: int, short: float) -> int:
    """Pictures of a verdict: 1 to SHORT with probability `short`, else more, up to `most`; all evenly."""
    if most <= SHORT or rng.random() < short:
        return int(rng.integers(1, min(SHORT, most) + 1))
    return int(rng.integers(SHORT + 1, most + 1))


def without_prompts(history: History) -> History:
    """The history of a graph that knows no prompts."""
    return History(history.pictures, history.liked, [""] * len(history.pictures))


def drop_prompts(conversations: Sequence[Conversation], share: float, rng: np.random.Generator) -> list[Conversation]:
    """The conversations, a share of them without prompts. Nothing is drawn for a share of 0."""
    if not share:
        return list(conversations)
    return [
        replace(each, history=without_prompts(each.history)) if rng.random() < share else each for each in conversations
    ]
