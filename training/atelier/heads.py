"""Linear heads that name what a picture shows: they help an encoder along while it trains, and are thrown away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..data.picture_pool import CLASS_COUNTS


class AttributeHeads(nn.Module):
    """One linear classifier for the subject, the prop and every family, on an embedding [B, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in CLASS_COUNTS)

    def loss(self, features: torch.Tensor, truth: torch.Tensor, named: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross entropy over the classes that are named. features [B, width], truth [B, 12], named bool [B, 12],
        all without it."""
        losses = [F.cross_entropy(head(features), truth[:, i], reduction="none") for i, head in enumerate(self.heads)]
        losses = torch.stack(losses, 1)
        return losses.mean() if named is None else losses[named].mean()

    def accuracy(self, features: torch.Tensor, truth: torch.Tensor) -> list[float]:
        """Share of pictures whose class each head names. features [B, width], truth [B, 12]."""
        return [(head(features).argmax(1) == truth[:, i]).float().mean().item() for i, head in enumerate(self.heads)]
