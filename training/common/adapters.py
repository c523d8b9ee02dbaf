"""The adapter around its trained parts: new for `train_user_attention`, and again from a checkpoint for the export."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from prefgen.adapter import FLUX, FORMAT_VERSION, AdapterHeader, UserAdapter, new_projection
from prefgen.adapter_checks import check_compatible
from prefgen.adapter_file import load_adapter
from prefgen.aligner import LayerStandardiser, SemanticAligner
from prefgen.errors import AdapterError

from .base import Base, BaseError
from .checkpoints import last_state
from .config.command import StageArgs
from .config.schema import PARTS, TrainUserAttention
from .stage_outputs import ExtractedUsers, chosen_layers
from .user_branch import own_projections

BRANCH_STAGE = TrainUserAttention.stage
# Of that stage's section, in every file's header.
HEADER_KEYS = ("steps", "batch", "lr", "distil", "parts", "seed")


def new_adapter(args: StageArgs[TrainUserAttention], base: Base) -> UserAdapter:
    """An adapter for the base, whose K and V are the UNet's own or those of base.ip_adapter.

    args: what `arguments` gives for `train_user_attention`. BaseError for an IP-Adapter that doesn't fit.
    """
    projections = own_projections(base.unet)
    widths = [len(to_k) for to_k, _ in projections]
    text_width = projections[0][0].shape[1]
    biases: list[torch.Tensor] = []
    if args.config.base.ip_adapter is not None:
        projections, biases = _ip_adapter_projections(args.config.base.ip_adapter, base, widths, text_width)
    adapter = _around_aligner(args, text_width, widths)
    for (k, v), to_k, to_v in zip(projections, adapter.to_k_ip, adapter.to_v_ip, strict=True):
        to_k.weight.data.copy_(k)
        to_v.weight.data.copy_(v)
    if base.family == FLUX:
        for layer, bias in zip([*adapter.to_k_ip, *adapter.to_v_ip], biases or [0.0] * 2 * len(widths), strict=True):
            layer.bias.data.copy_(torch.as_tensor(bias))
    return adapter


def trained_adapter(args: StageArgs[TrainUserAttention], unfinished: bool = False) -> UserAdapter:
    """The adapter of a run's last checkpoint, with its averaged weights. SystemExit for a run with steps left."""
    section = args.section
    folder = args.runs / BRANCH_STAGE
    state = last_state(folder)
    if state["step"] < section.steps and not unfinished:
        raise SystemExit(
            f"{folder} is at step {state['step']} of {section.steps}: finish it with the same command, or export it as "
            "it is with --unfinished."
        )
    # In file order, as `trained_parts` lists them.
    shapes = [weight.shape for key, weight in state["ema"].items() if re.match(r"to_k_ip\.\d+\.weight", key)]
    adapter = _around_aligner(args, shapes[0][1], [shape[0] for shape in shapes])
    trained_parts(adapter).load_state_dict(state["ema"])
    adapter.header.training["step"] = state["step"]
    return adapter.eval().requires_grad_(False)


def trained_parts(adapter: UserAdapter) -> torch.nn.ModuleDict:
    """What `train_user_attention` trains of an adapter; the rest was trained before."""
    names = ("projection", "to_k_ip", "to_v_ip")
    return torch.nn.ModuleDict({name: getattr(adapter, name) for name in names})


def _around_aligner(
    args: StageArgs[TrainUserAttention], cross_attention_dim: int, block_widths: list[int]
) -> UserAdapter:
    """An adapter of the configured parts around the trained aligner and normalisers of `args.runs`; its branch and
    projection are random.

    block_widths: of every cross-attention, in file order.
    """
    section = args.section
    parts = section.parts
    extracted = ExtractedUsers(args.runs)
    aligner = sem_norm = core_norm = mllm = None
    widths = dict.fromkeys(PARTS, 0)
    if args.config.reads_mllm:
        layers = chosen_layers(args.runs, extracted.hidden.shape[1])
        mllm = extracted.index["mllm"] | layers
        if "semantic" not in parts:
            mllm["sem_layers"] = []
        if "core" not in parts:
            mllm["core_layer"] = None
    if "semantic" in parts:
        aligner, sem_norm = _trained_aligner(args.runs)
        widths["semantic"] = aligner.mlp[-1].out_features
    if "core" in parts:
        widths["core"] = extracted.hidden.shape[2]
        core_norm = LayerStandardiser(1, widths["core"])
        core_norm.fit(torch.as_tensor(np.asarray(extracted.hidden[:, [layers["core_layer"]]])))
    if "image" in parts:
        widths["image"] = extracted.images.shape[1]
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind="prefgen",
        base_family=args.config.base.family,
        semantic_width=widths["semantic"],
        core_width=widths["core"],
        image_width=widths["image"],
        cross_attention_dim=cross_attention_dim,
        tokens=section.tokens,
        block_widths=block_widths,
        mllm=mllm,
        clip_vision=extracted.index["clip_vision"] if "image" in parts else {},
        training={key: args.fingerprint[key] for key in HEADER_KEYS} | _provenance(args.config),
    )
    return UserAdapter(header, new_projection(header), aligner, sem_norm, core_norm)


def _trained_aligner(runs: Path) -> tuple[SemanticAligner, LayerStandardiser]:
    """The aligner and its standardiser of the last checkpoint of `train_alignment`."""
    state = last_state(runs / "train_alignment")
    layers, width = state["norm"]["mean"].shape
    hidden = state["model"]["mlp.0.weight"].shape[0]
    aligner = SemanticAligner(layers, width, state["model"]["mlp.2.weight"].shape[0], hidden)
    aligner.load_state_dict(state["model"])
    sem_norm = LayerStandardiser(layers, width)
    sem_norm.load_state_dict(state["norm"])
    return aligner, sem_norm


def _ip_adapter_projections(
    path, base: Base, widths: list[int], text_width: int
) -> tuple[list[tuple], list[torch.Tensor]]:
    """(K, V) weights of every block of a public IP-Adapter file; of one for Flux the biases of all K, then of all V."""
    try:
        start = load_adapter(path)
        check_compatible(start.header, widths, text_width, base.family)
    except AdapterError as error:
        raise BaseError(f"base.ip_adapter: {error}") from error
    # A public file's weights are bare tensors, an export's are layers.
    pairs = zip(start.to_k_ip, start.to_v_ip, strict=True)
    biases = [*getattr(start, "k_bias", ()), *getattr(start, "v_bias", ())]
    return [tuple(getattr(side, "weight", side) for side in pair) for pair in pairs], biases


def _provenance(config) -> dict:
    """What a real base's file says of its training besides the stage's own numbers."""
    base = config.base
    if base.family == "atelier":
        return {}
    origin = {
        "base": base.path.name,
        "pixels": base.pixels,
        "min_snr": config.train_user_attention.min_snr,
        "data": config.data.path.name,
    }
    return origin | ({"ip_adapter": base.ip_adapter.name} if base.ip_adapter else {})
