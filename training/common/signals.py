"""What stops a run from outside, each in one sentence: a signal, no memory, no room on the disk."""

from __future__ import annotations

import errno
import signal

NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file size limit"}


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


def no_room(error: BaseException | None) -> str | None:
    """Why nothing more can be written, or None for any other error. torch hides the cause behind errors of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return NO_ROOM[error.errno]
        error = error.__cause__ or error.__context__
    return None
