"""Which device a command computes on: the one that --device names, if that is here, or the best there is."""

from __future__ import annotations

import torch

from prefgen.errors import MendableError


class DeviceError(MendableError):
    """A device that isn't here: one sentence."""


def default_device() -> str:
    """The machine's accelerator as torch knows it ("cuda", "mps", "xpu"), or "cpu"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def checked_device(name: str) -> str:
    """`name`, such as "cuda:1". DeviceError with one sentence when torch can't compute on it here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device {name}: there is no such device; name cpu, cuda, cuda:1, mps or xpu.") from error
    count = _count(device.type)
    if device.type == "meta" or not count:
        built = device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None
        why = ", for this torch was built without CUDA" if built else ""
        raise DeviceError(f"--device {name}: torch can't use any {device.type} here{why}; take {default_device()}.")
    if (device.index or 0) >= count:
        last = f" to {device.type}:{count - 1}" if count > 1 else " alone"
        raise DeviceError(f"--device {name}: torch sees {device.type}:0{last} here.")
    return name


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued on a device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _count(kind: str) -> int:
    """How many devices of a kind torch can use here."""
    if kind in ("cpu", "meta"):
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    return module.device_count() if module is not None and module.is_available() else 0
