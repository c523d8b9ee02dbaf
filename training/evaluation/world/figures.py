"""What is said of a table of rows: figures, contrasts and the lines fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefgen.atelier.world.prompts import OPEN, Prompt
from prefgen.atelier.world.users import User

from .. import metrics
from .measures import PARTS, Bootstrap, Scored, contrast, figure, holm
from .readings import features_of
from .requests import Request
from .rows import IDEAS, METHOD, PRIMARY, ROWS, Line

HABITS = "habits"


@dataclass(frozen=True)
class Table:
    """Rows that were painted alike. seen, scored: {row: one entry a version}."""

    people: Sequence[User]
    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    seen: Mapping[str, list[list[dict]]]
    scored: Mapping[str, list[Scored]]

    def figures(self, size: int) -> dict:
        """{"rows", "primary", "contrasts", "lines"} of histories of `size` pictures of a verdict."""
        draws = self.draws()
        harmonic = {name: draws.harmonic(scored) for name, scored in self.scored.items()}
        rows = {name: self._row(name, draws, harmonic) for name in self.seen}
        return {"rows": rows, **self._contrasts(harmonic, size), "lines": self._lines(size)}

    def draws(self, group: str = "all") -> Bootstrap:
        """The draws of all users, or of those with habits."""
        users = None
        if group == HABITS:
            users = [i for i, person in enumerate(self.people) if person.habits.named or person.habits.values]
        return Bootstrap(self.requests, self.scored["none"][0], self.scored["cloner"][0], users)

    def _row(self, name: str, draws: Bootstrap, harmonic: Mapping[str, np.ndarray]) -> dict:
        scored = self.scored[name]
        figures = {
            "label": ROWS[name].label,
            "versions": len(scored),
            "alignment": figure(draws.part(scored, "all")),
            **{part: figure(draws.part(scored, part)) for part in PARTS[1:]},
            "specificity": figure(draws.specificity(scored)),
            "harmonic": figure(harmonic[name]),
            # Another seed's figures beside the mean's.
            "each_seed": [round(float(draws.harmonic([one])[0]), 4) for one in scored],
            "balance": figure(draws.balance(scored)) if any(len(p.tastes) > 1 for p in self.people) else None,
            **self._pictures(name, draws),
        }
        if "trait_oracle" in harmonic and harmonic["trait_oracle"][0] > 0:
            figures["share_of_ceiling"] = round(float(harmonic[name][0] / harmonic["trait_oracle"][0]), 4)
        return figures

    def _pictures(self, name: str, draws: Bootstrap) -> dict:
        """Subjects, sharpness, render-back error and KID of a row's pictures."""
        versions = self.seen[name]
        named = np.mean([[self._named(r, q) for r, q in zip(v, self.requests, strict=True)] for v in versions], 0)
        renders = self.seen["render_oracle"][0]
        sharp = np.mean([[reading["sharpness"] for reading in version] for version in versions])
        back = np.mean([[reading["render_back"] for reading in version] for version in versions], 0)
        return {
            "subject": figure(draws.mean(named)),
            "sharpness": round(float(sharp / np.mean([reading["sharpness"] for reading in renders])), 4),
            "render_back": figure(draws.mean(back)),
            "kid": round(float(np.mean([metrics.kid(features_of(v), features_of(renders)) for v in versions])), 5),
        }

    def _named(self, reading: dict, request: Request) -> float:
        """1 where both judges name the subject of a closed prompt, NaN for an open one."""
        prompt = self.prompts[request.prompt]
        if prompt.subject == OPEN:
            return np.nan
        return float(all(subject == prompt.subject for subject in reading["subjects"].values()))

    def _contrasts(self, harmonic: Mapping[str, np.ndarray], size: int) -> dict:
        """PrefGen less every other row, in the one number: the primary ones corrected among themselves."""
        if METHOD not in harmonic:
            return {"primary": {}, "contrasts": {}}
        others = {name: contrast(harmonic[METHOD] - own) for name, own in harmonic.items() if name != METHOD}
        lines = {line.row: line for line in PRIMARY}
        primary = holm({name: others[name] for name in lines if name in others})
        for name, own in primary.items():
            own |= {"line": lines[name].least, "reached": reached(own, lines[name])}
        return {"primary": primary if size == PRIMARY[0].sizes[0] else {}, "contrasts": holm(others)}

    def _lines(self, size: int) -> list[dict]:
        """Each idea whose line is drawn at this length, as far as its arm is there."""
        lines = [line for line in IDEAS if size in line.sizes and {line.row, line.of} <= self.scored.keys()]
        rows = [self._line(line) for line in lines]
        corrected = holm({row["idea"]: row for row in rows})
        return [row | {"p_holm": corrected[row["idea"]]["p_holm"]} for row in rows]

    def _line(self, line: Line) -> dict:
        draws = self.draws(line.users)
        own, other = (self._measured(draws, line.measure, name) for name in (line.of, line.row))
        difference = contrast(own - other)
        about = {
            "idea": line.idea,
            "of": line.of,
            "row": line.row,
            "measure": line.measure,
            "users": line.users,
            "line": line.least,
        }
        return about | difference | {"reached": reached(difference, line)}

    def _measured(self, draws: Bootstrap, measure: str, name: str) -> np.ndarray:
        if measure == "harmonic":
            return draws.harmonic(self.scored[name])
        if measure == "balance":
            return draws.balance(self.scored[name])
        return draws.part(self.scored[name], measure)


def reached(difference: dict, line: Line) -> bool:
    """Whether a difference is as large as its line, and surely above zero."""
    return difference["mean"] >= line.least and difference["ci95"][0] > 0
