"""Learning rate, weight decay, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from prefgen.errors import MendableError


def cosine(step: int, total: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning rate at a step: linear warm-up, then a cosine down to floor * peak (SGDR without restarts, arXiv
    1608.03983).

    Warm-up: the second moments that Adam divides by are estimates from few gradients at first (arXiv 1908.03265).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW (arXiv 1711.05101): matrices decay, vectors (biases, the scales of norms) don't, since
    pulling those to zero doesn't make a layer simpler.

    Stages give AdamW a beta2 of 0.98 or 0.99: second moments are averaged over some 50 or 100 gradients, where the
    default of 0.999 would take 1,000, more steps than the shortest runs have.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def optimiser_of(
    kind: str, module: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)
) -> torch.optim.Optimizer:
    """The optimiser of a module's trained parameters.

    kind: "adamw", over `parameter_groups`; "adamw8bit", the same with its moments in 8 bits, OptimiserError where
    bitsandbytes isn't installed; "muon", see `muon`.
    """
    if kind == "muon":
        return muon(module, weight_decay, betas)
    groups = parameter_groups(module, weight_decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, betas=betas)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise OptimiserError(
            "optimiser adamw8bit needs bitsandbytes: install it (pip install bitsandbytes), or take adamw."
        ) from error
    return AdamW8bit(groups, betas=betas)


def muon(
    module: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99), fallback: float = 0.4
) -> torch.optim.Optimizer:
    """timm's Muon (Jordan et al. 2024, scaled as in arXiv 2502.16982) over a module: the weights of its linear and
    convolutional layers move by orthogonalised momentum, everything else by NAdamW at `fallback` times the rate.

    For networks that start from nothing: docs/evidence/second_edition.md says what it brought the atelier's VAE.
    OptimiserError for weights that it can't move so: of LoRA alone, or cut by FSDP.
    Layers too thin to be orthogonalised, such as the convolution that ends in three colours, fall back by themselves.
    """
    # Half a second, as timm's is more: only for stages that use it.
    from torch.distributed.tensor import DTensor

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if any(isinstance(parameter, DTensor) for parameter in trained):
        raise OptimiserError("optimiser muon needs whole matrices, and FSDP cuts them: launch with DDP, or take adamw.")
    # It brings torchvision and all of timm's models.
    from timm.optim import Muon

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    matrices = {id(layer.weight) for layer in module.modules() if isinstance(layer, layers)}
    # The output layer of a language model may be its embedding.
    matrices -= {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    if not any(id(parameter) in matrices for parameter in trained):
        raise OptimiserError("optimiser muon moves whole layers, and of these LoRA weights are trained: take adamw.")
    return Muon(
        [
            {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0, "use_fallback": True},
        ],
        nesterov=True,
        fallback_lr_scale=fallback,
        betas=betas,
    )


class OptimiserError(MendableError):
    """An optimiser that isn't here: one sentence."""


class Ema:
    """Exponential moving average of a module's parameters and buffers, by their names in it.

    Not torch's AveragedModel nor diffusers' EMAModel: the export reads a checkpoint's averages by the weights' own
    names, which AveragedModel prefixes and EMAModel drops.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = module
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, which counts from 0; buffers of whole numbers are copied."""
        # The full decay would hold on to the first, random weights for 1 / (1 - decay) steps: until then the average is
        # over about the last ninth of the steps (TensorFlow's ExponentialMovingAverage has the same formula).
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in self.module.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[key].lerp_(value, 1 - decay)
            else:
                self.shadow[key].copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for key, value in state.items():
            self.shadow[key].copy_(value)
