"""Stage 13: the one file that artists load, from what the stages left behind.

    python -m training.export --config sdxl_24gb --out prefgen-sdxl.safetensors

Aligner and normalisers from `train_alignment`, the projection and the branch from the last checkpoint of
`train_user_attention` (its moving average), and a header that says which base, MLLM and CLIP vision they belong to. A
run that isn't finished is refused unless --unfinished is given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import nn

from prefgen.adapter import AdapterHeader, UserAdapter, load_adapter, save_adapter
from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.fusion import UserProjection
from prefgen.header import FORMAT_VERSION

from . import core
from .bases import Base, BaseError, load_base
from .config.command import ConfigError, fingerprint, load
from .extract import Extracted
from .user_branch import own_projections

TOLD = ("steps", "batch", "lr", "distil", "parts", "seed")  # of the training, in the header


def trained_parts(adapter: UserAdapter) -> nn.ModuleList:
    """What `train_user_attention` trains."""
    return nn.ModuleList([adapter.projection, adapter.to_k_ip, adapter.to_v_ip])


def new_adapter(args, base: Base, extracted: Extracted) -> UserAdapter:
    """An untrained adapter around the trained aligner and the normalisers. args: runs, config, fingerprint, tokens."""
    state = core.last_state(args.runs / "train_alignment")
    layers = json.loads((args.runs / "probe_layers" / "layers.json").read_text())
    layer_count, width = state["norm"]["mean"].shape
    hidden, text_width = state["model"]["mlp.0.weight"].shape[0], state["model"]["mlp.2.weight"].shape[0]
    aligner = SemanticAligner(layer_count, width, text_width, hidden)
    aligner.load_state_dict(state["model"])
    sem_norm, core_norm = LayerStandardiser(layer_count, width), LayerStandardiser(1, width)
    sem_norm.load_state_dict(state["norm"])
    core_norm.fit(extracted.hidden[:, [layers["core_layer"]]])
    image_width, cross = extracted.images.shape[1], base.cross_attention_dim
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind="prefgen",
        base_family=base.family,
        semantic_width=text_width,
        core_width=width,
        image_width=image_width,
        cross_attention_dim=cross,
        tokens=args.tokens,
        block_widths=[k.shape[0] for k, _ in own_projections(base.unet)],
        mllm=extracted.index["mllm"] | layers,
        clip_vision=extracted.index["clip_vision"],
        training={key: args.fingerprint[key] for key in TOLD},
    )
    projection = UserProjection(text_width + width + image_width, cross, args.tokens)
    return UserAdapter(header, projection, aligner, sem_norm, core_norm)


def write(args, path: Path) -> None:
    """Write the adapter of a run's last checkpoint."""
    adapter = new_adapter(args, load_base(args.config), Extracted(args.runs))
    state = core.last_state(args.runs / "train_user_attention")
    trained_parts(adapter).load_state_dict(state["ema"])
    adapter.eval()
    save_adapter(adapter, path)
    load_adapter(path)  # as the artist's ComfyUI will


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="atelier", help="a name in training/configs, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value")
    parser.add_argument("--runs", type=Path, help="folder that holds every stage's run; runs/NAME by default")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--unfinished", action="store_true", help="from the last checkpoint of a run that goes on")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        parser.error(f"{args.out} should end in .safetensors: weights are never pickles")
    try:
        args.config, name = load(args.config, args.set), args.config
        args.runs = args.runs or Path("runs") / Path(name).stem
        run = args.runs / "train_user_attention"
        if not (run / "config.json").exists():
            raise SystemExit(f"{run} holds no run: train with `python -m training.train_user_attention` first.")
        if not (run / "done").exists() and not args.unfinished:
            raise SystemExit(f"{run} is not finished: let it end, or add --unfinished to export its last checkpoint.")
        args.fingerprint = fingerprint(args.config, "train_user_attention")
        if json.loads((run / "config.json").read_text()) != args.fingerprint:
            raise SystemExit(f"{run} was trained with another configuration: name that one by --config and --set.")
        args.tokens = args.config.train_user_attention.tokens
        write(args, args.out)
    except (BaseError, ConfigError) as error:
        raise SystemExit(str(error)) from error
    adapter = load_adapter(args.out)
    size = sum(p.numel() for p in adapter.parameters()) / 1e6
    print(f"{args.out}: for {adapter.header.base_family}, {size:.1f} M parameters, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
