"""The one module that knows transformers' versions (4.50 to 5.x)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# What every family calls the parts that see. They keep their precision in nf4: they are small, and not all of their
# widths fit bitsandbytes' blocks.
VISION_PARTS = ("vision_model", "vision_tower", "visual", "connector", "multi_modal_projector")

HEAD = "lm_head."
LAYER = re.compile(r"\.(layers|blocks|deepstack_merger_list)\.\d+\.")


def load_image_text_to_text(folder: Path, dtype: torch.dtype, nf4_device: str | None = None):
    """AutoModelForImageTextToText from a local folder: safetensors only, no remote code, eval mode.

    nf4_device: where the decoder's linear layers are packed into 4 bits, computed in `dtype`; None packs nothing.
    Raises ValueError for a checkpoint whose weights and config don't fit each other: transformers would go on with
    random weights, or without some layers. Only the language head may be missing, see `lost_its_head`.
    """
    import transformers
    from transformers import AutoModelForImageTextToText

    options = dtype_option(dtype)
    if nf4_device is not None:
        options["device_map"] = {"": nf4_device}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            # 5.x looks at how a module's name begins, 4.x at any part of it.
            llm_int8_skip_modules=["lm_head", *VISION_PARTS, *(f"model.{part}" for part in VISION_PARTS)],
        )
    model, loading = from_safetensors(AutoModelForImageTextToText, folder, trust_remote_code=False, **options)
    # Histories are read without the language head.
    missing = sorted(key for key in loading["missing_keys"] if HEAD not in key)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    mismatched = _mismatched(loading)
    if mismatched:
        raise ValueError(f"{mismatched[0]} has another size than config.json says")
    left_over = sorted(key for key in loading["unexpected_keys"] if _of_a_layer(key))
    if left_over:
        raise ValueError(f"config.json has no place for {len(left_over)} weights, such as {left_over[0]}")
    model.head_is_random = len(missing) < len(loading["missing_keys"])
    return model.eval()


def from_safetensors(kind, folder: Path, **options) -> tuple[Any, dict]:
    """(model, what was found of its weights) of a local folder of transformers or diffusers. Nothing is downloaded and
    no pickle opened; what the files lack is drawn at random, so ask `absent` before the model is used."""
    return kind.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )


def absent(loading: dict) -> list[str]:
    """Names of the weights that `from_safetensors` drew at random: they aren't there, or of another size."""
    return sorted([*loading["missing_keys"], *_mismatched(loading)])


def _mismatched(loading: dict) -> list[str]:
    return sorted(str(entry[0]) for entry in loading.get("mismatched_keys") or ())


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """from_pretrained's keyword for the weights' precision: it moved in 4.56, and the old one warns from then on."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def _of_a_layer(key: str) -> bool:
    """Whether a weight that the model has no place for belongs to one of its layers: the config says fewer layers, or
    layers of another kind. Tables that are computed, and heads for several tokens at once, are left out by right."""
    left_out = key.endswith("inv_freq") or key.removeprefix("model.").startswith("mtp.")
    return bool(LAYER.search(key)) and not left_out


def lost_its_head(model) -> bool:
    """Whether a loaded model has a language head of random numbers, because its checkpoint holds none."""
    return getattr(model, "head_is_random", False)


def transformers_knows(model_type: str) -> bool:
    """Whether the installed transformers has the classes of a config's model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds the words of a tokenizer. From a folder without them transformers 5 makes a tokenizer to
    which every text is the same."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return True
    names = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.txt")
    return any(file.is_file() for name in names for file in folder.glob(name))


def transformers_version() -> str:
    import transformers

    return transformers.__version__


def has_nf4() -> bool:
    """Whether bitsandbytes and accelerate are installed, which 4-bit weights need."""
    return all(find_spec(name) for name in ("bitsandbytes", "accelerate"))


def module_of(model, name: str):
    """A part of a model: below `.model` from 4.52 on, before that partly on the model itself."""
    inner = getattr(model, "model", model)
    return getattr(inner if hasattr(inner, name) else model, name)


def decoder_of(model) -> torch.nn.Module:
    """The text decoder without its head. Before 4.52 Qwen2.5-VL's was `.model`, LLaVA's below a causal LM."""
    inner = getattr(model, "model", model)
    text = getattr(inner, "text_model", None) or getattr(inner, "language_model", None) or inner
    return text if hasattr(text, "layers") else text.model


def image_token_of(config) -> int:
    """LLaVA's config called it an index before 4.51."""
    return config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index


def merged_tokens(output) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What Qwen's vision towers give: image tokens, and those of the deeper layers. A tensor or a pair in 4.x."""
    if isinstance(output, torch.Tensor):
        return output, []
    if isinstance(output, tuple):
        return output
    return output.pooler_output, getattr(output, "deepstack_features", None) or []


def embedding_of(output) -> torch.Tensor:
    """What CLIPModel's get_image_features and get_text_features give: a tensor in 4.x, an output from 5.0 on."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def hidden_states_of(output) -> torch.Tensor:
    """What a decoder layer returns: a tensor from 4.5x on, a tuple before."""
    return output[0] if isinstance(output, tuple) else output
