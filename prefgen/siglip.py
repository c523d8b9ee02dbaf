"""SigLIP's pooling head, which makes one embedding of a picture's states (arXiv 2303.15343).

ComfyUI loads SigLIP without it, since what Redux reads are the states; InstantX' adapter for Flux reads what it gives.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

PREFIX = "vision_model.head."
NORM = "vision_model.post_layernorm.weight"
# Of SigLIP so400m: 16 heads of 72.
HEAD_WIDTH = 72
# Of the largest weight: what rounding to fp8 moves, and far below what tells two trainings apart.
ROUNDING = 0.05


class PoolingHead(nn.Module):
    """A learned query looks at the normed states: [B, T, E] -> [B, E], transformers' pooler_output."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, width // HEAD_WIDTH, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        probe = self.probe.expand(len(states), -1, -1)
        pooled, _ = self.attention(probe, states, states, need_weights=False)
        inner = nn.functional.gelu(self.mlp["fc1"](self.layernorm(pooled)), approximate="tanh")
        return (pooled + self.mlp["fc2"](inner))[:, 0]


@torch.inference_mode(False)
def load_head(path: Path, norm: torch.Tensor) -> PoolingHead | None:
    """The head in a SigLIP file, fp32 on the CPU; None for a file of another model, or one without a head. norm: the
    last norm's weights [E] of the loaded model, by which its file is known."""
    try:
        with safe_open(str(path), "pt") as file:
            names = set(file.keys())
            if NORM not in names or PREFIX + "probe" not in names or not _alike(file.get_tensor(NORM), norm):
                return None
            weights = {
                name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names if name.startswith(PREFIX)
            }
        with torch.device("meta"):
            head = PoolingHead(norm.shape[0], len(weights["mlp.fc1.bias"]))
        head.load_state_dict(weights, assign=True)
    except (SafetensorError, OSError, KeyError, RuntimeError):
        return None
    return head.eval().requires_grad_(False)


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    one = one.float().cpu()
    other = other.float().cpu()
    return one.shape == other.shape and bool((one - other).abs().max() <= ROUNDING * other.abs().max())
