"""The models that read a history, for Apply Taste: each loaded when it is needed, and the last of each kept.

The loader nodes' models live as long as ComfyUI's cache holds their output. One node in place of them has to keep them
itself, or a picture more would cost loading the MLLM and reading all pictures anew.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import comfy.clip_vision

from ..atelier import models
from ..files import file_state, safetensors_header
from ..lru import LeastRecentlyUsed
from ..mllm.files import weights_digest
from ..mllm.lora import lora_digest
from . import folders, memory
from .atelier_models import build_clip_vision

_mllms: LeastRecentlyUsed = LeastRecentlyUsed(1)
_clip_visions: LeastRecentlyUsed = LeastRecentlyUsed(1)


class EncoderWidths(NamedTuple):
    """Of a CLIP vision model: its embedding and its hidden states."""

    embedding: int
    states: int


def mllm_key(name: str, lora: str) -> tuple:
    """Changes with every file of the MLLM and its LoRA."""
    return (name, lora, folders.mllm_fingerprint(name, lora))


def load_mllm(name: str, lora: str) -> memory.ManagedMLLM:
    """An MLLM as Load Preference MLLM loads it with precision and device on auto."""
    key = mllm_key(name, lora)
    if key not in _mllms:
        # Before the next one is loaded: two may not fit.
        _mllms.clear()
        loaded = memory.load_mllm(folders.mllm_path(name), "auto", "auto", folders.mllm_lora_path(lora))
        _mllms[key] = loaded
    return _mllms[key]


def clip_vision_key(name: str) -> tuple:
    """Changes when the file does."""
    path = folders.clip_vision_path(name)
    return (name, file_state(path) if path else None)


def load_clip_vision(name: str):
    """A CLIP_VISION as Load CLIP Vision loads it, or the embedded one. Raises ValueError with one sentence."""
    key = clip_vision_key(name)
    if key not in _clip_visions:
        _clip_visions.clear()
        path = folders.clip_vision_path(name)
        if path is None:
            loaded = build_clip_vision(models.load_weights("clip"))
        else:
            loaded = comfy.clip_vision.load(str(path))
        if loaded is None:
            raise ValueError(
                f"{name} in models/clip_vision is no CLIP vision model: choose another one in Apply Taste."
            )
        _clip_visions[key] = loaded
    return _clip_visions[key]


def widths_of(name: str) -> EncoderWidths | None:
    """How wide a CLIP vision model's outputs are, by its file's header; None for another kind of image encoder."""
    path = folders.clip_vision_path(name)
    if path is None:
        config = models.CLIP_VISION_CONFIG
        return EncoderWidths(config["projection_dim"], config["hidden_size"])
    return _widths(path, file_state(path))


@lru_cache(256)
def _widths(path: Path, _state: tuple) -> EncoderWidths | None:
    try:
        header, _ = safetensors_header(path)
    except (OSError, ValueError):
        return None
    # transformers' name, [embedding, states], and OpenAI's, the other way round.
    for key, order in (("visual_projection.weight", 1), ("visual.proj", -1)):
        shape = header.get(key, {}).get("shape", ())
        if len(shape) == 2:
            return EncoderWidths(*shape[::order])
    return None


def trained_mllm(trained: dict) -> tuple[str, str] | None:
    """(MLLM, LoRA) whose files are those of an adapter's training, whatever they are called; None if they aren't here.
    trained: the header's `mllm`."""
    lora = _named(trained.get("lora"))
    if lora is None:
        return None
    for name, path in folders.mllms().items():
        try:
            digest = _revision(path, folders.mllm_fingerprint(name))
        except (OSError, ValueError):
            continue
        if digest == trained.get("revision"):
            return name, lora
    return None


def _named(digest: str | None) -> str | None:
    """The LoRA of a digest; "none" for no digest, None if it isn't here."""
    if not digest:
        return folders.NO_LORA
    for name, path in folders.mllm_loras().items():
        try:
            if path is not None and lora_digest(path) == digest:
                return name
        except OSError:
            continue
    return None


@lru_cache(256)
def _revision(path: Path, _fingerprint: str) -> str:
    return weights_digest(path)
