"""Losses in full precision, whatever the forward pass around them computes in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch


def full_precision(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator for a loss or another reduction: autocast is off inside, and half-precision tensors come in as fp32.

    Autocast's lists differ by device (CUDA's lacks cross_entropy and vector_norm, CPU's has them) and both put every
    product of matrices into bf16: an InfoNCE loss at a temperature of 0.1 came out as 0.0 where fp32 says 0.0011, with
    a gradient 29 % short.
    """

    @wraps(loss)
    def exact(*inputs, **options) -> torch.Tensor:
        tensors = [value for value in (*inputs, *options.values()) if isinstance(value, torch.Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device, enabled=False):
            return loss(*map(_widened, inputs), **{name: _widened(value) for name, value in options.items()})

    return exact


def _widened(value):
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value
