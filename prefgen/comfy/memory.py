"""The preference MLLM under ComfyUI's memory management: on the device while it reads, off it before sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher

from ..compat import has_nf4
from ..dtypes import DTYPES
from ..errors import out_of_memory
from ..files import visible_files
from ..mllm.files import MLLMError, check_folder, weight_bytes
from ..mllm.model import PreferenceMLLM

NF4 = "nf4"
DEVICES = ("auto", "cpu")
GIB = 2**30
TINY = 64 * 2**20  # bytes of weights below which half precision saves nothing worth having


def load_mllm(folder: Path, precision: str, device: str, lora: Path | None = None) -> ManagedMLLM:
    """A preference MLLM from a local folder, on its offload device until somebody reads with it. Raises ValueError with
    one sentence for a folder, LoRA, precision or device that won't do; too little memory is named before loading."""
    check_folder(folder)
    chosen = pick_device(device)
    tiny = sum(file.stat().st_size for file in visible_files(folder, "*.safetensors")) < TINY
    dtype = pick_dtype(precision, chosen, tiny)
    nf4 = precision == NF4
    if not tiny:
        check_memory(folder, chosen, dtype, nf4)
    if nf4:  # packed where it is to be used, before ComfyUI knows of it
        model_management.free_memory(weight_bytes(folder, dtype.itemsize, nf4), chosen)
    return ManagedMLLM(PreferenceMLLM.load(folder, dtype, str(chosen) if nf4 else "cpu", lora, nf4), chosen)


class _Wrapped(torch.nn.Module):
    """ComfyUI sets `model.device`, which transformers' models forbid; this module takes the attribute instead."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner = model


class ManagedMLLM:
    """What the PREFGEN_MLLM socket carries: a PreferenceMLLM and the patcher ComfyUI moves it by."""

    def __init__(self, mllm, device: torch.device):
        offload = model_management.text_encoder_offload_device()
        self.mllm = mllm
        self.patcher = ModelPatcher(_Wrapped(mllm.model).to(offload), load_device=device, offload_device=offload)

    @contextmanager
    def on_device(self) -> Iterator:
        """The PreferenceMLLM, loaded on its device for the length of the block and taken off it afterwards. Raises
        MLLMError with one sentence if the memory there isn't enough."""
        try:
            load_whole(self.patcher)
            self._check_whole()
            yield self.mllm
        except Exception as error:  # every backend has an error of its own for it
            if not _no_memory(error):
                raise
            place = "computer" if model_management.is_device_cpu(self.patcher.load_device) else "graphics card"
            raise MLLMError(
                f"The {place} ran out of memory while {self.mllm.name} was reading: choose {self._instead()}a smaller "
                "MLLM in Load Preference MLLM."
            ) from error
        finally:
            others = [loaded for loaded in model_management.current_loaded_models if loaded.model is not self.patcher]
            model_management.free_memory(1e30, self.patcher.load_device, keep_loaded=others)

    def _check_whole(self) -> None:
        """transformers' layers don't fetch weights that ComfyUI left elsewhere, so all of them must be there."""
        device = self.patcher.load_device
        left = [t for t in _tensors(self.patcher.model) if not _is_on(t, device)]
        if left:
            size = sum(tensor.nbytes for tensor in left) / GIB
            raise MLLMError(
                f"ComfyUI left {size:.1f} GiB of {self.mllm.name} off {_place(device)}, but all of it has to be there: "
                f"choose {self._instead()}a smaller MLLM in Load Preference MLLM, or start ComfyUI without --novram."
            )

    def _instead(self) -> str:
        """What takes less memory than this, beside a smaller model."""
        precision = "" if self.mllm.fingerprint["precision"] != "float32" else "precision bf16, "
        device = "" if model_management.is_device_cpu(self.patcher.load_device) else "device cpu, "
        return precision + device + ("or " if precision or device else "")


