"""The whole pipeline on one page: from nothing to the weights under prefgen/atelier/weights.

    python -m training.atelier --runs runs/atelier

Runs every stage in the paper's order, each as its own command. A finished stage is skipped and a stopped one goes on
where it was, so the same command always continues.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

STAGES = (
    "atelier.tokenizers",  # vocabularies of CLIP and the MLLM
    "atelier.pool",  # 40,000 pictures with labels
    "atelier.vae",  # pictures <-> latents
    "atelier.clip",  # captions <-> pictures
    "atelier.judge",  # reads attributes; trained on renders alone
    "atelier.unet",  # captions -> latents
    "atelier.mllm_vision",  # the MLLM's eyes
    "train_mllm",  # the MLLM learns to read histories
    "extract",  # hidden states of many users
    "probe_layers",  # which layers give e_sem and e_core
    "train_alignment",  # e_sem -> CLIP text space, by MMD
    "train_user_attention",  # the user branch; writes the adapter
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.atelier", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/atelier"), help="folder that holds every stage's run")
    parser.add_argument(
        "--start-from", type=Path, help="folder with earlier weights that VAE, CLIP, judge, UNet and MLLM start from"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value")
    args = parser.parse_args()
    common = ["--runs", str(args.runs), *(word for change in args.set for word in ("--set", change))]
    if args.start_from:
        common += ["--start-from", str(args.start_from)]
    for stage in STAGES:
        start = time.monotonic()
        options = [] if stage == "atelier.tokenizers" else common
        code = subprocess.run([sys.executable, "-m", f"training.{stage}", *options]).returncode
        if code:
            raise SystemExit(f"{stage} stopped (exit status {code}); the same command goes on from there.")
        print(f"{stage}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
