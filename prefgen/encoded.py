"""What travels between the nodes: an encoded history, and a user fused from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .adapter import UserAdapter


@dataclass(frozen=True)
class EncodedPreference:
    """A history as the encoders read it.

    hidden: H, [layers, D], last-token states of every decoder layer, or None without an MLLM.
    image_embed_liked, image_embed_disliked: CLIP image embeddings [n, I], or None.
    mllm: `PreferenceMLLM.fingerprint`, empty without one. clip_vision: {"width": I} or empty.
    """

    hidden: torch.Tensor | None
    image_embed_liked: torch.Tensor | None
    image_embed_disliked: torch.Tensor | None
    mllm: dict = field(default_factory=dict)
    clip_vision: dict = field(default_factory=dict)
    n_liked: int = 0
    n_disliked: int = 0
    digest: str = ""


@dataclass(frozen=True)
class FusedUser:
    """A user vector e_u [C + D + I] and the adapter whose branch it is for. No user is the vector of zeros."""

    vector: torch.Tensor
    adapter: UserAdapter
    label: str = ""
