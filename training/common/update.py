"""One optimiser step: backward in micro-batches, averaged over the processes, checked, clipped, taken.

Nothing changes a weight before the loss and every gradient were seen to be finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.distributed.tensor import DTensor

from . import sharded


class StepError(Exception):
    """Why a step isn't taken, as the end of a sentence."""


class Updater:
    """The trained modules and optimisers of a run, and the current step's loss and gradient norms.

    accumulate: micro-batches in a step. may_be_unused: parts that may have no gradient at the first step.
    """

    def __init__(self, accelerator: Accelerator, accumulate: int, may_be_unused: Sequence[str]):
        self.accelerator = accelerator
        self.accumulate = accumulate
        self.may_be_unused = may_be_unused
        self.world_size = accelerator.num_processes
        self.uses_fsdp = self.world_size > 1 and sharded.fsdp_requested()
        self.uses_micro_batches = False
        self.modules: dict[str, nn.Module] = {}
        # DDP averages the gradients of wrapped modules; those of replicated parameters are averaged here.
        self.wrapped: list[nn.Module] = []
        self.replicated: set[nn.Parameter] = set()
        self.loss: torch.Tensor | float = 0.0
        self.last_loss = math.nan
        self.norms: dict[str, torch.Tensor] = {}

    def prepare(self, module: nn.Module, optimiser: torch.optim.Optimizer):
        """(module, optimiser) for these processes: as they are in one, wrapped by accelerate in several.

        A ModuleList or ModuleDict has no forward that could be wrapped: it stays, and `step` averages its gradients;
        so it does with what FSDP has not sharded.
        """
        device = self.accelerator.device
        if self.world_size == 1 and self.accelerator.scaler is None:
            return module.to(device), optimiser
        has_no_forward = type(module).forward is nn.Module.forward
        if self.uses_fsdp or (self.world_size > 1 and has_no_forward):
            self.replicated.update(p for p in module.to(device).parameters() if not isinstance(p, DTensor))
            return module, optimiser if self.uses_fsdp else self.accelerator.prepare(optimiser)
        module, optimiser = self.accelerator.prepare(module, optimiser)
        self.wrapped.append(module)
        return module, optimiser

    def micro_batches(self, indices: Sequence) -> Iterator:
        """`indices` in `accumulate` equal micro-batches; the processes average their gradients after the last alone."""
        self.uses_micro_batches = True
        if len(indices) % self.accumulate:
            raise StepError(f"a share of {len(indices)} samples can't be cut into {self.accumulate} equal pieces")
        size = len(indices) // self.accumulate
        for number in range(self.accumulate):
            with ExitStack() as stack:
                for module in self.wrapped if number < self.accumulate - 1 else ():
                    stack.enter_context(self.accelerator.no_sync(module))
                yield indices[number * size : (number + 1) * size]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's loss, so that the sum is the mean over all of them."""
        parts = self.accumulate if self.uses_micro_batches else 1
        self.accelerator.backward(loss / parts if parts > 1 else loss)
        self.loss = self.loss + loss.detach().float() / parts

    def step(self, optimiser: torch.optim.Optimizer, lr: float, clip: float, first: bool) -> float:
        """Take one step; returns the gradient norm before clipping. Raises StepError, with the weights as they were."""
        if self.accumulate > 1 and not self.uses_micro_batches:
            raise StepError("this stage doesn't cut its batch into pieces: accumulate has to be 1")
        if self.world_size > 1 and not (self.wrapped or self.replicated or self.uses_fsdp):
            raise StepError("this stage trains in one process: start it without a launcher")
        groups = self.groups(optimiser)
        parameters = [parameter for group in groups.values() for parameter in group]
        # In this order: norms are those of true gradients, of all processes' mean, before anything is clipped.
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(optimiser)
        if self.replicated:
            average_gradients([p for p in parameters if p in self.replicated], self.world_size)
        self.norms = {name: gradient_norm(group) for name, group in groups.items()}
        norm = torch.linalg.vector_norm(torch.stack(list(self.norms.values())))
        total = self._checked(norm, first)
        for some in by_sharding(parameters):
            torch.nn.utils.clip_grads_with_norm_(some, clip, norm)
        for group in optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self.loss = 0.0
        return total

    def groups(self, optimiser: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
        """The optimiser's parameters by the part of the trained module that they are in (its children)."""
        trained = {n: m for n, m in self.modules.items() if any(p.requires_grad for p in m.parameters())}
        names: dict[int, str] = {}
        for part, module in trained.items():
            prefix = f"{part}." if len(trained) > 1 else ""
            names |= {id(p): part for p in module.parameters(recurse=False)}
            for child, inner in module.named_children():
                label = f"{child}.{type(inner).__name__}" if child.isdigit() else child
                names |= {id(p): prefix + label for p in inner.parameters()}
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            groups.setdefault(names.get(id(parameter), "weights"), []).append(parameter)
        return groups

    def _checked(self, norm: torch.Tensor, first: bool) -> float:
        """The norm of all gradients as a number. Raises StepError if it or the loss isn't finite, or if a part has none
        at the first step."""
        loss = torch.as_tensor(self.loss, device=norm.device)
        if self.world_size > 1:
            loss = self.accelerator.reduce(loss, "mean")
        # Both in one tensor, so that the device is waited for once a step.
        self.last_loss, total = torch.stack([loss, norm]).tolist()
        if not math.isfinite(self.last_loss):
            raise StepError(f"the loss is not finite ({self.last_loss})")
        if not math.isfinite(total) and self.accelerator.scaler is None:  # fp16's scaler leaves such a step out
            broken = [name for name, value in self.norms.items() if not math.isfinite(value)]
            raise StepError(f"the gradient of {' and '.join(broken)} is not finite")
        if first:
            still = [name for name, value in self.norms.items() if not value and name not in self.may_be_unused]
            if still:
                raise StepError(
                    f"the gradient of {' and '.join(still)} is zero, so it would never learn: "
                    "freeze it, let the loss depend on it, or name it in may_be_unused"
                )
        return total


def new_accelerator(unused: bool) -> Accelerator:
    """accelerate for the processes that `accelerate launch` or torchrun started, or for this one alone.

    unused: whether some weights may have no gradient. Micro-batches are counted here, not by accelerate. SystemExit for
    a launcher whose steps couldn't be guarded or resumed.
    """
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise SystemExit(
            "DeepSpeed takes its own steps, unguarded: launch with DDP, or with FSDP to shard the weights."
        )
    if sharded.fsdp_requested():
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise SystemExit("FSDP 1 can't be resumed exactly: set fsdp_version: 2 in accelerate's configuration.")
        if accelerator.scaler is not None:
            raise SystemExit('FSDP knows no fp16 here: set mixed_precision: "no", and bf16 in the configuration.')
    return accelerator


def by_sharding(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Plain tensors and sharded ones apart, since torch can't take both in one call; no empty list."""
    plain = [t for t in tensors if not isinstance(t, DTensor)]
    distributed = [t for t in tensors if isinstance(t, DTensor)]
    return [some for some in (plain, distributed) if some]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """L2 norm of the parameters' gradients, zero for none."""
    norms = []
    for some in by_sharding([p.grad for p in parameters if p.grad is not None]):
        norm = torch.nn.utils.get_total_norm(some)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float())
    if not norms:
        return torch.zeros((), device=parameters[0].device)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Mean of the gradients over the processes, in place; a parameter that no process used keeps none."""
    # Every process must join every reduction, also one whose samples didn't reach the parameter.
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(used)
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if count:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
