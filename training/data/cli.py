"""What the command lines of the data sets share."""

from __future__ import annotations

import argparse
from functools import partial

from . import engine, ray_engine


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


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The options that say what the jobs run on."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="local: this machine's cores")
    parser.add_argument("--ray-address", help="a running cluster; without one --engine ray starts its own here")
    parser.add_argument("--processes", type=natural, default=0, help="0 for all cores")


def engine_of(args: argparse.Namespace) -> engine.Engine:
    """The engine that these options name."""
    return engine.run if args.engine == "local" else partial(ray_engine.run, address=args.ray_address)
