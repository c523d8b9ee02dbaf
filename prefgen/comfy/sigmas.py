"""Shares of the sampling in sigmas, and back.

Asking a model's schedule reads tensors, which would wait for the device at every value: a copy on the CPU is asked. And
only once, when a user is applied: a sampling run finds the answers here, unless a later node gave the model another
schedule.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable
from weakref import WeakKeyDictionary

SHARES = 200  # steps in which a schedule is tabulated for the way back

_sigmas: WeakKeyDictionary = WeakKeyDictionary()  # model_sampling -> Sigmas; nodes that change it make a new object


class Sigmas:
    """The sigmas of one `model_sampling`; every value is read once."""

    def __init__(self):
        self._at: dict[float, float] = {}
        self._rising: list[float] = []

    @classmethod
    def of(cls, model_sampling) -> Sigmas:
        return _sigmas.setdefault(model_sampling, cls())

    def read(self, model_sampling, shares: Iterable[float], table: bool = False) -> None:
        """Ask for the sigmas at shares of the sampling, 0..1, and for all that `share` needs if `table`."""
        missing = [share for share in shares if share not in self._at]
        table = table and not self._rising
        if not missing and not table:
            return
        on_cpu = copy.deepcopy(model_sampling).to("cpu")
        if table:
            steps = [step / SHARES for step in range(1, SHARES + 1)]
            missing += steps
        for share in missing:
            self._at[share] = float(on_cpu.percent_to_sigma(share))
        if table:
            # ComfyUI gives the very start an endless sigma.
            self._rising = [self._at[step] for step in reversed(steps)] + [float(on_cpu.sigma_max)]

    def at(self, share: float) -> float:
        """The sigma at a share of the sampling that was `read`."""
        return self._at[share]

    def share(self, sigma: float) -> float:
        """The share of the sampling, 0..1, at a sigma. Needs `read` with a table."""
        rising = self._rising
        if sigma >= rising[-1]:
            return 0.0
        i = bisect_left(rising, sigma)
        if i == 0:
            return 1.0
        low = rising[i - 1]
        high = rising[i]
        return 1 - (i - 1 + (sigma - low) / (high - low)) / SHARES
