"""Krippendorff's alpha for nominal values, from its definition; judges may leave answers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def coincidences(values: Sequence[Hashable], labels: Sequence[Hashable]) -> np.ndarray:
    """[labels, labels]: how often each value of a unit meets each value of another judge, over the m - 1 others."""
    found = Counter(values)
    counts = np.array([found[label] for label in labels], float)
    if counts.sum() < 2:
        return np.zeros((len(labels), len(labels)))
    return (np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1)


def alpha(matrix: np.ndarray) -> np.ndarray:
    """1 - observed / expected disagreement of coincidence matrices [..., labels, labels]; NaN where all values are
    the same, since then chance has nothing to disagree about."""
    totals = matrix.sum(-1)
    n = totals.sum(-1)
    apart = n - np.trace(matrix, axis1=-2, axis2=-1)
    expected = n**2 - (totals**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 1e-9, 1 - (n - 1) * apart / expected, np.nan)


def observed(matrix: np.ndarray) -> float:
    """The share of pairs of judges who gave the same value; NaN without any pair."""
    return float(np.trace(matrix) / matrix.sum()) if matrix.sum() else float("nan")
