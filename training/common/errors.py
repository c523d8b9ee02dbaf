"""How every command of `training` ends on what a person can mend."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prefgen.errors import MendableError


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Ends the process with a MendableError's sentence, or with one that says how to go on after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    try:
        yield
    except MendableError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        os._exit(130)  # at once: workers end with this process, and no file of theirs is half there
