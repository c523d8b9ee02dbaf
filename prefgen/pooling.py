"""One user from what CLIP vision says of liked and disliked pictures.

`pool_image_embeds` is e_img, the image part of a PrefGen adapter's user vector. `pool_pictures` is for IP-Adapter
files, which read pictures alone: every way leaves the disliked pictures out at push 0, and gives back a single liked
picture exactly as it was encoded when nothing is disliked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PUSH_AWAY = "push away"
SIDE_BY_SIDE = "side by side"
LEAST_DISLIKED = "least disliked"
NEGATIVE = "negative"
WAYS = (PUSH_AWAY, SIDE_BY_SIDE, LEAST_DISLIKED, NEGATIVE)


def pool_image_embeds(liked: torch.Tensor, disliked: torch.Tensor | None = None, push: float = 0.0) -> torch.Tensor:
    """e_img: the mean of the unit liked embeddings [n, I], of unit length, [I].

    push moves it away from the mean of the disliked ones [m, I]: 0 leaves them out, 1 subtracts all of it.
    """
    # Of unit length first: CLIP compares embeddings by angle alone, and no picture counts for more than another.
    pooled = F.normalize(liked.float(), dim=1).mean(0)
    if disliked is not None and len(disliked) and push:
        pooled = pooled - push * F.normalize(disliked.float(), dim=1).mean(0)
    return F.normalize(pooled, dim=0)


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
    if disliked is None or not len(disliked) or not push:
        return (liked if way == SIDE_BY_SIDE else mean(liked)), None
    disliked = disliked.float()
    if way == SIDE_BY_SIDE:
        return push_away(liked, disliked, push), None
    if way == LEAST_DISLIKED:
        return mean(liked, torch.softmax(-push * likeness(liked, disliked), 0)), None
    if way == NEGATIVE:
        return mean(liked), mean(disliked)
    return push_away(mean(liked), disliked, push), None


# Embeddings of all pictures share a large common part, so nothing below subtracts one from another: what is added up
# has weights that sum to one, and then gets back the length of a real embedding.


def push_away(users: torch.Tensor, disliked: torch.Tensor, push: float) -> torch.Tensor:
    """users [k, ...] further along the line from the mean of disliked [m, ...], as long as before."""
    return of_length(users + push * (users - mean(disliked)), users.norm(dim=-1))


def mean(pictures: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of [n, ...] as [1, ...], as long as the pictures are on average: a mean of many directions is shorter,
    and a projection that learnt what no picture is from zeros would take it for less of a picture.

    weights: the share of each picture, [n], which sum to 1; None is equal shares.
    """
    if weights is None:
        weights = torch.full((len(pictures),), 1 / len(pictures))
    weights = weights.to(pictures).reshape(-1, *[1] * (pictures.ndim - 1))
    return of_length((weights * pictures).sum(0, keepdim=True), pictures.norm(dim=-1).mean(0, keepdim=True))


def of_length(vectors: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """vectors [..., width] brought to lengths [...]; a vector of zeros stays one."""
    return vectors * (length / vectors.norm(dim=-1).clamp_min(1e-12))[..., None]


def likeness(liked: torch.Tensor, disliked: torch.Tensor) -> torch.Tensor:
    """How near each liked picture is to the disliked mean, in deviations from the average liked one, [n]."""
    directions = F.normalize(liked.reshape(len(liked), -1), dim=1)
    near = directions @ F.normalize(mean(disliked).flatten(), dim=0)
    # A single picture, or pictures that are all alike, deviate by 0 and not by 0 / 0.
    return (near - near.mean()) / near.std(correction=0).clamp_min(1e-6)
