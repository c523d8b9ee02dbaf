"""What each part of the method brings, on test users and held-out prompts: methods, controls, ablations side by side.

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
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prefgen.atelier import models, users
from prefgen.files import file_sha256, read_text, visible_files, write_atomic

from ...data.atelier_users import users_of
from .. import metrics
from . import page, painter
from .painter import Asked, Painter, paint_row
from .rows import METHODS, ROWS

SEED_USERS, SEEDS = 12, 6  # users, and pictures of one prompt each, for the diversity across seeds


class Kept:
    """What was painted and read, in a folder that belongs to one setting: made once, then read again.

    ablations: {row: weights folder} of the rows that have weights of their own.
    """

    def __init__(self, folder: Path, people: list[users.User], ablations: dict[str, Path]):
        self.folder, self.people, self.ablations = folder, people, ablations

    @cached_property
    def painter(self) -> Painter:
        return Painter()

    def get(self, name: str, make) -> dict | list:
        """The JSON of this name, from `make()` if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_atomic(path, json.dumps(make()).encode())
        return json.loads(read_text(path))

    def file(self, name: str) -> str:
        """What a row is kept as: other weights are another name."""
        if name not in self.ablations:
            return name
        return f"{name}-{hashlib.sha256(json.dumps(checksums(self.ablations[name])).encode()).hexdigest()[:12]}"

    def row(self, name: str, asked: Asked, bar: tqdm, tag: str = "") -> dict:
        """{"readings", "cpu_seconds"} of a row; its pictures are saved beside it."""
        bar.set_postfix_str(name, refresh=False)
        before = bar.n

        def make() -> dict:
            artist = self.painter.of(self.ablations[name]) if name in self.ablations else self.painter
            start, pictures = time.process_time(), []
            for batch in paint_row(artist, ROWS[name], self.people, asked):
                pictures.append(((batch * 0.5 + 0.5) * 255).round().byte())
                bar.update(len(batch))
            spent = time.process_time() - start
            page.save_pictures(torch.cat(pictures), self.folder / f"{self.file(name)}{tag}.png")
            readings = [r for batch in pictures for r in metrics.read(artist, batch.float() / 127.5 - 1)]
            return {"readings": readings, "cpu_seconds": round(spent, 2)}

        found = self.get(f"{self.file(name)}{tag}", make)
        bar.update(before + len(asked) - bar.n)
        return found


