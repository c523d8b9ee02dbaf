"""Distances, means and intervals of what was read off the pictures of a row; the intervals resample whole users."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..common.mmd import mmd2
from ..common.statistics import bootstrap, ci95, resampled

# Sigma 10, squared, and times 1000: as CMMD is published for CLIP embeddings (arXiv 2401.09603).
CMMD_BANDWIDTH = torch.tensor([100.0])
CMMD_SCALE = 1000


def interval(values: np.ndarray) -> dict:
    """{"mean", "ci95", "users"} of `values` [users], NaNs left out."""
    values = values[~np.isnan(values)]
    return {"mean": round(float(values.mean()), 4), "ci95": bootstrap(values), "users": len(values)}


def gain_share(row: np.ndarray, none: np.ndarray, oracle: np.ndarray) -> dict:
    """(row - none) / (oracle - none), of the means; the interval resamples the users of all three together.

    {"mean", "ci95"}; None where the oracle gains nothing, in the mean or in any draw: there is no share of that.
    """
    rows, nones, oracles = resampled(np.stack([row, none, oracle]))
    ceiling = oracle.mean() - none.mean()
    share = round(float((row.mean() - none.mean()) / ceiling), 4) if ceiling > 0 else None
    return {"mean": share, "ci95": ci95((rows - nones) / (oracles - nones)) if (oracles > nones).all() else None}


def by_user(values: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """Means [users] of one value a picture [n]; owners: whose picture it is, [n], every user at least once."""
    owners = np.asarray(owners)
    return np.array([values[owners == user].mean() for user in range(owners.max() + 1)])


def features_of(space: str, readings: list[dict], owners: Sequence[int]) -> list[np.ndarray]:
    """Each user's features [n, d] in `space`, a key of the readings."""
    owners = np.asarray(owners)
    features = np.array([reading[space] for reading in readings])
    return [features[owners == user] for user in range(owners.max() + 1)]


def to_liked(
    distance: Callable[[np.ndarray, np.ndarray], float],
    space: str,
    readings: list[dict],
    liked: list[list[dict]],
    owners: Sequence[int],
) -> np.ndarray:
    """A distance between each user's pictures and what that user likes (readings of each), [users], in `space`."""
    pairs = zip(features_of(space, readings, owners), liked, strict=True)
    return np.array([distance(own, np.array([reading[space] for reading in theirs])) for own, theirs in pairs])


def cmmd(pictures: np.ndarray, liked: np.ndarray) -> float:
    """1000 times the squared MMD of unit CLIP embeddings [n, d] and [m, d] (unbiased, so it can be negative): CMMD
    (arXiv 2401.09603)."""
    return CMMD_SCALE * mmd2(torch.from_numpy(pictures), torch.from_numpy(liked), CMMD_BANDWIDTH).item()


def kid(pictures: np.ndarray, liked: np.ndarray) -> float:
    """Squared MMD of features [n, d] and [m, d] under the kernel (x y / d + 1)^3, unbiased (arXiv 1801.01401)."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        # Without the diagonal, a picture with itself, the estimate has no bias: few pictures are enough.
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(pictures) + within(liked) - 2 * kernel(pictures, liked).mean())


def frechet(pictures: np.ndarray, liked: np.ndarray) -> float:
    """Frechet distance (arXiv 1706.08500) between all users' features [n, d] and [m, d] together.

    Biased upwards where n is small, by the same n in every row; resampled users hold fewer different ones and would be
    biased more, so there is no interval.
    """
    spread = np.cov(pictures, rowvar=False)
    liked_spread = np.cov(liked, rowvar=False)
    between_means = ((pictures.mean(0) - liked.mean(0)) ** 2).sum()
    # The trace of a root is the sum of the eigenvalues' roots. scipy's sqrtm says the same, but warns where there are
    # fewer pictures than features, as here. Below zero an eigenvalue is by rounding alone.
    shared = np.sqrt(np.linalg.eigvals(spread @ liked_spread).real.clip(0)).sum()
    return float(between_means + np.trace(spread) + np.trace(liked_spread) - 2 * shared)


def diversity(groups: np.ndarray) -> np.ndarray:
    """Mean 1 - cosine between pictures that differ in the seed alone, [groups], of unit embeddings [groups, seeds, d];
    NaN with one seed."""
    seeds = groups.shape[1]
    if seeds < 2:
        return np.full(len(groups), np.nan)
    cosine = groups @ groups.transpose(0, 2, 1)
    return 1 - (cosine.sum((1, 2)) - np.trace(cosine, axis1=1, axis2=2)) / (seeds * (seeds - 1))
