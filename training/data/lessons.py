"""The teachers of the branch: what the frozen UNet hears of a user, and what it answers.

Both are ours and not the paper's (docs/departures.md). In words a teacher can only teach what words can do; trait
tokens, which the second edition's UNet has learnt beside its text, say what has no words too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..common.base import Base, Text
from .people_world import PeopleWorld
from .trait_tokens import TraitLabels, load_trait_tokens
from .worlds import Target

Texts = Callable[[list[str]], Text]


@dataclass
class Lesson:
    """What a teacher hears, n rows.

    liked: the prompt with what the user likes; disliked: with what the user dislikes, None where nothing is pushed
    away. plain: bool [n], rows whose teacher is the UNet with the neutral prompt, None where `liked` has that for them.
    away: [n], how far the answer is pushed away from the one to `disliked`.
    """

    liked: Text
    disliked: Text | None
    plain: torch.Tensor | None
    away: torch.Tensor

    def __getitem__(self, rows) -> Lesson:
        parts = (self.liked, self.disliked, self.plain, self.away)
        return Lesson(*(None if part is None else part[rows] for part in parts))


@dataclass
class Batch:
    """One process's share of a step, n rows, on its device.

    vectors [n, C + D + I]: user vectors, in part dropped. noisy, target [n, c, h, w]: noised latents and what the UNet
    should predict of them at timesteps [n]; sizes [n, 4] for SDXL. text: the neutral prompts; lesson: what the teacher
    says, None without one. weights, teacher_weights [n]: of each row in the two losses.
    """

    vectors: torch.Tensor
    noisy: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    sizes: torch.Tensor | None
    text: Text
    lesson: Lesson | None
    weights: torch.Tensor
    teacher_weights: torch.Tensor

    def of(self, rows: np.ndarray) -> Batch:
        """A micro-batch."""
        return Batch(**{name: None if value is None else value[rows] for name, value in vars(self).items()})


class Teacher(Protocol):
    """Writes lessons for rows of a batch."""

    def knows(self, target: Target) -> bool:
        """Whether there is anything to teach where this was asked for."""
        ...

    def lesson(self, users: Sequence[int], targets: Sequence[Target], taught: Sequence[bool]) -> Lesson:
        """taught: which rows are taught anything; the teacher of the others is the plain UNet."""
        ...


class WordsTeacher:
    """Writes the taste into the prompt. away: how far the answer is pushed from what is disliked."""

    def __init__(self, texts: Texts, away: float, device: torch.device):
        self.texts = texts
        self.away = away
        self.device = device

    def knows(self, target: Target) -> bool:
        return bool(target.prompt and target.enriched)

    def lesson(self, users: Sequence[int], targets: Sequence[Target], taught: Sequence[bool]) -> Lesson:
        rows = list(zip(targets, taught, strict=True))
        liked = self.texts([target.enriched or "" if is_taught else target.prompt for target, is_taught in rows])
        pushed = [bool(self.away and is_taught and target.avoided) for target, is_taught in rows]
        disliked = None
        if any(pushed):
            against = [target.against if push else "" for target, push in zip(targets, pushed, strict=True)]
            disliked = self.texts(against)
        return Lesson(liked, disliked, None, torch.tensor(pushed, device=self.device) * self.away)


class TraitsTeacher:
    """Says the taste in trait tokens behind the neutral prompt."""

    def __init__(self, world: PeopleWorld, texts: Texts, away: float, device: torch.device):
        self.world = world
        self.texts = texts
        self.away = away
        self.device = device
        self.tokens = load_trait_tokens()

    def knows(self, target: Target) -> bool:
        return bool(target.prompt)

    def lesson(self, users: Sequence[int], targets: Sequence[Target], taught: Sequence[bool]) -> Lesson:
        neutral = self.texts([target.prompt for target in targets])
        rows = list(zip(users, targets, strict=True))
        liked = self._with_tokens(neutral, [self.world.liked_labels(*row) for row in rows])
        disliked = self._with_tokens(neutral, [self.world.disliked_labels(*row) for row in rows]) if self.away else None
        rows_taught = torch.tensor(list(taught), device=self.device)
        return Lesson(liked, disliked, ~rows_taught, rows_taught * self.away)

    def _with_tokens(self, text: Text, labels: list[TraitLabels]) -> Text:
        tokens = self.tokens.of(TraitLabels.stacked(labels)).to(text.states)
        return Text(torch.cat([text.states, tokens], 1), text.pooled)


def answer_of(base: Base, batch: Batch) -> torch.Tensor:
    """What the frozen UNet predicts of a batch [n, c, h, w] where its teacher says the taste. The branch has to
    be off."""
    lesson = batch.lesson
    assert lesson is not None
    everything = torch.arange(len(batch.noisy), device=batch.noisy.device)
    if lesson.plain is None:
        answer = _predicted(base, batch, lesson.liked, everything)
    else:
        answer = torch.empty_like(batch.noisy)
        for rows, text in ((everything[~lesson.plain], lesson.liked), (everything[lesson.plain], batch.text)):
            if len(rows):
                answer[rows] = _predicted(base, batch, text, rows)
    pushed = everything[lesson.away > 0]
    if lesson.disliked is not None and len(pushed):
        against = _predicted(base, batch, lesson.disliked, pushed)
        answer[pushed] += lesson.away[pushed, None, None, None] * (answer[pushed] - against)
    return answer


def _predicted(base: Base, batch: Batch, text: Text, rows: torch.Tensor) -> torch.Tensor:
    sizes = None if batch.sizes is None else batch.sizes[rows.to(batch.sizes.device)]
    return base.predict(batch.noisy[rows], batch.timesteps[rows], text[rows], sizes)