def load_whole(patcher: ModelPatcher) -> None:
    """Put all of a model on its device, whatever ComfyUI leaves elsewhere to keep memory free."""
    model_management.load_models_gpu([patcher], force_full_load=True)


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor lies on a device; one without a number is any of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _no_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, by our own list or by ComfyUI's."""
    theirs = getattr(model_management, "OOM_EXCEPTION", Exception)  # Exception, where torch has none
    return out_of_memory(error) or (theirs is not Exception and isinstance(error, theirs))


def _place(device: torch.device) -> str:
    return "main memory" if model_management.is_device_cpu(device) else "the graphics card"


def pick_device(choice: str) -> torch.device:
    """The device of a loader's combo: "auto" (where ComfyUI puts text encoders) or "cpu". Raises ValueError with one
    sentence for another one."""
    if choice not in DEVICES:
        raise ValueError(f"There is no device {choice!r}: choose {' or '.join(DEVICES)}.")
    return torch.device("cpu") if choice == "cpu" else model_management.text_encoder_device()


def precisions() -> list[str]:
    """The entries of a loader's combo; nf4 where what it needs is installed."""
    return ["auto", *DTYPES, *([NF4] if has_nf4() else [])]


def check_precision(choice: str) -> None:
    """Raise ValueError with one sentence for a precision that isn't offered here."""
    if choice == NF4 and not has_nf4():
        raise ValueError("The precision nf4 needs bitsandbytes and accelerate: pip install both, or choose bf16.")
    if choice not in precisions():
        raise ValueError(f"There is no precision {choice!r}: choose {', '.join(precisions())}.")


def pick_dtype(choice: str, device: torch.device, tiny: bool) -> torch.dtype:
    """The dtype of a loader's combo. Auto is fp32 for `tiny` models and on the CPU, else what the device is good at;
    that is also what nf4 computes in."""
    check_precision(choice)
    if choice in DTYPES:
        return DTYPES[choice]
    if choice == NF4 and model_management.is_device_cpu(device):
        # On CPUs bitsandbytes 0.50 repacks the weights when they are read, and state_dict(), which ComfyUI asks for,
        # doesn't put them back as they were.
        raise ValueError("The precision nf4 needs a graphics card: choose device auto, or bf16 on the CPU.")
    if tiny or model_management.is_device_cpu(device):
        return torch.float32
    if model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if model_management.should_use_fp16(device) else torch.float32


def check_memory(folder: Path, device: torch.device, dtype: torch.dtype, nf4: bool) -> None:
    """Raise MLLMError with one sentence that says what to choose instead if a model fits neither into what is free nor
    into what ComfyUI can free: while it loads in main memory, while it reads on its device."""
    needed = weight_bytes(folder, dtype.itemsize, nf4)
    for place in dict.fromkeys((device,) if nf4 else (torch.device("cpu"), device)):
        if not model_management.is_device_cpu(place) and directml():
            continue
        on_cpu = model_management.is_device_cpu(place)
        available = model_management.get_free_memory(place)
        if not on_cpu:
            available += sum(
                m.model_loaded_memory() for m in model_management.current_loaded_models if m.device == place
            )
            available -= model_management.minimum_inference_memory()
        if needed <= available:
            continue
        instead = "" if dtype.itemsize == 2 or nf4 else "precision bf16, "
        if not on_cpu:
            instead += "device cpu, " + ("precision nf4, " if has_nf4() and not nf4 else "")
        raise MLLMError(
            f"{folder.name} needs {needed / GIB:.1f} GiB in {precision_name(dtype, nf4)} and "
            f"{_place(place)} has {max(available, 0) / GIB:.1f} GiB for it: choose "
            f"{instead}{'or ' if instead else ''}a smaller MLLM."
        )


def directml() -> bool:
    """Whether the graphics card is used through DirectML, where ComfyUI always reports 1 GiB free."""
    return bool(getattr(model_management, "directml_enabled", False))


def precision_name(dtype: torch.dtype, nf4: bool) -> str:
    """As the combo calls it."""
    return NF4 if nf4 else next(name for name, value in DTYPES.items() if value == dtype)