def measure(kept: Kept, names: list[str], asked: Asked) -> dict:
    """Everything the page says."""
    people = kept.people
    seeds = [picture for picture in asked[:: len(asked) // len(people)][:SEED_USERS] for _ in range(SEEDS)]
    compared = [name for name in METHODS if name in names]
    with tqdm(total=len(names) * len(asked) + len(compared) * len(seeds), unit="picture") as bar:
        made = {name: kept.row(name, asked, bar) for name in names}
        several = {name: kept.row(name, seeds, bar, "+seeds")["readings"] for name in compared}
    readings = {name: row["readings"] for name, row in made.items()}
    liked = kept.get(
        "liked",
        lambda: [
            metrics.liked_pictures(kept.painter, person, [(s, p) for u, s, p in asked if u == user])
            for user, person in enumerate(people)
        ],
    )
    prompts = np.array(kept.get("prompts", lambda: metrics.prompt_embeds(kept.painter, asked).tolist()))
    aligned = {name: metrics.alignment(found, people, asked) for name, found in readings.items()}
    targets = [np.array([r["judge"] for r in of_user]) for of_user in liked]
    rows = {}
    for name, found in readings.items():
        right = np.array([r["subject"] == subject for r, (_, subject, _) in zip(found, asked, strict=True)], float)
        clip = np.array([r["clip"] for r in found])
        means = np.array([np.mean([r["clip"] for r in readings_of], 0) for readings_of in liked])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        rows[name] = {
            "label": ROWS[name].label,
            "alignment": metrics.interval(aligned[name]),
            "minus_prefgen": metrics.interval(aligned[name] - aligned["prefgen"]),
            "gain_share": metrics.gain_share(aligned[name], aligned["none"], aligned["oracle"]),
            "subject": metrics.interval(metrics.by_user(right, asked)),
            "cmmd": metrics.interval(metrics.to_liked(metrics.cmmd, "clip", found, liked, asked)),
            "kid": metrics.interval(metrics.to_liked(metrics.kid, "judge", found, liked, asked)),
            "clip_t": metrics.interval(metrics.by_user(100 * (clip * prompts).sum(1), asked)),
            "clip_i": metrics.interval(metrics.by_user(100 * (clip * means[[u for u, _, _ in asked]]).sum(1), asked)),
            "cpu_seconds_a_picture": round(made[name]["cpu_seconds"] / len(asked), 3),
        }
        if "described_both" in aligned:
            rows[name]["minus_words"] = metrics.interval(aligned[name] - aligned["described_both"])
        if name in several:
            fid = metrics.frechet(metrics.features_of("judge", found, asked), targets)
            rows[name]["fid"] = {"mean": round(fid, 4), "ci95": None}
            rows[name]["diversity"] = metrics.interval(metrics.diversity(several[name], SEEDS))
    return {"rows": rows, "groups": groups(readings, aligned, people, asked)}


def groups(readings: dict, aligned: dict, people: list[users.User], asked: Asked) -> dict:
    """Alignment of the methods over some of the users, and over some of the families."""
    methods = [name for name in METHODS if name in readings]
    two = np.array([len(p.tastes) > 1 for p in people])
    families = {f for f, _ in people[0].disliked}.union(*({f for f, _ in t.liked} for p in people for t in p.tastes))
    split = {
        label: {name: metrics.interval(aligned[name][mask]) for name in methods}
        for label, mask in {"users with one taste": ~two, "users with two tastes": two}.items()
        if mask.any()
    }
    for label, kept in (("palette alone", {"palette"}), ("all families but the palette", families - {"palette"})):
        narrowed = [metrics.only(person, kept) for person in people]
        if any(narrowed):
            split[label] = {
                name: metrics.interval(metrics.alignment(readings[name], narrowed, asked)) for name in methods
            }
    return split


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file, by its name in the folder."""
    files = visible_files(folder, "**/*.safetensors")
    return {str(f.relative_to(folder)): file_sha256(f) for f in files}


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


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    people = users_of("test", args.skip + args.users)[args.skip :]
    asked = painter.requests(people, args.prompts)
    weights, ablations, names = {"shipped": checksums(models.WEIGHTS)}, {}, []
    for name, row in ROWS.items():
        folder = args.ablations / row.ablation / "weights"
        if args.rows and name not in (*args.rows, "none", "prefgen", "oracle"):
            continue
        if row.ablation and not (folder / "adapter.safetensors").exists():
            command = f"python -m training.evaluation.ablations {row.ablation}"
            print(f"{row.label}: {folder} has no adapter, left out ({command})")
            continue
        if row.ablation:
            ablations[name], weights[row.ablation] = folder, checksums(folder)
        names.append(name)
    setting = {
        "users": len(people),
        "skipped": args.skip,
        "user_ids": [p.id for p in people],
        "prompts": args.prompts,
        "pictures": len(asked),
        "guidance": painter.GUIDANCE,
        "steps": painter.STEPS,
        "history_seed": painter.HISTORY_SEED,
        "noise_seeds": "10000 * batch start + place in the batch",
        "liked_drawn": metrics.LIKED_DRAWN,
        "seed_users": min(SEED_USERS, len(people)),
        "seeds_each": SEEDS,
    }
    key = hashlib.sha256(json.dumps([setting, weights["shipped"]]).encode()).hexdigest()[:16]
    kept = Kept(args.runs / key, people, ablations)
    result = {
        "command": "python -m training.evaluation.evaluate" + (f" {shlex.join(sys.argv[1:])}" if sys.argv[1:] else ""),
        **setting,
        "versions": {m.__name__: m.__version__ for m in (torch, np)},
        "weights": weights,
        **measure(kept, names, asked),
    }
    page.write(result, {name: kept.folder / f"{kept.file(name)}.png" for name in names}, people, args.out)
    for entry in result["rows"].values():
        low, high = entry["alignment"]["ci95"]
        print(f"{entry['label']:<46} {entry['alignment']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
