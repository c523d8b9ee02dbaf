"""A LoRA as peft writes it, merged into an MLLM when it is loaded: W += scale * B A. Needs no peft."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .files import MLLMError, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What a config may ask for that a plain W += scale * B A is not.
UNSUPPORTED: dict[str, tuple[str, Callable]] = {
    "use_dora": ("uses DoRA", bool),
    "bias": ("trains biases", lambda value: value not in (None, "none")),
    "lora_bias": ("trains biases", bool),
    "modules_to_save": ("replaces whole layers", bool),
    "layer_replication": ("repeats layers", bool),
    "fan_in_fan_out": ("is for transposed layers", bool),
    "init_lora_weights": (
        "started from changed base weights",
        lambda value: str(value).startswith(("pissa", "olora", "corda", "loftq")),
    ),
}


def merge_lora(model: nn.Module, folder: Path) -> str:
    """Add a LoRA to the model's weights and return its digest. All of it fits or nothing is changed: raises MLLMError
    with one sentence otherwise."""
    config = check_lora(folder)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MLLMError(f"{WEIGHTS} of the LoRA {folder.name} is damaged: download or export it again.") from error
    with torch.no_grad():
        for weight, delta in [*deltas(model, tensors, config, folder.name)]:
            weight.copy_(weight.float() + delta.to(weight.device))
    return lora_digest(folder)


def check_lora(folder: Path) -> dict:
    """The config of a LoRA folder. Raises MLLMError with one sentence for one that can't be merged."""
    if not (folder / CONFIG).is_file():
        raise MLLMError(f"The LoRA folder {folder.name} has no {CONFIG}: choose a folder that peft has saved.")
    config = read_json(folder / CONFIG, f"{CONFIG} of the LoRA {folder.name}")
    if not (folder / WEIGHTS).is_file():
        raise MLLMError(f"The LoRA folder {folder.name} has no {WEIGHTS}: save it as safetensors, never as a pickle.")
    if config.get("peft_type") != "LORA":
        raise MLLMError(
            f"{folder.name} is a {config.get('peft_type', 'file')} adapter, not a LoRA: choose a LoRA that peft has "
            "saved, or none."
        )
    for key, (does, asked) in UNSUPPORTED.items():
        if asked(config.get(key)):
            raise MLLMError(
                f"The LoRA {folder.name} {does}, which PrefGen can't merge: merge it into its MLLM with peft and load "
                "the result, or choose none."
            )
    return config


def deltas(model: nn.Module, tensors: dict[str, torch.Tensor], config: dict, name: str):
    """(weight, what is added to it in fp32) of every layer that the LoRA changes; nothing is changed yet."""
    linears = {canonical(path): module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise MLLMError(
                f"The LoRA {name} holds {key}, which is no LoRA of a linear layer: merge it into its MLLM with peft "
                "and load the result, or choose none."
            )
        layers.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not layers:
        raise MLLMError(f"The LoRA {name} is empty: download or export it again.")
    for path, pair in layers.items():
        linear = linears.get(canonical(path))
        if set(pair) != {"A", "B"} or not all(torch.isfinite(side).all() for side in pair.values()):
            raise MLLMError(f"The LoRA {name} is damaged at {path}: download or export it again.")
        a, b = pair["A"], pair["B"]
        fits = linear is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
        if not fits or linear.weight.shape != (b.shape[0], a.shape[1]):
            made_for = config.get("base_model_name_or_path")
            named = f" ({Path(made_for).name})" if made_for else ""
            raise MLLMError(
                f"The LoRA {name} was made for another MLLM{named}: its layer {path} doesn't fit this one, so choose "
                "that MLLM, or no LoRA."
            )
        if linear.weight is model.get_input_embeddings().weight:
            raise MLLMError(
                f"The LoRA {name} changes a language head that this MLLM shares with its words: merge it into its MLLM "
                "with peft and load the result, or choose none."
            )
        yield linear.weight, scale_of(path, len(a), config) * (b @ a)


def scale_of(path: str, rank: int, config: dict) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; single layers may have an alpha of their own."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def canonical(path: str) -> str:
    """A module's path without the levels that transformers' versions put in or leave out."""
    left_out = {"model", "language_model"}
    short = ".".join(part for part in path.split(".") if part not in left_out)
    return short.replace("vision_tower.vision_model.", "vision_tower.")


def lora_digest(folder: Path) -> str:
    """sha256 of all that decides the merged weights."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
