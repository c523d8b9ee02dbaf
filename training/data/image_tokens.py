"""The atelier's MLLM before it learns to read histories, and the image tokens that its vision tower leaves.

`training.atelier.mllm_vision` trains the tower and reads the whole pool with it, once; the language model trains on
those tokens.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prefgen.atelier.models import mllm_config
from prefgen.files import read_text

from ..common.cache import digest_of
from .picture_pool import PicturePool

# Of no run: evaluation.vqa_score draws the same weights for the MLLM before training.
INIT_SEED = 7


def new_mllm():
    """SmolVLMForConditionalGeneration from the atelier's config, freshly initialised."""
    from transformers import SmolVLMForConditionalGeneration

    torch.manual_seed(INIT_SEED)
    return SmolVLMForConditionalGeneration(mllm_config())


def vision_parts(model) -> nn.ModuleDict:
    """Vision tower and connector: all that makes image tokens of a picture."""
    return nn.ModuleDict({"vision": model.model.vision_model, "connector": model.model.connector})


def vision_digest(model) -> str:
    """SHA-256 of what makes the image tokens, at the precision in which the MLLM's folder stores it."""
    return digest_of(*(copy.deepcopy(part).half() for part in vision_parts(model).values()))


def pool_image_tokens(runs: Path, pool: PicturePool, model=None) -> np.ndarray:
    """Image tokens [pictures, 4, 192] of the whole pool, as `atelier.mllm_vision` left them, memory-mapped.

    SystemExit where they are of another pool, or were read by another vision tower than the model's.
    """
    note = runs / "atelier.mllm_vision" / "tokens.json"
    recorded = json.loads(read_text(note)) if note.exists() else {}
    expected = {"pool": pool.digest} | ({} if model is None else {"eyes": vision_digest(model)})
    other = [name for name, digest in expected.items() if recorded.get(name) != digest]
    if other:
        raise SystemExit(
            f"The image tokens in {note.parent} were made with another {' and other '.join(other)}: delete that folder "
            "and run `python -m training.atelier.mllm_vision` again."
        )
    return np.load(note.with_name("tokens.npy"), mmap_mode="r")
