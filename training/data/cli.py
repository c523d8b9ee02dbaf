"""The options of the data sets' commands that say what their jobs run on."""

from __future__ import annotations

import argparse
from functools import partial

from ..common.arguments import natural
from . import engine, ray_engine


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add --engine, --ray-address and --processes."""
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="local: this machine's cores")
    parser.add_argument("--ray-address", help="a running cluster; without one --engine ray starts its own here")
    parser.add_argument("--processes", type=natural, default=0, help="0 for all cores")


def engine_of(args: argparse.Namespace) -> engine.Engine:
    """The engine that these options name."""
    return engine.run if args.engine == "local" else partial(ray_engine.run, address=args.ray_address)
