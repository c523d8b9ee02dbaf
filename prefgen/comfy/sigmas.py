"""Shares of the sampling in sigmas, and back.

Asking a model's schedule reads tensors, which waits for the device. So it is asked once, when a user is applied: a
sampling run finds the answers here, unless a later node gave the model another schedule.
"""

from __future__ import annotations

from bisect import bisect_left
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

    def at(self, model_sampling, share: float) -> float:
        """The sigma at a share of the sampling, 0..1."""
        if share not in self._at:
            self._at[share] = float(model_sampling.percent_to_sigma(share))
        return self._at[share]

    def tabulate(self, model_sampling) -> None:
        """Make `share` ready, for any schedule that knows the way back."""
        if not self._rising:
            # ComfyUI gives the very start an endless sigma.
            shares = (i / SHARES for i in range(1, SHARES + 1))
            falling = [float(model_sampling.sigma_max), *(self.at(model_sampling, share) for share in shares)]
            self._rising = falling[::-1]

    def share(self, sigma: float) -> float:
        """The share of the sampling, 0..1, at a sigma. Needs `tabulate`."""
        rising = self._rising
        if sigma >= rising[-1]:
            return 0.0
        i = bisect_left(rising, sigma)
        if i == 0:
            return 1.0
        low = rising[i - 1]
        high = rising[i]
        return 1 - (i - 1 + (sigma - low) / (high - low)) / SHARES
