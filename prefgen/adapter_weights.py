"""The tensors of an adapter file: which of them are weights, that each can be used, and that they fit their modules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import AdapterError
from .files import safetensors_header

AGAIN = "Download or export it again."
# What some converters write for `ip_adapter.`.
OTHER_PREFIX = "adapter_modules."
# How XLabs' files for Flux.1 spell `image_proj.` and, within the name of a block, `ip_adapter.`.
XLABS_PROJECTION = "ip_adapter_proj_model."
XLABS_BRANCH = ".ip_adapter_double_stream_"
OWN_PARTS = ("prefgen.aligner.", "prefgen.sem_norm.", "prefgen.core_norm.")
WEIGHTS = ("image_proj.", "ip_adapter.", OTHER_PREFIX, XLABS_PROJECTION, *OWN_PARTS)
# safetensors' names of the dtypes that torch casts to fp32 value by value. Whole numbers, and the scales of F8_E8M0,
# are weights only together with what else a quantiser wrote.
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"}
# What ComfyUI, compressed-tensors, bitsandbytes and GPTQ write beside quantised weights.
SCALES = re.compile(
    r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|scale_input|(weight|input)_scale\w*|absmax|quant_map|quant_state\..*"
    r"|SCB|scales|qweight|qzeros)$"
)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """({name of a tensor: its dtype}, metadata); both empty for a broken header, of which `read_weights` speaks. Raises
    AdapterError with one sentence for a file that is missing or empty."""
    if not path.is_file():
        raise AdapterError(
            f"The adapter {path.name} is not there any more: put it into models/prefgen or choose another."
        )
    if path.stat().st_size == 0:
        raise AdapterError(f"{path.name} is empty (0 bytes). {AGAIN}")
    try:
        header, metadata = safetensors_header(path)
    except (OSError, ValueError):
        return {}, {}
    return {name: str(entry.get("dtype")) for name, entry in header.items()}, metadata


def read_weights(path: Path, dtypes: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(weights in the file's own precision, the names of all of its tensors) of a safetensors file with these dtypes.

    The weights are copies: what a file maps into memory changes when somebody writes over the file. Raises
    AdapterError with one sentence that names the file, and the tensor where it is about one.
    """
    check_dtypes(path.name, dtypes)
    try:
        with safe_open(str(path), "pt") as file:
            names = list(file.keys())
            weights = {name: file.get_tensor(name).clone() for name in names if is_weight(name)}
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error
    for name, weight in weights.items():
        fault = fault_of(weight)
        if fault:
            raise AdapterError(f"{path.name} {fault} (in {name}). {AGAIN}")
    return weights, names


def is_weight(name: str) -> bool:
    """Whether a tensor of this name is a weight of an adapter of any layout."""
    return name.startswith(WEIGHTS) or XLABS_BRANCH in name


def check_dtypes(file: str, dtypes: Mapping[str, str]) -> None:
    """Refuse weights that aren't plain floats before they are read: torch casts whole numbers without a word."""
    scale = next((name for name in dtypes if SCALES.search(name)), None)
    if scale is not None and any(is_weight(name) for name in dtypes):
        raise AdapterError(
            f"{file} is quantised, with scales of its own ({scale}), which PrefGen doesn't read: choose the same "
            "adapter in fp16 or fp32."
        )
    for name, dtype in dtypes.items():
        if is_weight(name) and dtype not in FLOATS:
            raise AdapterError(
                f"{file} stores {name} as {dtype}, which PrefGen can't read as a weight: choose the same adapter "
                "in fp16 or fp32."
            )


def _damaged(path: Path) -> AdapterError:
    # Only now: a safetensors file starts with a length, which may happen to look like a pickle's first byte.
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        return AdapterError(f"{path.name} can't be read: check its permissions and the disk.")
    if start == b"PK" or start in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
        return AdapterError(
            f"{path.name} is a pickle under a .safetensors name, which PrefGen never opens: get a real "
            "safetensors file, or convert it once with torch.load(..., weights_only=True), as docs/flux.md shows."
        )
    return AdapterError(f"{path.name} is damaged, or an incomplete safetensors file. {AGAIN}")


def fault_of(weight: torch.Tensor) -> str:
    """What makes a tensor no weight, in words that follow the file's name; empty for a sound one. Looked at in fp32, in
    which it will be used: float8 has no test for NaN, and a float64 may be too large."""
    if not weight.numel():
        return "is damaged: it holds a tensor without values"
    if not weight.is_floating_point():
        return f"holds {str(weight.dtype).removeprefix('torch.')} in place of weights"
    # aminmax hands NaN on, and makes no second tensor as isfinite does.
    if not all(torch.isfinite(end) for end in torch.aminmax(weight.float())):
        return "holds values that are not numbers"
    return ""


def check_to_write(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise AdapterError before a file is written that `read_weights` would refuse."""
    for key, tensor in tensors.items():
        fault = fault_of(tensor)
        if fault:
            raise AdapterError(
                f"{name} is not written: it {fault} (in {key}). Train again from an earlier checkpoint, with a smaller "
                "learning rate."
            )


def weight_of(name: str, weights: Mapping[str, torch.Tensor], key: str, dims: int) -> torch.Tensor:
    """A weight by which others are measured. Raises AdapterError if the file `name` lacks it, or it has other dims."""
    if key not in weights:
        raise AdapterError(f"{name} is damaged: it lacks {key}. {AGAIN}")
    if weights[key].ndim != dims:
        raise AdapterError(f"{name} is damaged: {key} has the shape {[*weights[key].shape]}. {AGAIN}")
    return weights[key]


def assign(name: str, module: nn.Module, prefix: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a module, built on the meta device, the weights below `prefix` in fp32, without a second copy of those that
    are. Raises AdapterError that names the file `name` and a tensor that is missing, too many or of another shape."""
    shapes = {prefix + key: value.shape for key, value in module.state_dict().items()}
    check_shapes(name, shapes, {key: value for key, value in weights.items() if key.startswith(prefix)})
    module.load_state_dict({key.removeprefix(prefix): weights[key].float() for key in shapes}, assign=True)


def check_shapes(name: str, shapes: Mapping[str, Sequence[int]], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise AdapterError unless the file `name` holds exactly the weights of these shapes."""
    for key, shape in shapes.items():
        if key not in weights:
            raise AdapterError(f"{name} is damaged: it lacks {key}. {AGAIN}")
        if weights[key].shape != torch.Size(shape):
            raise AdapterError(
                f"{name} is damaged: {key} has the shape {[*weights[key].shape]} instead of {[*shape]}. {AGAIN}"
            )
    extra = next((key for key in weights if key not in shapes), None)
    if extra is not None:
        raise AdapterError(f"{name} is damaged: its other weights leave no place for {extra}. {AGAIN}")
