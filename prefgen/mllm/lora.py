"""A LoRA (arXiv 2106.09685) as peft writes it, merged into an MLLM when it is loaded: W += scale * B A. Needs no
peft."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from . import foreign
from .files import MLLMError, read_json, refuse

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What a config of a plain W += scale * B A may hold: peft's own keys from 0.3 to 0.21, and those that ms-swift adds.
# A key that stands in neither list may be new and change the layer, so it must be empty.
ANY_VALUE = frozenset(
    # what it was made for and by
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode "
    # which layers have a pair, which the tensors themselves say
    "target_modules exclude_modules layers_to_transform layers_pattern "
    # what the scale is computed from: see `scale_of`
    "r rank_pattern lora_alpha alpha_pattern use_rslora "
    # how it was trained, which leaves the pair as it is
    "lora_dropout lora_dtype lorap_lr_ratio lorap_emb_lr eva_config runtime_config ephemeral_gpu_offload "
    # settings of what another key has to switch on
    "megatron_core qalora_group_size".split()
)
# Starts of the pair that leave the base weights as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them.
PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal")
PLAIN_VALUES: dict[str, Callable] = {
    "bias": lambda value: value in (None, "none"),
    "init_lora_weights": lambda value: value is None or str(value).lower() in PLAIN_STARTS,
}
DOES = {
    "use_dora": "uses DoRA",
    "bias": "trains biases",
    "lora_bias": "trains biases",
    "modules_to_save": "replaces whole layers",
    "layer_replication": "repeats layers",
    "fan_in_fan_out": "is for transposed layers",
    "init_lora_weights": "started from changed base weights",
    "alora_invocation_tokens": "acts after certain words only (aLoRA)",
    "trainable_token_indices": "changes individual words",
}


def merge_lora(model: nn.Module, folder: Path) -> str:
    """Add a LoRA to the model's weights and return its digest. All of it fits or nothing is changed: raises MLLMError
    with one sentence otherwise."""
    config = check_lora(folder)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        refuse(foreign.damage(path, f"the LoRA {folder.name}"))
        raise MLLMError(f"{WEIGHTS} of the LoRA {folder.name} is damaged: download or export it again.") from error
    with torch.no_grad():
        # All of them first: a pair that doesn't fit must leave the others unmerged.
        for weight, delta in list(deltas(model, tensors, config, folder.name)):
            weight.copy_(weight.float() + delta.to(weight.device))
    return lora_digest(folder)


def check_lora(folder: Path) -> dict:
    """The config of a LoRA folder. Raises MLLMError with one sentence for one that can't be merged."""
    refuse(foreign.broken_link(folder, f"the LoRA {folder.name}"))
    if not (folder / CONFIG).is_file():
        raise MLLMError(foreign.lora_in_place(folder, CONFIG, WEIGHTS))
    config = read_json(folder / CONFIG, f"the LoRA {folder.name}")
    if not (folder / WEIGHTS).is_file():
        raise MLLMError(f"The LoRA folder {folder.name} has no {WEIGHTS}: save it as safetensors, never as a pickle.")
    if config.get("peft_type") != "LORA":
        raise MLLMError(
            f"{folder.name} is a {str(config.get('peft_type', 'file'))[:40]} adapter, not a LoRA: choose a LoRA that "
            "peft has saved, or none."
        )
    for key, value in config.items():
        if not is_plain(key, value):
            does = DOES.get(key, "asks for more than a plain LoRA")
            raise MLLMError(
                f"The LoRA {folder.name} {does} ({key[:40]}), which PrefGen can't merge: merge it into its MLLM with "
                "peft and load the result, or choose none."
            )
    if not _scales(config):
        raise MLLMError(f"{CONFIG} of the LoRA {folder.name} is damaged: download or export it again.")
    return config


