"""What each part of the method (arXiv 2512.06020) brings, on test users and held-out prompts, side by side.

    python -m training.evaluation.evaluate

Same users, prompts, noise, sampler and base for every row. Shipped weights; rows that need others take them from
--ablations (`python -m training.evaluation.ablations` makes them) and are left out where they are missing. A row is
kept under --runs as soon as it is painted, so the same command goes on where it was stopped. Writes methods.md,
methods.json and two figures to --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from prefgen.atelier import models

from ...data.atelier_users import users_of
from ..rows import ROWS
from ..store import Store
from . import measure, page, painter, readings
from .measure import checksums


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    people = users_of("test", args.skip + args.users)[args.skip :]
    requests = painter.requests(people, args.prompts)
    names = rows_of(args.rows)
    ablations = trained_ablations(args.ablations, names)
    names = [name for name in names if name in ablations or not ROWS[name].ablation]
    weights = {"shipped": checksums(models.WEIGHTS)}
    weights |= {ROWS[name].ablation: checksums(folder) for name, folder in ablations.items()}
    setting = {
        "users": len(people),
        "skipped": args.skip,
        "user_ids": [p.id for p in people],
        "prompts": args.prompts,
        "pictures": len(requests),
        "guidance": painter.GUIDANCE,
        "steps": painter.STEPS,
        "history_seed": painter.HISTORY_SEED,
        "noise_seeds": "10000 * batch start + place in the batch",
        "liked_drawn": readings.LIKED_DRAWN,
        "seed_users": min(measure.SEED_USERS, len(people)),
        "seeds_each": measure.SEEDS,
    }
    # Rows with weights of their own carry them in their names: the rest of the folder stays good when they change.
    key = hashlib.sha256(json.dumps([setting, weights["shipped"]]).encode()).hexdigest()[:16]
    painted = measure.PaintedRows(Store(args.runs / key), people, ablations)
    result = {
        "command": "python -m training.evaluation.evaluate" + (f" {shlex.join(sys.argv[1:])}" if sys.argv[1:] else ""),
        **setting,
        "versions": {m.__name__: m.__version__ for m in (torch, np)},
        "weights": weights,
        **measure.measure(painted, names, requests),
    }
    page.write(result, {name: painted.picture_file(name) for name in names}, people, args.out)
    for entry in result["rows"].values():
        low, high = entry["alignment"]["ci95"]
        print(f"{entry['label']:<46} {entry['alignment']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")


def rows_of(chosen: list[str] | None) -> list[str]:
    """The rows to measure: all, or those that were chosen and the ones that every figure is held against."""
    return [name for name in ROWS if chosen is None or name in (*chosen, "none", "prefgen", "oracle")]


def trained_ablations(folder: Path, names: list[str]) -> dict[str, Path]:
    """{row: weights folder} of the rows with weights of their own; says which ones are not there."""
    trained = {}
    for name in names:
        row = ROWS[name]
        weights = folder / row.ablation / "weights"
        if not row.ablation:
            continue
        if (weights / "adapter.safetensors").exists():
            trained[name] = weights
        else:
            command = f"python -m training.evaluation.ablations {row.ablation}"
            print(f"{row.label}: {weights} has no adapter, left out ({command})")
    return trained


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluation.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=48)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first test users")
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts a user")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="some rows instead of all")
    parser.add_argument(
        "--ablations", type=Path, default=Path("runs/ablations"), help="what training.evaluation.ablations made"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/evaluate"), help="where finished rows are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for all")
    args = parser.parse_args()
    if args.users < 2 or args.prompts < 2:
        parser.error("at least 2 users (one user's preference is tried on another) and 2 prompts are needed")
    if args.skip < 0:
        parser.error("--skip is a number of users, 0 or more")
    return args


if __name__ == "__main__":
    main()
