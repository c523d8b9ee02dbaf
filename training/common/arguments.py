"""Numbers on a command line, for argparse's `type`."""

from __future__ import annotations

import argparse


def natural(text: str) -> int:
    """ "12" -> 12, from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """ "12" -> 12, from 1 on."""
    if not natural(text):
        raise argparse.ArgumentTypeError("it must be at least 1")
    return int(text)


def ratio(text: str) -> float:
    """ "1.8" -> 1.8; 0 or from 1 on."""
    value = float(text)
    if value and not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: write 0 for no limit, or a number from 1 on")
    return value
