"""Linear readers of a taste off the MLLM's states, where the data knows attributes: they help it along while it trains,
and are thrown away. Ours, and in the second edition without weight: see docs/departures.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..common.precision import full_precision
from .readers import Reader
from .worlds import World

# The paper takes e_sem from the last token of the top four layers, so the heads read those.
TOP_LAYERS = 4


class TasteHeads(nn.Module):
    """Linear readers of the top four layers: liked and disliked attributes. Used in training only."""

    def __init__(self, width: int, attributes: int):
        super().__init__()
        self.read = nn.Linear(TOP_LAYERS * width, 2 * attributes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, layers, D] -> [B, 2 * attributes]."""
        top = F.layer_norm(states[:, -TOP_LAYERS:], states.shape[-1:])
        return self.read(top.flatten(1))


def new_heads(reader: Reader, world: World, weight: float) -> TasteHeads | None:
    """Fresh heads, where the reading loss is asked for and the data knows attributes."""
    if not weight or not world.attributes:
        return None
    return TasteHeads(reader.fingerprint["hidden_size"], len(world.attributes))


def taste_targets(world: World, users: list[int]) -> torch.Tensor:
    """[B, 2 * attributes]: liked by any taste, then disliked."""
    count = len(world.attributes)
    truth = torch.zeros(len(users), 2 * count)
    for row, user in zip(truth, users, strict=True):
        row[[a for taste in world.tastes(user) for a in taste]] = 1
        row[[count + a for a in world.dislikes(user)]] = 1
    return truth


@full_precision
def reading_loss(heads: TasteHeads, states: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy of the heads. states [B, layers, D], truth [B, 2 * attributes]."""
    # The positives are rare (about 10 of 98): weigh them up, or the heads first learn to say nothing.
    weight = torch.tensor(4.0, device=truth.device)
    return F.binary_cross_entropy_with_logits(heads(states), truth, pos_weight=weight)


def precision_at_k(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of true attributes among as many ranked first, mean over rows. scores, truth [B, attributes]."""
    rows = zip(scores, truth, strict=True)
    hits = [true[score.topk(int(true.sum())).indices].mean() for score, true in rows]
    return torch.stack(hits).mean().item()
