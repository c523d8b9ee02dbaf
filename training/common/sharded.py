"""Weights that are sharded over the processes (FSDP 2), and their checkpoints: full tensors in the file, sharded again
when read.

So a checkpoint fits any number of processes. Modules that every process has in full pass through as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor


def fsdp_requested() -> bool:
    """Whether accelerate's configuration says FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, world_size: int) -> tuple[int, int]:
    """Shard the blocks' weights, trained and frozen, over `world_size` processes: each has its share on `device`, and
    all of a block only while that computes. root: the module whose forward runs the blocks; its other weights stay.

    torch's `fully_shard` rather than accelerate's `prepare`: that wants the module whose forward is the whole step, and
    shards on GPUs alone. Returns how many of the blocks' weights are here, and of how many.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    # Blocks first, then the root: FSDP 2 gives a module the parameters that no module inside of it has taken.
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    # The root has no parameters of its own then; it lets a block be fetched while the one before computes.
    fully_shard(root, mesh=mesh, ignored_params={p for p in root.parameters() if p not in in_blocks})
    shards = [parameter for block in blocks for parameter in block.parameters()]
    return sum(p.to_local().numel() for p in shards), sum(p.numel() for p in shards)


def gather(state, wanted: bool = True):
    """A nested state with every sharded tensor gathered, on the CPU. All processes have to call it; wanted: whether
    this one needs what was sharded, or only helps the others."""
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if wanted else None
    if isinstance(state, dict):
        return {key: gather(value, wanted) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather(value, wanted) for value in state)
    return state


def shard_state(part, state: dict) -> dict:
    """The full `state` as `part`, a module, optimiser or Ema, has it in this process."""
    if hasattr(part, "param_groups"):
        # An optimiser's state goes by the numbers of its parameters, whose moments are sharded as they are.
        parameters = [p for group in part.param_groups for p in group["params"]]
        moments = {
            i: {name: shard_like(value, parameters[i]) for name, value in entry.items()}
            for i, entry in state["state"].items()
        }
        return state | {"state": moments}
    own = part.state_dict()
    return {key: shard_like(value, own.get(key)) for key, value in state.items()}


def shard_like(tensor, reference):
    """A full tensor sharded as `reference` is; unchanged where that is a plain tensor or of another shape."""
    if isinstance(reference, DTensor) and isinstance(tensor, torch.Tensor) and tensor.shape == reference.shape:
        tensor = tensor.to(reference.device, reference.dtype)
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor
