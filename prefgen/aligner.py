"""The semantic aligner: from the MLLM's top layers to CLIP's text space.

PrefGen trains a small MLP with MMD against CLIP text embeddings of the user's attributes (arXiv 2512.06020): a loss on
distributions keeps the diversity that a point-wise one can collapse. The loss is in training/train_alignment.py.
"""

from __future__ import annotations

import torch
from torch import nn


class LayerStandardiser(nn.Module):
    """Standardises each layer on its own: the MLLM's last layer is taken after its final norm, the others are not.

    mean and std [layers, D] are those of the training users. forward: [..., layers, D] -> the same shape.
    """

    def __init__(self, layers: int, width: int):
        super().__init__()
        # Buffers, so that they travel in the adapter file.
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("std", torch.ones(layers, width))

    @torch.no_grad()
    def fit(self, states: torch.Tensor) -> None:
        """Take the statistics of states [n, layers, D]."""
        self.mean.copy_(states.float().mean(0))
        # A channel that never moves stays at zero and isn't blown up.
        self.std.copy_(states.float().std(0).clamp_min(1e-4))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (states.float() - self.mean) / self.std


class SemanticAligner(nn.Module):
    """Small MLP from the standardised top layers e_sem [B, layers, D] to CLIP text width [B, C]."""

    def __init__(self, layers: int = 4, width: int = 192, out: int = 128, hidden: int = 512):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(layers * width, hidden), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states.flatten(-2))
