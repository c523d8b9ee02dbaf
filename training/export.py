"""The one file that artists load, from the last checkpoint of `train_user_attention`.

    python -m training.export --config sdxl_24gb --out taste.safetensors

A checkpoint resumes a run; this file is for use: the branch's averaged weights, the aligner and normalisers, and a
header that says what they were made for. `--unfinished` takes a run that has steps left. Weights are stored as fp16, as
public adapters have them; the normalisers stay fp32.
"""

from __future__ import annotations

import copy
import json
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from prefgen.adapter import FORMAT_VERSION, AdapterHeader, UserAdapter, save_adapter
from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.files import read_text
from prefgen.fusion import UserProjection

from .common.bases import DTYPES
from .common.checkpoints import last_state
from .common.config.command import arguments
from .common.folder import RunFolder
from .data.worlds import Histories
from .extract import Extracted

STAGE = "train_user_attention"
TOLD = ("steps", "batch", "lr", "distil", "parts", "seed")  # of the stage's section, in every file's header


def chosen_layers(runs: Path, count: int) -> dict:
    """{"sem_layers": [...], "core_layer": n} as `probe_layers` wrote them, for an MLLM of `count` layers."""
    path = runs / "probe_layers" / "layers.json"
    if not path.exists():
        raise SystemExit(f"There is no {path}: run `python -m training.probe_layers` first.")
    layers = json.loads(read_text(path))
    if not all(layer in range(count) for layer in (*layers["sem_layers"], layers["core_layer"])):
        raise SystemExit(
            f"{path} names layers that an MLLM of {count} layers hasn't: run `training.probe_layers` again."
        )
    return {key: layers[key] for key in ("sem_layers", "core_layer")}


def check_world(extracted: Extracted, histories: Histories) -> None:
    """SystemExit if the extracted users live in another world than the configuration's."""
    world = extracted.index["world"]
    if world != histories.name:
        raise SystemExit(
            f"The extracted users are those of {world}, data.path says {histories.name}: use another --runs folder, or "
            "run `python -m training.extract` again."
        )


def first_heldout(users: int) -> int:
    """Of the extracted users in order, the number of the first that only measures: the last twentieth, two at least."""
    return max(0, min(users * 95 // 100, users - 2))


def new_adapter(args: SimpleNamespace, cross_attention_dim: int, block_widths: list[int]) -> UserAdapter:
    """An adapter around the trained aligner and normalisers of `args.runs`; its branch and projection are random.

    args: what `arguments` gives for the stage. block_widths: of every cross-attention, in file order.
    """
    extracted, state = Extracted(args.runs), last_state(args.runs / "train_alignment")
    layers = chosen_layers(args.runs, extracted.hidden.shape[1])
    (sem_layers, width), image_width = state["norm"]["mean"].shape, extracted.images.shape[1]
    hidden, text_width = state["model"]["mlp.0.weight"].shape[0], state["model"]["mlp.2.weight"].shape[0]
    aligner = SemanticAligner(sem_layers, width, text_width, hidden)
    aligner.load_state_dict(state["model"])
    sem_norm, core_norm = LayerStandardiser(sem_layers, width), LayerStandardiser(1, width)
    sem_norm.load_state_dict(state["norm"])
    core_norm.fit(torch.as_tensor(np.asarray(extracted.hidden[:, [layers["core_layer"]]])))
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind="prefgen",
        base_family=args.config.base.family,
        semantic_width=text_width,
        core_width=width,
        image_width=image_width,
        cross_attention_dim=cross_attention_dim,
        tokens=args.tokens,
        block_widths=block_widths,
        mllm=extracted.index["mllm"] | layers,
        clip_vision=extracted.index["clip_vision"],
        training={key: args.fingerprint[key] for key in TOLD} | provenance(args.config),
    )
    projection = UserProjection(text_width + width + image_width, cross_attention_dim, args.tokens)
    return UserAdapter(header, projection, aligner, sem_norm, core_norm)


def provenance(config) -> dict:
    """What a real base's file says of its training besides the stage's own numbers."""
    base, stage = config.base, config.train_user_attention
    if base.family == "atelier":
        return {}
    told = {"base": base.path.name, "pixels": base.pixels, "min_snr": stage.min_snr, "data": config.data.path.name}
    return told | ({"ip_adapter": base.ip_adapter.name} if base.ip_adapter else {})


def trained_parts(adapter: UserAdapter) -> torch.nn.ModuleDict:
    """What `train_user_attention` trains of an adapter; the rest was trained before."""
    names = ("projection", "to_k_ip", "to_v_ip")
    return torch.nn.ModuleDict({name: getattr(adapter, name) for name in names})


def trained_adapter(args: SimpleNamespace, unfinished: bool = False) -> UserAdapter:
    """The adapter of a run's last checkpoint, with its averaged weights. SystemExit for a run with steps left."""
    folder = args.runs / STAGE
    state = last_state(folder)
    if state["step"] < args.steps and not unfinished:
        raise SystemExit(
            f"{folder} is at step {state['step']} of {args.steps}: finish it with the same command, or export it as it "
            "is with --unfinished."
        )
    shapes = {k: v.shape for k, v in state["ema"].items() if k.startswith("to_k_ip.")}  # in file order
    adapter = new_adapter(args, next(iter(shapes.values()))[1], [shape[0] for shape in shapes.values()])
    trained_parts(adapter).load_state_dict(state["ema"])
    adapter.header.training["step"] = state["step"]
    return adapter.eval().requires_grad_(False)


def stored(adapter: UserAdapter, dtype: str) -> UserAdapter:
    """A copy of the adapter with its weights as they are stored. The normalisers' means may be larger than fp16 holds,
    so they stay fp32. SystemExit where a weight isn't finite, before the cast or after it."""
    broken = [name for name, value in adapter.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise SystemExit(f"{broken[0]} of the checkpoint is not finite: export an earlier checkpoint, or train anew.")
    adapter = copy.deepcopy(adapter)
    for part in (adapter.projection, adapter.aligner, adapter.to_k_ip, adapter.to_v_ip):
        part.to(DTYPES[dtype])
    broken = [name for name, value in adapter.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise SystemExit(f"{broken[0]} has weights too large for {dtype}: export with --dtype fp32.")
    return adapter


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="of the stored weights")
    parser.add_argument("--unfinished", action="store_true", help="export a run that has steps left")


def main() -> None:
    args = arguments(STAGE, __doc__, "export", options)
    if args.options.out.suffix != ".safetensors":
        raise SystemExit(f"--out {args.options.out}: the file's name has to end in .safetensors.")
    adapter = trained_adapter(args, args.options.unfinished)
    RunFolder(args)  # refuses a configuration that isn't the run's
    save_adapter(stored(adapter, args.options.dtype), args.options.out)
    megabytes = args.options.out.stat().st_size / 1e6
    print(f"{args.options.out}: {megabytes:.1f} MB, step {adapter.header.training['step']} of {args.steps}")


if __name__ == "__main__":
    main()
