"""How much of a frozen model's work fits a device at once: counted on the meta device, measured against what is free,
and halved where it didn't fit after all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefgen.errors import out_of_memory

Result = TypeVar("Result")

# Of what is free. The rest is for what isn't counted: the work space of convolutions, and fragments.
SHARE = 0.6


class Pieces:
    """Runs a function over rows in pieces of `size`. A piece that doesn't fit is cut in half, and so are all after it;
    one row alone that doesn't fit raises what the device raised."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, function: Callable[[Sequence], Result], rows: Sequence) -> list[Result]:
        results: list[Result] = []
        start = 0
        while start < len(rows):
            stop = start + self.size
            try:
                results.append(function(rows[start:stop]))
            except Exception as error:
                if self.size == 1 or not out_of_memory(error):
                    raise
                self.size //= 2
            else:
                start = stop
                continue
            # Outside of the handler: the error's frames hold on to what was computed.
            release()
        return results


def pieces_that_fit(row_bytes: int, most: int, device: torch.device) -> Pieces:
    """Pieces of at most `most` rows, each of which takes `row_bytes` while it is computed. Powers of two, so that a
    resumed command meets the same size although a little more or less is free."""
    room = free_bytes(device)
    fits = most if room is None else int(room * SHARE) // max(1, row_bytes)
    return Pieces(1 << max(0, min(most, fits).bit_length() - 1))


def free_bytes(device: torch.device) -> int | None:
    """What is free on a device now, None where it can't be asked."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        free, _ = module.mem_get_info(device)
        # What torch has reserved and doesn't use can be had too.
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def release() -> None:
    """Give back what torch keeps for later, on whatever accelerator there is."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = getattr(torch, accelerator.type, None) if accelerator is not None else None
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()


def peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes of the tensors that are alive at once at most while `function` computes on the meta device; what was there
    before isn't counted, and neither are kernels' own work spaces."""
    with _Counted() as counted, torch.no_grad():
        function()
    return counted.peak


class _Counted(TorchDispatchMode):
    """Counts the storages that operations make, from their making to the last reference."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        before = {_storage_key(t) for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, before)
        return result

    def _count(self, tensor: torch.Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in before or key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
