"""Linear heads that read what a picture shows: they help an encoder along while it trains, and are thrown away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from prefgen.atelier.world.judge import PERIODIC, distances, shares_of
from prefgen.atelier.world.labels import CLASSES
from prefgen.atelier.world.traits import CONTINUOUS


class TraitHeads(nn.Module):
    """One linear classifier for each of CLASSES and two numbers for each continuous trait, on an embedding [B, width].

    The numbers: a share of the range and nothing, or cosine and sine where it wraps.
    """

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.ModuleList(nn.Linear(width, len(kinds)) for kinds in CLASSES.values())
        self.values = nn.Linear(width, len(CONTINUOUS) * 2)

    def class_loss(
        self, features: torch.Tensor, truth: torch.Tensor, named: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross entropy over the classes that are named. features [B, width], truth and named [B, 12]."""
        losses = [F.cross_entropy(head(features), truth[:, i], reduction="none") for i, head in enumerate(self.classes)]
        stacked = torch.stack(losses, 1)
        return stacked.mean() if named is None else stacked[named].mean()

    def value_loss(self, features: torch.Tensor, truth: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Mean square error of the traits that can be seen, in units of what guessing the mean costs. truth: shares
        [B, 13]; seen: bool [B, 13]."""
        values = self._values(features)
        angles = truth * 2 * torch.pi
        circle = (values - torch.stack([angles.cos(), angles.sin()], -1)).square().sum(-1)
        # The variance of a uniform share is 1/12.
        line = (values[..., 0] - truth).square() * 12
        return torch.where(PERIODIC, circle, line)[seen].mean()

    @torch.inference_mode()
    def figures(self, features: torch.Tensor, classes: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> dict:
        """Accuracy of every class and R2 of every trait, by name."""
        figures = {}
        for i, name in enumerate(CLASSES):
            figures[name] = (self.classes[i](features).argmax(1) == classes[:, i]).float().mean().item()
        squares = distances(shares_of(self._values(features)), values).square()
        for i, name in enumerate(CONTINUOUS):
            # Guessing costs 1/12: on a line by the middle, on a circle by anything.
            figures[name] = 1 - 12 * squares[seen[:, i], i].mean().item()
        return {name: round(figure, 4) for name, figure in figures.items()}

    def _values(self, features: torch.Tensor) -> torch.Tensor:
        return self.values(features).unflatten(1, (len(CONTINUOUS), 2))
