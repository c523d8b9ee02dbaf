"""How far judges agree: Krippendorff's alpha for nominal values, and the plain share; judges may leave answers out.

Both take counts [units, labels]: how many judges gave each label to each unit.
"""

from __future__ import annotations

import krippendorff
import numpy as np


def alpha(counts: np.ndarray) -> float:
    """1 - observed / expected disagreement; NaN where no unit has two judges or all values are the same, since then
    chance has nothing to disagree about."""
    if counts.shape[1] < 2 or counts.sum(1).max() < 2:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def observed(counts: np.ndarray) -> float:
    """The share of pairs of judges who gave the same value; NaN without any pair."""
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return float("nan")
    judges = counts.sum(1)
    # As in alpha, a value of a unit meets its m - 1 others, so that a unit weighs as much as it has values.
    same = (counts * (counts - 1)).sum(1) / (judges - 1)
    return float(same.sum() / judges.sum())
