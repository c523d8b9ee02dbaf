"""What is trained anew for the second edition's rows, each arm with one thing changed and several seeds.

    python -m training.evaluation.world.arms                        all of them, in the order of the evidence page
    python -m training.evaluation.world.arms no_core pooled_tokens  some

Base models are shared. An arm's seed is a folder of --out, with runs and weights of its own; what it doesn't change is
linked. A finished stage is skipped, so the same command goes on where it was stopped. --out/arms.json says what is
done, what is missing, and how long each took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from prefgen.atelier.models import WEIGHTS
from prefgen.files import read_text, write_atomic

from .rows import METHOD

SEEDS = 3
# Aligner and branch are trained with these seeds more than the configuration's.
SEED_STEP = 100
# Of the runs folder, what an arm shares where it doesn't run it anew.
SHARED_RUNS = ("atelier.world.captioning", "train_mllm", "extract", "probe_layers", "train_alignment", "latents.npy")
SHARED_RUNS += ("latents.json", "sizes.npy", "image_tokens.npy", "image_tokens.json")
SHARED_WEIGHTS = ("clip.safetensors", "clip_tokenizer", "edition.json", "judge_a.safetensors", "judge_b.safetensors")
SHARED_WEIGHTS += ("unet.safetensors", "trait_tokens.safetensors", "vae.safetensors")


@dataclass(frozen=True)
class Arm:
    """What differs from the method.

    stages: run anew, each with its changes (`key=value` of its section). mllm: "tuned", or "captioning" for the one
    before it was tuned. layers: in place of the probe's choice, "last" for the last one alone. blind: no stage sees
    what is known of a user, as on a set of real people's ratings.
    """

    stages: dict[str, tuple[str, ...]]
    mllm: str = "tuned"
    layers: dict | str | None = None
    blind: bool = False


# The aligner and the branch: what every arm trains.
BOTH: dict[str, tuple[str, ...]] = {"train_alignment": (), "train_user_attention": ()}
POOLED = {"sem_layers": [0, 1], "core_layer": 0}

ARMS = {
    METHOD: Arm(BOTH),
    "no_core": Arm({"train_alignment": (), "train_user_attention": ("parts=[semantic,image]",)}),
    "no_semantic": Arm({"train_user_attention": ("parts=[core,image]",)}),
    "pooled_tokens": Arm({"extract": ("states=tokens",), **BOTH}, layers=POOLED),
    "captioning": Arm({"extract": (), "probe_layers": (), **BOTH}, mllm="captioning"),
    "no_dislikes": Arm(
        {
            "extract": ("disliked=false",),
            "train_alignment": ("dislikes=false",),
            "train_user_attention": ("away=0",),
        }
    ),
    "paired": Arm({"train_alignment": ("mmd=0", "paired=1"), "train_user_attention": ()}),
    "image_only": Arm(
        {
            "extract": ("states=embeddings",),
            "train_alignment": (),
            "train_user_attention": ("parts=[semantic,image]",),
        },
        layers=POOLED,
    ),
    "no_image": Arm({"train_alignment": (), "train_user_attention": ("parts=[semantic,core]",)}),
    "last_layer": Arm(BOTH, layers="last"),
    "words_teacher": Arm({"train_alignment": (), "train_user_attention": ("teacher=words",)}),
    "no_teacher": Arm({"train_alignment": (), "train_user_attention": ("distil=0",)}),
    "blind_image": Arm({"train_user_attention": ("parts=[image]", "distil=0")}, blind=True),
    "blind": Arm(
        {
            "train_mllm": (),
            "extract": (),
            "probe_layers": (),
            "train_user_attention": ("parts=[core,image]", "distil=0"),
        },
        blind=True,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.world.arms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--config", default="world", help="a name in training/configs, or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value of all"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/world"), help="runs of the base models and the method")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of aligner and branch (default {SEEDS})")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for all")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ARMS]
    if unknown:
        parser.error(f"there is no arm {unknown[0]!r}: choose from {', '.join(ARMS)}")
    # In the page's order, and all arms with one seed before any has two: time may end.
    ordered = [name for name in ARMS if name in args.names]
    for seed in range(args.seeds):
        for name in ordered:
            train(name, seed, args)


def train(name: str, seed: int, args: argparse.Namespace) -> None:
    """Every stage of one arm with one seed, and a line of the record."""
    folder = prepare(name, seed, args.runs, args.out)
    started = time.monotonic()
    for stage in ARMS[name].stages:
        words = ["--config", args.config, "--runs", str(folder / "runs"), "--threads", str(args.threads)]
        words += [word for change in [*args.set, *changes_of(name, seed)] for word in ("--set", change)]
        line = [sys.executable, "-m", f"training.{stage}", *words]
        code = run(line, folder / "weights")
        if code:
            raise SystemExit(
                f"{name}, seed {seed}: {stage} stopped (exit status {code}); the same command goes on from there."
            )
    note(args.out, name, seed, time.monotonic() - started)


def changes_of(name: str, seed: int) -> list[str]:
    """All that differs from the configuration, for every stage alike: a stage holds those before it against it."""
    changes = [f"{stage}.{change}" for stage, own in ARMS[name].stages.items() for change in own]
    if ARMS[name].blind:
        changes.append("data.attributes=false")
    # Seed 0 is the configuration's own.
    if seed:
        changes += [f"{stage}.seed={SEED_STEP * seed}" for stage in BOTH if stage in ARMS[name].stages]
    return changes


def prepare(name: str, seed: int, runs: Path, out: Path) -> Path:
    """The folder of an arm's seed, with links to all that it shares. SystemExit where that is missing."""
    arm = ARMS[name]
    folder = folder_of(out, name, seed)
    for kind in ("runs", "weights"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    anew = {*arm.stages, *(["probe_layers"] if arm.layers else [])}
    if arm.mllm == "captioning":
        anew.add("train_mllm")
    for part in SHARED_RUNS:
        if part not in anew:
            link(runs / part, folder / "runs" / part, optional="." in part)
    for part in SHARED_WEIGHTS:
        link(WEIGHTS / part, folder / "weights" / part)
    if "train_mllm" in arm.stages:
        # It writes its own beside the vocabulary.
        (folder / "weights/mllm").mkdir(exist_ok=True)
        for file in (WEIGHTS / "mllm").glob("tokenizer*"):
            link(file, folder / "weights/mllm" / file.name)
    else:
        tuned = arm.mllm == "tuned"
        link(WEIGHTS / "mllm" if tuned else runs / "atelier.world.captioning/mllm", folder / "weights/mllm")
    if arm.layers:
        (folder / "runs/probe_layers").mkdir(exist_ok=True)
        layers = last_layer(runs) if arm.layers == "last" else arm.layers
        write_atomic(folder / "runs/probe_layers/layers.json", json.dumps(layers).encode())
    return folder


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where an arm's seed lies."""
    return out / name / f"seed-{seed}"


def link(target: Path, place: Path, optional: bool = False) -> None:
    """A link to what is shared. SystemExit for what isn't there, unless it is a cache that a stage makes anew."""
    if place.exists() or (optional and not target.exists()):
        return
    if not target.exists():
        raise SystemExit(f"{target} is missing: run `sh training/runs/world.sh` first.")
    place.symlink_to(target.resolve())


def last_layer(runs: Path) -> dict:
    """The last of the MLLM's layers in place of both choices."""
    last = json.loads(read_text(runs / "extract" / "index.json"))["mllm"]["num_layers"] - 1
    return {"sem_layers": [last], "core_layer": last}


def run(line: list[str], weights: Path) -> int:
    """One stage, which reads and writes this weights folder. Returns its exit status."""
    environment = os.environ | {"PREFGEN_ATELIER_WEIGHTS": str(weights.resolve())}
    return subprocess.run(line, env=environment).returncode


def note(out: Path, name: str, seed: int, seconds: float) -> None:
    """Put an arm's seed into the record: what is done, what is missing, how long each took the first time."""
    path = out / "arms.json"
    record = json.loads(read_text(path)) if path.exists() else {"done": {}}
    record["done"].setdefault(name, {}).setdefault(str(seed), round(seconds))
    record["missing"] = [
        f"{arm} seed {number}"
        for arm in ARMS
        for number in range(SEEDS)
        if str(number) not in record["done"].get(arm, {})
    ]
    write_atomic(path, json.dumps(record, indent=1).encode())


def trained(out: Path, name: str) -> list[Path]:
    """The weights folders of an arm's finished seeds."""
    folders = [folder_of(out, name, seed) / "weights" for seed in range(SEEDS)]
    return [folder for folder in folders if (folder / "adapter.safetensors").exists()]


if __name__ == "__main__":
    main()