def is_plain(key: str, value: object) -> bool:
    """Whether a key of adapter_config.json asks for nothing beyond W += scale * B A."""
    if key in PLAIN_VALUES:
        return PLAIN_VALUES[key](value)
    return key in ANY_VALUE or not value


def _scales(config: dict) -> bool:
    """Whether what the scale is computed from has the types that peft writes."""
    numbers = [config[key] for key in ("r", "lora_alpha") if config.get(key) is not None]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            return False
        numbers += patterns.values()
        try:
            [re.compile(pattern) for pattern in patterns]
        except re.error:
            return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in numbers)


def deltas(
    model: nn.Module, tensors: dict[str, torch.Tensor], config: dict, name: str
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """(weight, what is added to it in fp32) of every layer that the LoRA changes; nothing is changed yet."""
    linears = {canonical(path): module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    shared = model.get_input_embeddings().weight
    for place, pair in _pairs(tensors, name).items():
        linear = linears.get(place)
        if linear is None or not pair.fits(linear):
            base = config.get("base_model_name_or_path")
            base_name = f" ({Path(base).name})" if base else ""
            raise MLLMError(
                f"The LoRA {name} was made for another MLLM{base_name}: its layer {pair.path} doesn't fit this one, so "
                "choose that MLLM, or no LoRA."
            )
        if linear.weight is shared:
            raise MLLMError(
                f"The LoRA {name} changes a language head that this MLLM shares with its words: merge it into its MLLM "
                "with peft and load the result, or choose none."
            )
        rank = len(pair.a)
        if config.get("r") is not None and rank != number_for(pair.path, config, "rank_pattern", "r", 8):
            raise MLLMError(
                f"The LoRA {name} is damaged: {pair.path} has rank {rank}, which isn't what {CONFIG} says, so download "
                "or export it again."
            )
        yield linear.weight, scale_of(pair.path, rank, config) * (pair.b @ pair.a)


@dataclass(frozen=True)
class Pair:
    """A [rank, in] and B [out, rank] of one layer, fp32. path: the layer's, as the file has it."""

    path: str
    a: torch.Tensor
    b: torch.Tensor

    def fits(self, linear: nn.Linear) -> bool:
        """Whether B A has the shape of the layer's weight."""
        if self.a.ndim != 2 or self.b.ndim != 2 or len(self.a) != self.b.shape[1]:
            return False
        return linear.weight.shape == (self.b.shape[0], self.a.shape[1])


def _pairs(tensors: dict[str, torch.Tensor], name: str) -> dict[str, Pair]:
    """The pairs of a LoRA by their layers' canonical paths. Raises MLLMError for other tensors, half a pair or none."""
    paths: dict[str, str] = {}
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise MLLMError(
                f"The LoRA {name} holds {key}, which isn't a LoRA of a linear layer: merge it into its MLLM with peft "
                "and load the result, or choose none."
            )
        place = canonical(match["module"])
        paths.setdefault(place, match["module"])
        if match["side"] in sides.setdefault(place, {}):
            raise MLLMError(f"The LoRA {name} is damaged, it holds {key[:60]} twice: download or export it again.")
        sides[place][match["side"]] = tensor.float()
    if not sides:
        raise MLLMError(f"The LoRA {name} is empty: download or export it again.")
    for place, pair in sides.items():
        if len(pair) < 2 or not all(torch.isfinite(side).all() for side in pair.values()):
            raise MLLMError(f"The LoRA {name} is damaged at {paths[place]}: download or export it again.")
    return {place: Pair(paths[place], pair["A"], pair["B"]) for place, pair in sides.items()}


def scale_of(path: str, rank: int, config: dict) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); layers may have an alpha of their own."""
    alpha = number_for(path, config, "alpha_pattern", "lora_alpha", 8)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def number_for(path: str, config: dict, patterns: str, key: str, default: float) -> float:
    """A layer's own number by the first of config[patterns] that fits its path, as peft looks it up, or config[key]."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    value = config.get(key)
    return default if value is None else value


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
