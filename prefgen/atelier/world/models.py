"""How encoders and judges see the second world's pictures, which are 256 px."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..editions import READ_SIZE


def as_read(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 256, 256] (or any multiple of 128) averaged to [B, 3, 128, 128]."""
    return F.interpolate(pictures, (READ_SIZE, READ_SIZE), mode="area")
