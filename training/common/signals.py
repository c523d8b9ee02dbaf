"""SIGTERM and SIGINT, which end a run after its step."""

from __future__ import annotations

import signal


class StopSignals:
    """Inside of it SIGTERM and SIGINT don't end the process: `received` is the signal's number, 0 for none.

    Both are installed outright: a shell starts background jobs with SIGINT ignored, and Python leaves it so.
    """

    def __init__(self):
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, _frame) -> None:
        self.received = number
