"""One user from what CLIP vision says of liked and disliked pictures, for adapters that read pictures alone.

Every way leaves the disliked pictures out at push 0, and gives back a single liked picture exactly as it was encoded
when nothing is disliked. Embeddings of all pictures share a large common part, so nothing here subtracts one from
another: what is added up always has weights that sum to one, and then gets back the length of a real embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PUSH_AWAY, SIDE_BY_SIDE, LEAST_DISLIKED, NEGATIVE = "push away", "side by side", "least disliked", "negative"
WAYS = (PUSH_AWAY, SIDE_BY_SIDE, LEAST_DISLIKED, NEGATIVE)


def pool_pictures(
    liked: torch.Tensor, disliked: torch.Tensor | None, way: str = PUSH_AWAY, push: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(user [k, ...], negative [1, ...] or None) from liked [n, ...] and disliked [m, ...], the last axis the width.

    push, 0..2, is how much the disliked pictures count.
    "push away": the liked mean L goes on along the line from the disliked mean D, to L + push * (L - D); k = 1.
    "side by side": so does every liked picture on its own; k = n, for tastes that an average would blur.
    "least disliked": a mean that weighs each liked picture by how unlike D it is; k = 1, never leaves the liked ones.
    "negative": the liked mean, and D for the unconditional half, so that guidance leads away from it; k = 1.
    Raises ValueError for another way.
    """
    if way not in WAYS:
        raise ValueError(f"There is no pooling {way!r}: choose {', '.join(WAYS)}.")
    liked = liked.float()
    away = disliked.float() if disliked is not None and len(disliked) and push else None
    if way == SIDE_BY_SIDE:
        user = liked if away is None else of_length(liked + push * (liked - mean(away)), liked.norm(dim=-1))
        return user, None
    if way == LEAST_DISLIKED and away is not None:
        return mean(liked, torch.softmax(-push * likeness(liked, away), 0)), None
    user = mean(liked)
    if way == PUSH_AWAY and away is not None:
        user = of_length(user + push * (user - mean(away)), user.norm(dim=-1))
    return user, mean(away) if way == NEGATIVE and away is not None else None


def mean(pictures: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of [n, ...] as [1, ...], as long as the pictures are on average: a mean of many directions is shorter,
    and a projection that learnt what no picture is from zeros would take it for less of a picture."""
    share = torch.full((len(pictures),), 1 / len(pictures)) if weights is None else weights
    share = share.to(pictures).reshape(-1, *[1] * (pictures.ndim - 1))
    return of_length((share * pictures).sum(0, keepdim=True), pictures.norm(dim=-1).mean(0, keepdim=True))


def of_length(vectors: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """vectors [..., width] brought to lengths [...]; a vector of zeros stays one."""
    return vectors * (length / vectors.norm(dim=-1).clamp_min(1e-12))[..., None]


def likeness(liked: torch.Tensor, disliked: torch.Tensor) -> torch.Tensor:
    """How near each liked picture is to the disliked mean, in deviations from the average liked one, [n]."""
    directions = F.normalize(liked.reshape(len(liked), -1), dim=1)
    near = directions @ F.normalize(mean(disliked).flatten(), dim=0)
    return (near - near.mean()) / near.std(correction=0).clamp_min(1e-6)
