"""How crisp pictures are."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def laplacian(pictures: torch.Tensor) -> torch.Tensor:
    """Mean absolute Laplacian of each picture [B, 3, H, W]: [B]."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    return F.conv2d(pictures, kernel, groups=3).abs().mean((1, 2, 3))
