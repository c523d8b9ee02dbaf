"""A study with human judges: blinded side-by-side choices in a static page, and what the answers say.

    python -m training.evaluation.study make output/demo study
    python -m training.evaluation.study analyse study answers-*.csv

`make` writes study/page for the judges, who need a browser and nothing else, and study/key.json for whoever asks them.
`analyse` reads the files that judges send back. `docs/study.md` describes the table of pictures, the page and the
figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ...common.arguments import natural
from ...common.errors import exit_with_message
from .analyse import analyse
from .make import Plan, make
from .pictures import read


def main() -> None:
    args = arguments()
    with exit_with_message():
        if args.command == "make":
            options = {"title": args.question} if args.question else {}
            plan = Plan(tuple(args.pairs), args.trials, args.repeats, args.seed, **options)
            print(make(read(args.pictures), args.folder, plan))
        else:
            print(analyse(args.folder, args.answers, args.min_consistency))


def pair(text: str) -> tuple[str, str]:
    """ "prefgen:none" -> ("prefgen", "none")."""
    first, _, second = text.partition(":")
    if not first or not second or first == second:
        raise argparse.ArgumentTypeError(f"{text!r}: write two methods as A:B")
    return first, second


def share(text: str) -> float:
    """ "0.7" -> 0.7, from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write the page and its key")
    maker.add_argument(
        "pictures", type=Path, help="a .jsonl or .parquet table, or a folder with one, such as output/demo"
    )
    maker.add_argument("folder", type=Path, help="the study's folder, new or empty")
    maker.add_argument(
        "--pairs", type=pair, nargs="+", default=[], metavar="A:B", help="methods to compare; all if none"
    )
    maker.add_argument("--trials", type=natural, default=60, help="comparisons at most, 0 for all (default: 60)")
    maker.add_argument("--repeats", type=natural, default=6, help="of them shown again, mirrored (default: 6)")
    maker.add_argument("--seed", type=natural, default=0, help="which comparisons are drawn")
    maker.add_argument("--question", help="what judges are asked")
    analyser = commands.add_parser("analyse", help="win rates, agreement and checks")
    analyser.add_argument("folder", type=Path, help="the study's folder, with key.json")
    analyser.add_argument("answers", type=Path, nargs="+", help="the judges' CSV files")
    analyser.add_argument(
        "--min-consistency", type=share, default=0.0, help="leave judges out who repeat less of their own answers"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
