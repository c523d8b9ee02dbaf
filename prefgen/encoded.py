"""An encoded history: what travels from Encode Preference History to Fuse User Vector."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class EncodedPreference:
    """A history as the encoders read it. All tensors fp32 on the CPU.

    hidden: H, [layers, D], last-token states of every decoder layer, or None without an MLLM.
    image_embed_liked, image_embed_disliked: CLIP image embeddings [n, I], or None.
    mllm: `PreferenceMLLM.fingerprint`, empty without one. clip_vision: {"width": I, "states_width": E}, what
    `image_encoder.described` tells of it, and its embedding of `fixed_picture`, or empty.
    digest: of the history (`PreferenceHistory.digest`).
    image_states_liked, image_states_disliked: CLIP vision's penultimate hidden states [n, T, E], or None;
    image_states_none [T, E]: those of an all-zero input, which adapters that read states take for no picture.
    image_embed_none [I]: the embedding of a black picture, which adapters for Flux take for no picture; None of an
    encoder that none of them reads.
    taste: the name of what was read, such as sea@1a2b3c4d; "" for pictures that nobody named.
    """

    hidden: torch.Tensor | None
    image_embed_liked: torch.Tensor | None
    image_embed_disliked: torch.Tensor | None
    mllm: dict = field(default_factory=dict)
    clip_vision: dict = field(default_factory=dict)
    digest: str = ""
    image_states_liked: torch.Tensor | None = None
    image_states_disliked: torch.Tensor | None = None
    image_states_none: torch.Tensor | None = None
    image_embed_none: torch.Tensor | None = None
    taste: str = ""
