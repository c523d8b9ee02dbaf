"""Percentile intervals from resampling whole clusters: answers and pictures of one user are not independent."""

from __future__ import annotations

import numpy as np

# 250 of them lie beyond each end of a 95 % interval.
DRAWS = 10_000


def resampled(by_user: np.ndarray) -> np.ndarray:
    """Means of `by_user` [..., users] over DRAWS resamplings of whole users, the same every time: [..., DRAWS]."""
    chosen = np.random.default_rng(0).integers(by_user.shape[-1], size=(DRAWS, by_user.shape[-1]))
    return by_user[..., chosen].mean(-1)


def ci95(draws: np.ndarray) -> list[float]:
    """[low, high]: the 95 % percentile interval of `draws` [DRAWS]."""
    return [round(float(bound), 4) for bound in np.percentile(draws, [2.5, 97.5])]


def bootstrap(by_user: np.ndarray) -> list[float]:
    """95 % interval of the mean of `by_user` [users]."""
    return ci95(resampled(by_user))


def weights(clusters: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each of DRAWS resamplings, [DRAWS, clusters]."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=DRAWS)


def crossed(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means over resamplings of rows and, independently, of columns, of what lies in the cells of a crossed design
    (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007).

    sums, counts: [rows, columns], the sum and the number of values in a cell. Returns [at most DRAWS]: a draw that
    holds no value has no mean.
    """
    row_weights = weights(len(sums), seed=0)
    column_weights = weights(sums.shape[1], seed=1)
    totals, present = (((row_weights @ cells) * column_weights).sum(1) for cells in (sums, counts))
    return totals[present > 0] / present[present > 0]
