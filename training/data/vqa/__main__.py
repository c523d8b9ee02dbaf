"""Preference VQA from any data set of the common schema.

    python -m training.data.vqa data/agents data/agents-vqa

Questions of five kinds about users' histories (would this user like this picture; which of the two; what do the liked
ones share; what is avoided; the taste in words), balanced, answerable from the history alone. Sets without attributes,
such as Pick-a-Pic, give the first two. Pictures stay where they are: a question names shard and row. Ends with 1 when a
text-only control answers better than chance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...common.arguments import natural, positive
from ...common.errors import exit_with_message
from .make import make


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.vqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of a finished data set")
    parser.add_argument("folder", type=Path, help="where the questions go")
    parser.add_argument("--each", type=positive, default=10, help="questions a user")
    parser.add_argument("--seed", type=natural, default=0)
    args = parser.parse_args()
    with exit_with_message():
        report = make(args.data, args.folder, args.each, args.seed)
    print(json.dumps({key: report[key] for key in ("questions", "answers", "text_only")}, indent=1))
    given_away = [kind for kind, control in report["text_only"].items() if control["gives_away"]]
    if given_away:
        raise SystemExit(f"The text alone answers {', '.join(given_away)} better than chance: don't train on this set.")


if __name__ == "__main__":
    main()
