"""Look after data sets.

    python -m training.data check data/agents
    python -m training.data import ratings.csv data/own

`check` verifies checksums, schema, index, leakage between the splits and balance; it ends with 1 when something is
wrong. `import` makes a set of people's own ratings: of ComfyUI tastes (folders or zips), folders USER/liked and
USER/disliked, CSV, JSON lines, Parquet, PAMELA's folder, or a Hugging Face data set on disk. The same command goes on
where it was stopped. `docs/data.md` describes both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.arguments import natural, ratio
from ..common.errors import exit_with_message
from .check import check
from .cli import add_engine, engine_of
from .ratings.make import make
from .ratings.rules import Limits
from .ratings.source import read_source
from .ratings.tables import COLUMNS


def main() -> None:
    args = arguments()
    if args.command == "import":
        limits = Limits(args.min_liked, args.min_disliked, args.heldout, args.ratio, args.margin)
        make(read_source(args.source, dict(args.columns)), args.folder, limits, args.processes, engine_of(args))
        return
    wrong = False
    for name, faults in check(args.folder, args.pictures):
        print(f"{'ok  ' if not faults else 'FAIL'} {name}", *faults, sep="\n       ")
        wrong |= bool(faults)
    raise SystemExit(int(wrong))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="verify a set")
    checking.add_argument("folder", type=Path)
    checking.add_argument("--pictures", action="store_true", help="decode every picture as well")
    importing = commands.add_parser("import", help="make a set of people's own ratings")
    importing.add_argument("source", type=Path, help="folder, zip or table")
    importing.add_argument("folder", type=Path, help="the set's folder")
    importing.add_argument(
        "--columns", nargs="+", type=column, default=[], metavar="OURS=THEIRS", help="a table's own names: user=rater"
    )
    importing.add_argument("--min-liked", type=natural, default=4, help="pictures a user must like")
    importing.add_argument("--min-disliked", type=natural, default=4)
    importing.add_argument("--heldout", type=natural, default=1, help="pairs a user for evaluation")
    importing.add_argument("--ratio", type=ratio, default=1.8, help="larger to smaller side of a history; 0 for any")
    importing.add_argument(
        "--margin", type=margin, default=0.25, help="scores so near a user's mean are neutral, in standard deviations"
    )
    add_engine(importing)
    return parser.parse_args()


def column(text: str) -> tuple[str, str]:
    """ "user=rater" -> ("user", "rater"); nothing after the sign: the table has no such column."""
    ours, sign, theirs = text.partition("=")
    if not sign or ours not in COLUMNS:
        raise argparse.ArgumentTypeError(f"{text!r}: write OURS=THEIRS, with one of {', '.join(sorted(COLUMNS))}")
    return ours, theirs


def margin(text: str) -> float:
    """ "0.25" -> 0.25, from 0 to below 3."""
    value = float(text)
    if not 0 <= value < 3:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 0 to 3")
    return value


if __name__ == "__main__":
    with exit_with_message():
        main()
