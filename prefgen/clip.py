"""The image part of the user vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pool_image_embeds(liked: torch.Tensor, disliked: torch.Tensor | None = None, push: float = 0.0) -> torch.Tensor:
    """e_img: the mean of the unit liked embeddings [n, I], of unit length, [I].

    push moves it away from the mean of the disliked ones [m, I]: 0 leaves them out, 1 subtracts their mean whole.
    """
    pooled = F.normalize(liked.float(), dim=1).mean(0)
    if disliked is not None and len(disliked) and push:
        pooled = pooled - push * F.normalize(disliked.float(), dim=1).mean(0)
    return F.normalize(pooled, dim=0)
