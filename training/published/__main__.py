"""Published preference data in pickles, in the layout of every other set, without running the pickles.

    python -m training.published flux_coco.pkl data/agents --images flux_coco/ --users user.json
    python -m training.published learn-user-pref/ data/real

SOURCE is one pickle, or a folder of them; which layout it has is told from its content. The same command goes on where
it was stopped. `docs/published.md` describes the layouts and the rules.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.cli import natural, positive
from ..one_sentence import one_sentence
from ..pickapic.__main__ import memory
from .layouts import Options
from .make import make


def main() -> None:
    args = arguments()
    options = Options(args.images, args.users, args.heldout_csv, args.skip_missing)
    with one_sentence():
        make(args.source, args.folder, options, args.unit_mb, args.processes, args.memory)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a pickle, or a folder of them")
    parser.add_argument("folder", type=Path, help="the set's folder")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the picture files that a pickle names")
    parser.add_argument("--users", type=Path, metavar="FILE", help="JSON list of the user ids to take, in this order")
    parser.add_argument("--heldout-csv", type=Path, metavar="DIR", help="folder of {user}_test.csv: the held-out pairs")
    parser.add_argument("--skip-missing", action="store_true", help="drop pairs without a picture file, and count them")
    parser.add_argument("--unit-mb", type=positive, default=512, help="of pictures that become one shard")
    parser.add_argument("--memory", type=memory, default="700MB", help="DuckDB's share; more spills to disk")
    parser.add_argument("--processes", type=natural, default=0, help="that copy pictures; 0 for all cores")
    return parser.parse_args()


if __name__ == "__main__":
    main()
