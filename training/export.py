"""The one file that artists load, from the last checkpoint of `train_user_attention`.

    python -m training.export --config sdxl_24gb --out taste.safetensors

In: the checkpoints of `train_alignment` and `train_user_attention`, and the layers of `probe_layers`. Out: one adapter
file in the layout of an IP-Adapter, which stock diffusers loads.

A checkpoint resumes a run; this file is for use: the branch's averaged weights, the aligner and normalisers, and a
header that says what they were made for. Every stage is first held against what it was made from: the data set, the
MLLM and its LoRA, the layers, the aligner; nothing stale is exported. `--unfinished` takes a run that has steps left.
Weights are stored as fp16, as public adapters have them; the normalisers stay fp32. A model card is written beside the
file; nothing is uploaded unless `--push` asks for it.
"""

from __future__ import annotations

import copy
import sys
from argparse import ArgumentParser
from pathlib import Path

from prefgen.adapter import UserAdapter
from prefgen.adapter_file import save_adapter
from prefgen.dtypes import DTYPES
from prefgen.files import write_atomic

from .common.adapters import trained_adapter
from .common.chain import check_chain
from .common.config.command import arguments
from .common.config.schema import TrainUserAttention
from .common.errors import exit_with_message
from .common.folder import RunFolder
from .common.publish import card, card_path, push
from .data.open_world import open_world


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="of the stored weights")
    parser.add_argument("--push", metavar="REPO", help="upload it with its card and LoRA to the Hugging Face hub")
    parser.add_argument("--unfinished", action="store_true", help="export a run that has steps left")


def main() -> None:
    args = arguments(TrainUserAttention, __doc__, "export", options)
    out = args.options.out
    if out.suffix != ".safetensors":
        raise SystemExit(f"--out {out}: the file's name has to end in .safetensors.")
    world = open_world(args.config, args.runs)
    check_chain(args.config, args.runs, world.digest)
    adapter = trained_adapter(args, args.options.unfinished)
    # Refuses a configuration that isn't the run's.
    RunFolder(args)
    save_adapter(stored(adapter, args.options.dtype), out)
    megabytes = out.stat().st_size / 1e6
    print(f"{out}: {megabytes:.1f} MB, step {adapter.header.training['step']} of {args.section.steps}")
    write_atomic(card_path(out), card(out, adapter.header, args.config, args.runs, sys.argv[1:]).encode())
    if args.options.push:
        lora = args.runs / "train_mllm" / "lora"
        print(push(args.options.push, out, lora if lora.is_dir() else None))


def stored(adapter: UserAdapter, dtype: str) -> UserAdapter:
    """A copy of the adapter with its weights as they are stored. SystemExit where one isn't finite, before the cast
    or after it."""
    if (name := not_finite(adapter)) is not None:
        raise SystemExit(f"{name} of the checkpoint is not finite: export an earlier checkpoint, or train anew.")
    adapter = copy.deepcopy(adapter)
    # The normalisers' means may be larger than fp16 holds, so they stay fp32.
    for part in (adapter.projection, adapter.aligner, adapter.to_k_ip, adapter.to_v_ip):
        if part is not None:
            part.to(DTYPES[dtype])
    if (name := not_finite(adapter)) is not None:
        raise SystemExit(f"{name} has weights too large for {dtype}: export with --dtype fp32.")
    return adapter


def not_finite(adapter: UserAdapter) -> str | None:
    """The first tensor with an infinite value or none at all."""
    return next((name for name, value in adapter.state_dict().items() if not value.isfinite().all()), None)


if __name__ == "__main__":
    with exit_with_message():
        main()
