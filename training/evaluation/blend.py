"""Two users blended: does the picture move from one taste to the other as the weight does?

    python -m training.evaluation.blend

Pairs of test users with one taste each, fused and mixed by the same functions as Blend Users. For every share of the
second user the same prompts are painted from the same noise, and the judge reads each user's alignment off the
pictures. Writes blend.md and blend.json to --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from prefgen.atelier import captions, users
from prefgen.files import write_atomic
from prefgen.fusion import FusedUser
from prefgen.user_file import blend_users

from ..common.statistics import bootstrap
from ..data.atelier_users import users_of
from .evaluate.painter import Painter, history_of
from .tables import estimate, table

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = 8  # of each side of a history


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.monotonic()
    painter = Painter()
    pairs = pairs_of(args.pairs)
    towards = np.array([readings(painter, pair, args.prompts) for pair in pairs])
    steps = np.diff(towards.mean(0))
    result = {
        "command": shlex.join(["python", "-m", "training.evaluation.blend", *sys.argv[1:]]),
        "pairs": [[person.id for person in pair] for pair in pairs],
        "prompts": args.prompts,
        "shares": {
            str(share): {"mean": round(float(values.mean()), 4), "ci95": bootstrap(values)}
            for share, values in zip(SHARES, towards.T, strict=True)
        },
        "steps": {
            f"{SHARES[i]} to {SHARES[i + 1]}": {"mean": round(float(steps[i]), 4), "ci95": bootstrap(moved)}
            for i, moved in enumerate(np.diff(towards).T)
        },
        "monotonic": bool((steps > 0).all()),
        "seconds": round(time.monotonic() - start),
    }
    write_atomic(args.out / "blend.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(args.out / "blend.md", page(result).encode())
    print(page(result))


def pairs_of(count: int) -> list[tuple[users.User, users.User]]:
    """The first test users with one taste, two by two: with two tastes it wouldn't be clear what half of a user is."""
    people: list[users.User] = []
    wanted = 2 * count
    while len([person for person in people if len(person.tastes) == 1]) < wanted:
        people = users_of("test", max(2 * wanted, 2 * len(people)))
    single = [person for person in people if len(person.tastes) == 1][:wanted]
    return list(zip(single[::2], single[1::2], strict=True))


def readings(painter: Painter, pair: Sequence[users.User], prompts: int) -> list[float]:
    """For each of SHARES, how much better the pictures suit the second user than the first: the mean over prompts of
    the difference in alignment, -2..2."""
    fused = [FusedUser(painter.user_vector(*history_of(person, EXAMPLES)), painter.adapter) for person in pair]
    heldout = captions.heldout_prompts()
    chosen = [heldout[i * len(heldout) // prompts] for i in range(prompts)]
    texts = [captions.neutral(subject, prop) for subject, prop in chosen]
    towards = []
    for share in SHARES:
        vector = blend_users(fused, [1 - share, share]).vector
        # The same noise for every share.
        pictures = painter.paint(texts, vector.expand(len(texts), -1), seed=pair[0].id)
        seen = [dict(each["attributes"]) for each in painter.judge.read((pictures * 0.5 + 0.5).movedim(1, -1))]
        gains = [users.alignment(reading, pair[1]) - users.alignment(reading, pair[0]) for reading in seen]
        towards.append(float(np.mean(gains)))
    return towards


def page(result: dict) -> str:
    """blend.md."""
    head = ["share of the second user", "second user's alignment less the first's"]
    shares = [[share, estimate(entry, signed=True)] for share, entry in result["shares"].items()]
    steps = [[step, estimate(entry, signed=True)] for step, entry in result["steps"].items()]
    moves = "moves" if result["monotonic"] else "does not always move"
    pairs = len(result["pairs"])
    text = (
        f"`{result['command']}`: {pairs} pairs of test users with one taste, {result['prompts']} held-out prompts\n"
        f"each, shipped weights ({result['seconds']} s). From quarter to quarter the mean {moves} to the second user.\n"
        "Intervals: 95 %, bootstrap over pairs."
    )
    parts = ["# Two users blended", text, table(head, shares), "How far each quarter moves it:"]
    return "\n\n".join([*parts, table(["from and to", "moved"], steps)]) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.blend", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts a pair")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for all")
    args = parser.parse_args()
    if args.pairs < 2 or args.prompts < 1:
        parser.error("at least 2 pairs and 1 prompt are needed")
    return args


if __name__ == "__main__":
    main()
