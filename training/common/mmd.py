"""Maximum mean discrepancy: the distance between two sets of vectors that aligns e_sem with CLIP's text space.

The paper (arXiv 2512.06020) names the measure, not its kernel or estimator. Here: the unbiased one (U-statistic;
Gretton et al., JMLR 13, 2012, lemma 6) with a mixture of Gaussian kernels, always in fp32. In bf16 the value of two
equal sets is two orders of magnitude too large, and the biased form is mostly bias at training's batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Around the median of the distances, the usual heuristic (Gretton et al., section 8). One kernel sees only differences
# of its own scale: a mixture over a few octaves needs no tuning, as in moment matching networks (arXiv 1502.02761).
OCTAVES = (0.25, 0.5, 1.0, 2.0, 4.0)


def mmd2(
    x: torch.Tensor, y: torch.Tensor, bandwidths: torch.Tensor | None = None, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """Unbiased squared MMD between x [n, d] and y [m, d], n and m at least 2. Scalar fp32; can be negative.

    bandwidths: squared bandwidths of the mixture (default: `median_bandwidths` of the two sets).
    weights: one a bandwidth (default: equal, summing to 1).
    Kernel: k(a, b) = sum_i w_i exp(-|a - b|^2 / (2 bandwidth_i)).
    Raises ValueError for sets smaller than 2 or of different width.
    """
    if len(x) < 2 or len(y) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"MMD needs two sets of at least 2 vectors of one width, got {[*x.shape]} and {[*y.shape]}.")
    # Double inputs stay double, so that the estimator can be checked against itself in fp64.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        y = y.to(dtype)
        if bandwidths is None:
            bandwidths = median_bandwidths(x, y)
        if weights is None:
            weights = [1 / len(bandwidths)] * len(bandwidths)
        distances_xx = _squared_distances(x, x)
        distances_yy = _squared_distances(y, y)
        distances_xy = _squared_distances(x, y)
        total = x.new_zeros(())
        for bandwidth, weight in zip(bandwidths.to(dtype), weights, strict=True):
            within_x = _mean_off_diagonal(torch.exp(-distances_xx / (2 * bandwidth)))
            within_y = _mean_off_diagonal(torch.exp(-distances_yy / (2 * bandwidth)))
            between = torch.exp(-distances_xy / (2 * bandwidth)).mean()
            total = total + weight * (within_x + within_y - 2 * between)
    return total


def median_bandwidths(x: torch.Tensor, y: torch.Tensor, factors: Sequence[float] = OCTAVES) -> torch.Tensor:
    """Squared bandwidths [len(factors)]: multiples of the median squared distance of the pooled sets, detached.

    x [n, d], y [m, d].
    """
    with torch.autocast(x.device.type, enabled=False):
        pooled = torch.cat([x, y]).detach().float()
        distances = _squared_distances(pooled, pooled)
        off_diagonal = distances[~torch.eye(len(pooled), dtype=torch.bool, device=x.device)]
        median = off_diagonal.median().clamp_min(1e-12)
        return median * torch.tensor(factors, device=x.device)


def _mean_off_diagonal(kernel: torch.Tensor) -> torch.Tensor:
    """A vector's kernel with itself is 1 whatever the set: counting it is the bias of the biased estimator."""
    return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n, m]. From products rather than torch.cdist: its gradient is finite where two rows are equal."""
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    return squared.clamp_min(0)
