"""The second edition's rows side by side, as docs/evidence/second_edition.md fixed them before they were trained.

    python -m training.evaluation.world --arms runs/arms --out docs/evidence

Same users, prompts, noise, sampler and base models for every row; rows of arms that aren't trained yet are named and
left out (`python -m training.evaluation.world.arms` trains them; the method itself falls back on the shipped adapter).
Judge B is reported; judge A chooses how strong emphasis and reference attention are, on other users. A row is stored
under --runs as soon as it is painted, so the same command goes on where it was stopped. Writes world.json and world.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prefgen.atelier import models
from prefgen.atelier.editions import SECOND
from prefgen.atelier.world.scores import unread
from prefgen.files import write_atomic

from ...common.arguments import natural, positive
from ...common.errors import exit_with_message
from ..store import Store
from . import requests as asked
from .arms import ARMS, trained
from .figures import Table
from .measures import Bootstrap, Scored, score
from .page import page
from .painted import PaintedRows, checksums
from .readings import scene_seen
from .rows import METHOD, ROWS, TUNED, Row

# Ends of the scale, which every table needs.
ENDS = ("none", "cloner", "render_oracle")
# History lengths beside the first, and the rows that have lines there.
SHORT = (1, 2)
SHORT_ROWS = (*ENDS, "words_negative", "prefgen", "no_image", "paired")


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    with exit_with_message():
        if models.edition() is not SECOND:
            raise SystemExit("The embedded models are of the first edition: run `sh training/runs/world.sh` first.")
        result = evaluate(args)
    write_atomic(args.out / "world.json", json.dumps(result, indent=1).encode() + b"\n")
    write_atomic(args.out / "world.md", page(result).encode())
    print(page(result))


def evaluate(args: argparse.Namespace) -> dict:
    """Everything the page says."""
    arms = trained_arms(args.arms)
    rows = rows_of(args.rows, arms)
    people = asked.reported_users(args.users)
    prompts = asked.heldout_prompts(args.prompts)
    requests = asked.requests_of(len(people), len(prompts), args.each)
    setting = {
        "users": [person.id for person in people],
        "prompts": [prompt.text for prompt in prompts],
        "each": args.each,
        "weights": {
            name: digest for name, digest in checksums(models.WEIGHTS).items() if name != "adapter.safetensors"
        },
    }
    folder = args.runs / hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]
    chosen = tuned(args, rows, arms, folder / "choosing")
    rows |= {name: row for name, row in chosen.items() if name in rows}
    partners = [asked.partners_of(people, user) for user in range(len(people))] if "mismatched" in rows else []
    tables = {}
    errors: dict[str, float] = {}
    for size, own in by_size(args, rows).items():
        painted = PaintedRows(Store(folder / f"size-{size}"), people, prompts, requests, arms, size)
        tables[size] = table_of(painted, own).figures(size)
        # The same for every size: of the judge and fresh renders alone.
        errors = painted.errors()
    return {
        "command": f"python -m training.evaluation.world {shlex.join(sys.argv[1:])}".rstrip(),
        **setting,
        "pictures": args.pictures,
        "tuned": {name: {key: getattr(row, key) for key in TUNED[name]} for name, row in chosen.items()},
        "left_out": [name for name in args.rows if name not in rows],
        "seeds": {name: len(folders) for name, folders in arms.items() if folders},
        "partners_overlap": round(asked.expected_overlap(people, partners), 4) if partners else None,
        "judge_errors": errors,
        "unread": unread(errors),
        "tables": tables,
        "versions": {module.__name__: module.__version__ for module in (torch, np)},
    }


def trained_arms(folder: Path) -> dict[str, list[Path]]:
    """{arm: the weights folder of every finished seed}; the shipped weights are the method's where it has none."""
    arms = {name: trained(folder, name) for name in ARMS}
    arms[METHOD] = arms[METHOD] or [models.WEIGHTS]
    return arms


