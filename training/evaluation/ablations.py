"""Adapters with one thing changed, trained like the shipped one on the runs of `make train-atelier`.

    python -m training.evaluation.ablations                  all of them
    python -m training.evaluation.ablations image_only       one

Each is a folder of --out with runs and weights of its own; what it doesn't change is linked. The same command goes on
where it was stopped. `python -m training.evaluation.evaluate` puts what is there beside PrefGen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prefgen.atelier.models import WEIGHTS
from prefgen.files import write_atomic

# What an ablation shares with the shipped weights where it doesn't run it anew.
UPSTREAM = ("atelier.pool", "atelier.mllm_vision", "extract", "probe_layers", "train_alignment")
CACHES = ("latents", "clip_images")
WEIGHT_FILES = ("clip.safetensors", "clip_tokenizer", "judge.safetensors", "unet.safetensors", "vae.safetensors")


@dataclass(frozen=True)
class Ablation:
    """What is run anew, each stage with its changes (`key=value` of its section); the rest is linked.

    layers: in place of the probe's choice, which is the shipped one's where another MLLM isn't probed. blind: no
    stage sees attributes, as with people's own ratings.
    """

    stages: dict[str, tuple[str, ...]]
    layers: dict | None = None
    blind: bool = False


ABLATIONS = {
    "image_only": Ablation({"train_user_attention": ("parts=[image]",)}),
    "pointwise": Ablation({"train_alignment": ("mmd=0", "paired=1"), "train_user_attention": ()}),
    "first_layers": Ablation(
        {"train_alignment": (), "train_user_attention": ()}, layers={"sem_layers": [0, 1, 2, 3], "core_layer": 1}
    ),
    # The image encoder is the trained one, the decoder behind it as it was drawn.
    "untuned": Ablation({"train_mllm": ("steps=0",), "extract": (), "train_alignment": (), "train_user_attention": ()}),
    "blind_image": Ablation(
        {"extract": ("users=2000",), "train_user_attention": ("parts=[image]", "distil=0")}, blind=True
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluation.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=list(ABLATIONS), metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--runs", type=Path, default=Path("runs/atelier"), help="runs of the shipped weights")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, help="of the user attention; those of the shipped adapter by default")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for all")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ABLATIONS]
    if unknown:
        parser.error(f"there is no ablation {unknown[0]!r}: choose from {', '.join(ABLATIONS)}")
    for name in args.names:
        folder = prepare(name, args.runs, args.out)
        every = options_of_all(ABLATIONS[name])
        for stage, changes in ABLATIONS[name].stages.items():
            if stage == "train_user_attention":
                changes = (*changes, f"steps={args.steps or shipped_steps()}")
            own = [f"{stage}.{change}" for change in changes]
            options = [word for change in dict.fromkeys((*every, *own)) for word in ("--set", change)]
            common = ["--runs", str(folder / "runs"), "--threads", str(args.threads)]
            run([sys.executable, "-m", f"training.{stage}", *common, *options], folder / "weights")


def options_of_all(ablation: Ablation) -> list[str]:
    """What every stage of an ablation is told."""
    parts = [word for word in ablation.stages["train_user_attention"] if word.startswith("parts=")]
    every = [f"train_user_attention.{part}" for part in parts]
    return every + ["data.attributes=false"] * ablation.blind


def prepare(name: str, runs: Path, out: Path) -> Path:
    """The ablation's folder, with links to all that it shares with the shipped weights."""
    ablation = ABLATIONS[name]
    folder = out / name
    for kind in ("runs", "weights"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    if "train_mllm" in ablation.stages:
        (folder / "weights/mllm").mkdir(exist_ok=True)
    for link, target in shared_by(ablation, runs).items():
        if not target.exists():
            raise SystemExit(f"{target} is missing: run `sh training/runs/atelier.sh --runs {runs}` first.")
        if not (folder / link).exists():
            (folder / link).symlink_to(target.resolve())
    if has_own_layers(ablation):
        layers = ablation.layers or json.loads((runs / "probe_layers/layers.json").read_text(encoding="utf-8"))
        (folder / "runs/probe_layers").mkdir(exist_ok=True)
        write_atomic(folder / "runs/probe_layers/layers.json", json.dumps(layers).encode())
    return folder


def has_own_layers(ablation: Ablation) -> bool:
    """Whether its layers are written into its folder: the shipped run of the probe is of the shipped MLLM."""
    return ablation.layers is not None or "train_mllm" in ablation.stages


def shared_by(ablation: Ablation, runs: Path) -> dict[str, Path]:
    """{path in the ablation's folder: what stands there in its place}."""
    anew = {*ablation.stages, *(["probe_layers"] if has_own_layers(ablation) else [])}
    caches = [part for name in CACHES if (runs / f"{name}.json").exists() for part in (f"{name}.npy", f"{name}.json")]
    shared = {f"runs/{part}": runs / part for part in (*UPSTREAM, *caches) if part not in anew}
    shared |= {f"weights/{part}": WEIGHTS / part for part in WEIGHT_FILES}
    if "train_mllm" in ablation.stages:
        tokenizer = [file.name for file in (WEIGHTS / "mllm").iterdir() if file.name.startswith("tokenizer")]
        return shared | {f"weights/mllm/{file}": WEIGHTS / "mllm" / file for file in tokenizer}
    return shared | {"weights/mllm": WEIGHTS / "mllm"}


def run(line: list[str], weights: Path) -> None:
    """One stage, which reads and writes this weights folder."""
    code = subprocess.run(line, env=os.environ | {"PREFGEN_ATELIER_WEIGHTS": str(weights.resolve())}).returncode
    if code:
        raise SystemExit(f"{' '.join(line[1:])} stopped (exit status {code}); the same command goes on from there.")


def shipped_steps() -> int:
    """Steps that the shipped adapter was trained for, from its header."""
    from prefgen.adapter_file import load_adapter

    return load_adapter(WEIGHTS / "adapter.safetensors").header.training["steps"]


if __name__ == "__main__":
    main()
