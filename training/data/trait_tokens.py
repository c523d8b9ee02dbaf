"""A scene's traits as tokens of the second world's UNet: what a teacher that isn't words says.

Artists never meet them. The UNet learns them beside its text in some batches; in the others they are left out of its
context, since a token of zeros would still draw attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from prefgen.atelier.editions import SECOND
from prefgen.atelier.models import load_weights
from prefgen.atelier.world.judge import PERIODIC
from prefgen.atelier.world.labels import CLASSES
from prefgen.atelier.world.traits import CONTINUOUS

TOKENS = 2
HIDDEN = 256
COUNTS = tuple(len(kinds) for kinds in CLASSES.values())
# Every class and every continuous trait: each is said or not.
TRAITS = len(CLASSES) + len(CONTINUOUS)


@dataclass(frozen=True)
class TraitLabels:
    """What is said of B scenes, or of one without the first axis: classes int64 [B, 12], values [B, 13] as shares of
    the ranges, said bool [B, 25], classes first."""

    classes: torch.Tensor
    values: torch.Tensor
    said: torch.Tensor

    @classmethod
    def stacked(cls, labels: Sequence[TraitLabels]) -> TraitLabels:
        """Those of several scenes."""
        return cls(*(torch.stack([getattr(one, name) for one in labels]) for name in ("classes", "values", "said")))


class TraitTokens(nn.Module):
    """MLP from what is said of a scene to context tokens [B, 2, width]."""

    def __init__(self, width: int):
        super().__init__()
        # One number a kind, cosine and sine or share and its square a continuous trait, and what is said at all.
        features = sum(COUNTS) + 2 * len(CONTINUOUS) + TRAITS
        self.mlp = nn.Sequential(nn.Linear(features, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, TOKENS * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, classes: torch.Tensor, values: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        """classes: int64 [B, 12]; values: shares [B, 13]; said: bool [B, 25], classes first."""
        kinds = [F.one_hot(classes[:, i], count) * said[:, i, None] for i, count in enumerate(COUNTS)]
        angles = values * 2 * torch.pi
        circle = torch.stack([angles.cos(), angles.sin()], -1)
        line = torch.stack([values * 2 - 1, (values * 2 - 1).square()], -1)
        numbers = torch.where(PERIODIC[:, None], circle, line) * said[:, len(COUNTS) :, None]
        features = torch.cat([*kinds, numbers.flatten(1), said], 1).float()
        return self.norm(self.mlp(features).unflatten(1, (TOKENS, -1)))

    @torch.no_grad()
    def of(self, labels: TraitLabels) -> torch.Tensor:
        """Context tokens [B, 2, width] of labels."""
        return self(labels.classes, labels.values, labels.said)


def load_trait_tokens() -> TraitTokens:
    """The exported trait tokens in eval mode, fp32; FileNotFoundError where their weights are missing."""
    module = TraitTokens(SECOND.unet["cross_attention_dim"])
    module.load_state_dict(load_weights("trait_tokens"))
    return module.eval().requires_grad_(False)


def random_said(seen: torch.Tensor, shares: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """What is said of scenes: every trait that can be seen with a scene's own probability. seen: bool [B, 13]; shares:
    [B], 0..1. Returns bool [B, 25]."""
    chance = torch.as_tensor(shares)[:, None]
    sayable = torch.cat([torch.ones(len(seen), len(COUNTS), dtype=torch.bool), seen], 1)
    return sayable & (torch.rand(len(seen), TRAITS) < chance)
