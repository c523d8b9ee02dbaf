"""The one module that knows transformers' versions (4.50 to 5.x)."""

from __future__ import annotations

from pathlib import Path

import torch


def load_image_text_to_text(folder: Path, dtype: torch.dtype):
    """AutoModelForImageTextToText from a local folder: safetensors only, no remote code, eval mode.

    Raises ValueError for a checkpoint that lacks weights: transformers would go on with random ones.
    """
    import transformers
    from transformers import AutoModelForImageTextToText

    # The keyword moved in 4.56; the old one warns from then on.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype_name = "dtype" if version >= (4, 56) else "torch_dtype"
    model, loading = AutoModelForImageTextToText.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **{dtype_name: dtype},
    )
    # Histories are read without the language head.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("lm_head."))
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return model.eval()


def hidden_states_of(output) -> torch.Tensor:
    """What a decoder layer returns: a tensor from 4.5x on, a tuple before."""
    return output[0] if isinstance(output, tuple) else output
