"""The preference MLLM under ComfyUI's memory management: on the device while it reads, off it before sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher

from ..mllm.model import PreferenceMLLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Held(torch.nn.Module):
    """ComfyUI sets `model.device`, which transformers' models forbid; this module takes the attribute instead."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.held = model


class ManagedMLLM:
    """What the PREFGEN_MLLM socket carries: a PreferenceMLLM and the patcher ComfyUI moves it by."""

    def __init__(self, mllm, device: torch.device):
        self.mllm = mllm
        self.patcher = ModelPatcher(
            _Held(mllm.model), load_device=device, offload_device=management.text_encoder_offload_device()
        )

    @contextmanager
    def on_device(self) -> Iterator:
        """The PreferenceMLLM, loaded on its device for the length of the block and taken off it afterwards."""
        management.load_models_gpu([self.patcher])
        try:
            yield self.mllm
        finally:
            others = [loaded for loaded in management.current_loaded_models if loaded.model is not self.patcher]
            management.free_memory(1e30, self.patcher.load_device, keep_loaded=others)


def pick_device(choice: str) -> torch.device:
    """The device of a loader's combo: "auto" (where ComfyUI puts text encoders) or "cpu"."""
    return torch.device("cpu") if choice == "cpu" else management.text_encoder_device()


def pick_dtype(choice: str, device: torch.device, tiny: bool) -> torch.dtype:
    """The dtype of a loader's combo: "auto", "fp32", "bf16" or "fp16". Auto is fp32 for `tiny` models and on the CPU,
    else what the device is good at."""
    if choice in DTYPES:
        return DTYPES[choice]
    if choice != "auto":
        raise ValueError(f"There is no precision {choice!r}: choose auto, {', '.join(DTYPES)}.")
    if tiny or management.is_device_cpu(device):
        return torch.float32
    if management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if management.should_use_fp16(device) else torch.float32


TINY = 64 * 2**20  # bytes of fp32 weights below which half precision saves nothing worth having


def load_mllm(folder: Path, precision: str, device: str) -> ManagedMLLM:
    """A preference MLLM from a local folder, on its offload device until somebody reads with it."""
    chosen = pick_device(device)
    tiny = sum(file.stat().st_size for file in folder.glob("*.safetensors")) < TINY
    return ManagedMLLM(PreferenceMLLM.load(folder, pick_dtype(precision, chosen, tiny)), chosen)
