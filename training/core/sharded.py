"""Checkpoints of modules whose weights are spread over the processes (FSDP 2): whole in the file, shared out again.

So a checkpoint fits any number of processes. Modules that every process holds whole pass through as they are.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


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
