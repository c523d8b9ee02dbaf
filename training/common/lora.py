"""LoRA (arXiv 2106.09685) on an MLLM's decoder by peft, in a folder that peft and the node pack load."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from prefgen.errors import MendableError


class LoraError(MendableError):
    """A LoRA that can't be put on: one sentence."""


def put_on(model: torch.nn.Module, decoder: torch.nn.Module, lora, seed: int):
    """The model with a LoRA on its decoder, as peft's PeftModel; nothing else is trained."""
    from peft import LoraConfig, get_peft_model

    # A LoRA starts as a random A and a zero B: A is to be the same in every process and after every restart.
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets_of(model, decoder, lora.targets),
        bias="none",
    )
    return get_peft_model(model, config)


def save(peft_model, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the folder is there complete or not at all. state: the
    LoRA's weights by their names in `peft_model`, gathered where that is sharded over processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        peft_model.save_pretrained(temporary, safe_serialization=True, state_dict=state)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's template of a model card, empty
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def targets_of(model: torch.nn.Module, decoder: torch.nn.Module, names: tuple[str, ...]) -> str:
    """A pattern for the linear layers of these names in the decoder's layers and nowhere else: suffixes would reach the
    vision tower too. LoraError unless every decoder layer has each of them."""
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    pattern = rf"{re.escape(prefix)}\.layers\.\d+\.(\w+\.)*({'|'.join(map(re.escape, names))})"
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.fullmatch(pattern, name)
    ]
    expected = len(decoder.layers) * len(names)
    if len(linear) != expected:
        missing = [name for name in names if not any(path.endswith(f".{name}") for path in linear)]
        raise LoraError(
            f"mllm.lora.targets: {', '.join(missing) or 'some of them'} match nothing in the decoder ({len(linear)} of "
            f"{expected} layers found): name its linear layers, such as q_proj."
        )
    return pattern
