"""Weights that are spread over the processes (FSDP 2), and their checkpoints: whole in the file, shared out again.

So a checkpoint fits any number of processes. Modules that every process holds whole pass through as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor


def asked_for() -> bool:
    """Whether accelerate's configuration says FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def cut(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, world: int) -> tuple[int, int]:
    """Spread the blocks' weights, trained and frozen, over `world` processes: each holds its share on `device`, and has
    a block whole only while that computes. root: the module whose forward runs the blocks; its other weights stay.

    torch's `fully_shard` rather than accelerate's `prepare`: that wants the module whose forward is the whole step, and
    cuts on GPUs alone. Returns how many of the blocks' weights are here, and of how many.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    inside = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=again)
    # It holds nothing itself: it lets a block be fetched while the one before computes.
    fully_shard(root, mesh=mesh, ignored_params={p for p in root.parameters() if p not in inside})
    spread_over = [p for block in blocks for p in block.parameters()]
    return sum(p.to_local().numel() for p in spread_over), sum(p.numel() for p in spread_over)


def whole(state, keep: bool = True):
    """A nested state with every spread tensor gathered. All processes have to call it; keep: whether this one wants
    what was spread, or only helps the others."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def spread_like(tensor, reference):
    """A whole tensor as `reference` is spread; unchanged where that is whole or of another shape."""
    if isinstance(reference, DTensor) and isinstance(tensor, torch.Tensor) and tensor.shape == reference.shape:
        tensor = tensor.to(reference.device, reference.dtype)
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor


def spread(part, state: dict) -> dict:
    """The whole `state` as `part`, a module, optimiser or Ema, holds it here."""
    if hasattr(part, "param_groups"):
        parameters = [p for group in part.param_groups for p in group["params"]]
        moments = {
            i: {name: spread_like(value, parameters[i]) for name, value in entry.items()}
            for i, entry in state["state"].items()
        }
        return state | {"state": moments}
    own = part.state_dict()
    return {key: spread_like(value, own.get(key)) for key, value in state.items()}
