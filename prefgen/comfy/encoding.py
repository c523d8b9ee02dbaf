"""From pictures on the graph to an encoded history, with progress, interruption and caches."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.utils
import torch

from ..encoded import EncodedPreference
from ..history import HistoryItem, PreferenceHistory
from ..mllm.cache import LeastRecentlyUsed
from .memory import ManagedMLLM

CACHED_EMBEDS = 512
# CLIP vision model -> {picture digest: embedding}. It goes with its model.
_embeds: WeakKeyDictionary = WeakKeyDictionary()


def encode_history(history: PreferenceHistory, managed: ManagedMLLM, clip_vision=None) -> EncodedPreference:
    """Read a history with the MLLM and, if there is one, with CLIP vision. Shows ComfyUI's progress bar and stops at
    its interrupt; what was read before is never read again."""
    interrupt = comfy.model_management.throw_exception_if_processing_interrupted
    steps = len(history) + 1
    bar = comfy.utils.ProgressBar(steps + (len(history) if clip_vision is not None else 0))
    interrupt()
    if managed.mllm.knows(history):
        hidden = managed.mllm.encode(history)
    else:
        with managed.on_device() as mllm:
            hidden = mllm.encode(history, progress=lambda done, _: bar.update_absolute(done), interrupt=interrupt)
    bar.update_absolute(steps)
    liked = disliked = None
    if clip_vision is not None:
        liked = image_embeds(clip_vision, history.liked, bar, interrupt)
        disliked = image_embeds(clip_vision, history.disliked, bar, interrupt) if history.disliked else None
    return EncodedPreference(
        hidden=hidden,
        image_embed_liked=liked,
        image_embed_disliked=disliked,
        mllm=managed.mllm.fingerprint,
        clip_vision={"width": liked.shape[1]} if liked is not None else {},
        n_liked=len(history.liked),
        n_disliked=len(history.disliked),
        digest=history.digest,
    )


def image_embeds(clip_vision, items: tuple[HistoryItem, ...], bar, interrupt) -> torch.Tensor:
    """CLIP image embeddings [n, I] fp32 on the CPU, each picture read once."""
    known = _embeds.setdefault(clip_vision.model, LeastRecentlyUsed(CACHED_EMBEDS))
    rows = []
    for item in items:
        interrupt()
        row = known[item.digest] if item.digest in known else None
        if row is None:
            row = clip_vision.encode_image(item.image[None])["image_embeds"][0].float().cpu()
            known[item.digest] = row
        rows.append(row)
        bar.update(1)
    return torch.stack(rows)
