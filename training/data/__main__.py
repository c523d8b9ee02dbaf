"""Look after data sets.

    python -m training.data check data/agents

Verifies checksums, schema, index, leakage between the splits and balance; ends with 1 when something is wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.errors import exit_with_message
from .check import check


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="verify a set")
    checking.add_argument("folder", type=Path)
    checking.add_argument("--pictures", action="store_true", help="decode every picture as well")
    args = parser.parse_args()
    wrong = False
    for name, faults in check(args.folder, args.pictures):
        print(f"{'ok  ' if not faults else 'FAIL'} {name}", *faults, sep="\n       ")
        wrong |= bool(faults)
    raise SystemExit(int(wrong))


if __name__ == "__main__":
    with exit_with_message():
        main()
