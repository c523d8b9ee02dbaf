"""A row's figures: alignment, specificity and their harmonic mean, with intervals over users and prompts crossed.

The one number is formed inside each draw of the bootstrap: the means of a draw's pictures, alignment clipped at 0.
Users and prompts are drawn independently (Owen's pigeonhole bootstrap), and all rows share the draws, so differences
are paired. Seeds of training are averaged in every draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefgen.atelier.world import scores
from prefgen.atelier.world.prompts import Prompt
from prefgen.atelier.world.scenes import Scene
from prefgen.atelier.world.scores import LEAST_RANGE
from prefgen.atelier.world.traits import CONTINUOUS, NAMED
from prefgen.atelier.world.users import Example, User

from ...common.statistics import ci95
from .requests import Request

DRAWS = 2000
PARTS = ("all", "named", "continuous", "semantic", "said")
TRAITS = (*NAMED, *CONTINUOUS)


@dataclass(frozen=True)
class Scored:
    """What one training seed's pictures of a row score, n pictures, NaN where a user has no such opinion.

    parts: {of PARTS: [n]}, "said" is named and semantic together; distances: [n, TRAITS] from the user's liked pictures
    in traits without an opinion; first_taste: [n] whether the first of two tastes fits better.
    """

    parts: Mapping[str, np.ndarray]
    distances: np.ndarray
    first_taste: np.ndarray


def score(
    scenes: Sequence[Scene],
    requests: Sequence[Request],
    people: Sequence[User],
    prompts: Sequence[Prompt],
    histories: Sequence[Sequence[Example]],
    errors: Mapping[str, float],
) -> Scored:
    """scenes: what a judge read off the pictures of `requests`; histories: of every user; errors: of the judge."""
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    rows = np.full((len(scenes), len(TRAITS)), np.nan)
    first = np.full(len(scenes), np.nan)
    for i, (scene, request) in enumerate(zip(scenes, requests, strict=True)):
        person = people[request.user]
        aligned = scores.alignment(scene, person, prompts[request.prompt], errors)
        said = [part for part in (aligned.named, aligned.semantic) if part is not None]
        values = {**{name: getattr(aligned, name) for name in PARTS[:4]}, "said": np.mean(said) if said else None}
        for name, value in values.items():
            parts[name].append(np.nan if value is None else float(value))
        free = [place for place, name in enumerate(TRAITS) if name not in person.opinions()]
        liked = [example for example in histories[request.user] if example.liked]
        rows[i, free] = scores.distances(scene, liked, [TRAITS[place] for place in free])
        if len(person.tastes) > 1:
            by_taste = [np.mean([*sum(scores.of_taste(scene, taste, errors), [])]) for taste in person.tastes]
            first[i] = float(by_taste[0] > by_taste[1])
    return Scored({name: np.array(own) for name, own in parts.items()}, rows, first)


class Bootstrap:
    """The draws that all rows of a table share. requests: of every row; none, cloner: the ends of specificity; users:
    of whom, all by default; draws: DRAWS by default."""

    def __init__(
        self,
        requests: Sequence[Request],
        none: Scored,
        cloner: Scored,
        users: Sequence[int] | None = None,
        draws: int = 0,
    ):
        self.users = np.array([request.user for request in requests])
        self.prompts = np.array([request.prompt for request in requests])
        chosen = np.unique(self.users) if users is None else np.array(sorted(users))
        draws = draws or DRAWS
        rng = np.random.default_rng(0)
        prompt_count = int(self.prompts.max()) + 1
        user_weights = np.zeros((draws + 1, int(self.users.max()) + 1))
        # Row 0 is what was measured: everybody once.
        user_weights[0, chosen] = 1
        prompt_weights = np.ones((draws + 1, prompt_count))
        if len(chosen):
            user_weights[1:, chosen] = rng.multinomial(len(chosen), np.full(len(chosen), 1 / len(chosen)), draws)
        prompt_weights[1:] = rng.multinomial(prompt_count, np.full(prompt_count, 1 / prompt_count), draws)
        self.user_weights = user_weights
        self.picture_prompts = prompt_weights[:, self.prompts]  # [draws + 1, n]
        self.weights = user_weights[:, self.users] * self.picture_prompts
        self.ends = [self._by_user(scored.distances) for scored in (none, cloner)]

    def part(self, seeds: Sequence[Scored], name: str) -> np.ndarray:
        """Means [draws + 1] of one of PARTS, over seeds."""
        return np.mean([self.mean(scored.parts[name]) for scored in seeds], 0)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Means [draws + 1] of a value a picture [n]; NaNs are left out."""
        present = ~np.isnan(values)
        totals = self.weights[:, present] @ values[present]
        return totals / np.maximum(self.weights[:, present].sum(1), 1e-12)

    def specificity(self, seeds: Sequence[Scored]) -> np.ndarray:
        """Means [draws + 1] over users, over seeds, as `scores.specificity` forms each user's."""
        return np.mean([self._specificity(scored) for scored in seeds], 0)

    def harmonic(self, seeds: Sequence[Scored]) -> np.ndarray:
        """The one number [draws + 1], formed of a draw's two means."""
        one = np.clip(self.part(seeds, "all"), 0, None)
        two = self.specificity(seeds)
        return 2 * one * two / np.maximum(one + two, 1e-12)

    def balance(self, seeds: Sequence[Scored]) -> np.ndarray:
        """Of users with two tastes, how evenly both are painted [draws + 1]: 1 for half and half, 0 for one alone."""
        shares = np.mean([self._by_user(scored.first_taste[:, None])[..., 0] for scored in seeds], 0)
        return self._over_users(1 - np.abs(2 * shares - 1))

    def _specificity(self, scored: Scored) -> np.ndarray:
        none, cloner = self.ends
        own = self._by_user(scored.distances)
        room = none - cloner
        telling = room >= LEAST_RANGE  # False where NaN
        above = np.where(telling, own - cloner, 0).sum(-1)
        total = np.where(telling, room, 0).sum(-1)
        by_user = np.where(total > 0, np.clip(above / np.maximum(total, 1e-12), 0, 1), np.nan)
        return self._over_users(by_user)

    def _by_user(self, values: np.ndarray) -> np.ndarray:
        """Means [draws + 1, users, k] of values [n, k] a picture, weighed by a draw's prompts; NaN without any."""
        count = self.user_weights.shape[1]
        means = np.full((len(self.weights), count, values.shape[1]), np.nan)
        for user in np.unique(self.users):
            own = np.flatnonzero(self.users == user)
            weights = self.picture_prompts[:, own]
            with np.errstate(invalid="ignore", divide="ignore"):
                means[:, user] = (weights @ values[own]) / weights.sum(1, keepdims=True)
        return means

    def _over_users(self, by_user: np.ndarray) -> np.ndarray:
        present = ~np.isnan(by_user)
        weights = self.user_weights * present
        return (weights * np.nan_to_num(by_user)).sum(1) / np.maximum(weights.sum(1), 1e-12)


def figure(draws: np.ndarray) -> dict:
    """{"mean", "ci95"} of [draws + 1], whose first is what was measured."""
    return {"mean": round(float(draws[0]), 4), "ci95": ci95(draws[1:])}


def contrast(draws: np.ndarray) -> dict:
    """The same of a difference, with the two-sided p of 0 by the share of draws on its other side."""
    tail = min((draws[1:] <= 0).mean(), (draws[1:] >= 0).mean())
    return figure(draws) | {"p": round(float(min(1.0, 2 * max(tail, 1 / (len(draws) - 1)))), 5)}


def holm(contrasts: Mapping[str, dict]) -> dict[str, dict]:
    """The contrasts with p corrected for their number by Holm's step-down procedure ("p_holm")."""
    order = sorted(contrasts, key=lambda name: contrasts[name]["p"])
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * contrasts[name]["p"]))
        corrected[name] = round(largest, 5)
    return {name: own | {"p_holm": corrected[name]} for name, own in contrasts.items()}