def rows_of(names: Sequence[str], arms: Mapping[str, Sequence[Path]]) -> dict[str, Row]:
    """The rows of these whose weights are there, behind the ends of the scale."""
    present = [name for name in names if not ROWS[name].arm or arms[ROWS[name].arm]]
    return {name: ROWS[name] for name in dict.fromkeys([*ENDS, *present])}


def by_size(args: argparse.Namespace, rows: Mapping[str, Row]) -> dict[int, dict[str, Row]]:
    """{pictures of a verdict in a history: the rows that are painted with it}."""
    sizes = {args.pictures: dict(rows)}
    for size in SHORT if args.short else ():
        sizes.setdefault(size, {name: row for name, row in rows.items() if name in SHORT_ROWS})
    return sizes


def table_of(painted: PaintedRows, rows: Mapping[str, Row]) -> Table:
    """The rows of one setting, painted, read and scored."""
    errors = painted.errors()
    versions = sum(row.partners * (len(painted.arms[row.arm]) if row.arm else 1) for row in rows.values())
    seen: dict[str, list[list[dict]]] = {}
    with tqdm(total=versions * len(painted.requests), unit="picture", mininterval=5) as bar:
        for name, row in rows.items():
            bar.set_postfix_str(name, refresh=False)
            seen[name] = painted.row(name, row, bar)
    scored = {name: scored_of(painted, own, errors) for name, own in seen.items()}
    return Table(painted.people, painted.prompts, painted.requests, seen, scored)


def scored_of(painted: PaintedRows, versions: Sequence[list[dict]], errors: Mapping[str, float]) -> list[Scored]:
    """Every version of a row, scored by what the reporting judge saw."""
    return [
        score(
            [scene_seen(reading) for reading in readings],
            painted.requests,
            painted.people,
            painted.prompts,
            painted.histories,
            errors,
        )
        for readings in versions
    ]


def tuned(
    args: argparse.Namespace, rows: Mapping[str, Row], arms: Mapping[str, Sequence[Path]], folder: Path
) -> dict[str, Row]:
    """The rows of TUNED at the strength that is best on the choosing users, by judge A's reading."""
    wanted = {name: options for name, options in TUNED.items() if name in rows}
    if not wanted or not args.choosing:
        return {}
    people = asked.choosing_users(args.choosing)
    prompts = asked.heldout_prompts(args.prompts)
    requests = asked.requests_of(len(people), len(prompts), args.each)
    # One seed of an arm is enough to choose with.
    painted = PaintedRows(
        Store(folder), people, prompts, requests, {name: own[:1] for name, own in arms.items()}, args.pictures, "a"
    )
    tried = {name: ROWS[name] for name in ("none", "cloner")}
    for name, options in wanted.items():
        for key, values in options.items():
            tried |= {f"{name}_{value:g}": replace(ROWS[name], **{key: value}) for value in values}
    table = table_of(painted, tried)
    draws = Bootstrap(requests, table.scored["none"][0], table.scored["cloner"][0], draws=1)
    best = {}
    for name in wanted:
        options = [each for each in tried if each.startswith(f"{name}_")]
        best[name] = tried[max(options, key=lambda each: draws.harmonic(table.scored[each])[0])]
    return best


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.world",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--arms", type=Path, default=Path("runs/arms"), help="what training.evaluation.world.arms left")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/world_evaluation"), help="where painted rows are stored"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--users", type=positive, default=144, help="reported test users, from 50,000 on")
    parser.add_argument("--choosing", type=natural, default=24, help="other test users, for what is tuned; 0 for none")
    parser.add_argument("--prompts", type=positive, default=asked.PROMPTS, help="held-out prompts")
    parser.add_argument("--each", type=positive, default=asked.EACH, help="prompts a user, by turns")
    parser.add_argument("--pictures", type=positive, default=8, help="liked, and as many disliked ones, in a history")
    parser.add_argument("--short", action="store_true", help="also histories of 1 and 2, for the rows with lines there")
    parser.add_argument("--threads", type=natural, default=0, help="CPU threads, 0 for all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
