"""What travels between the nodes: an encoded history, and a user fused from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .adapter import UserAdapter
    from .ip_adapter import ImageAdapter


@dataclass(frozen=True)
class EncodedPreference:
    """A history as the encoders read it.

    hidden: H, [layers, D], last-token states of every decoder layer, or None without an MLLM.
    image_embed_liked, image_embed_disliked: CLIP image embeddings [n, I], or None.
    mllm: `PreferenceMLLM.fingerprint`, empty without one. clip_vision: {"width": I, "states_width": E} and what
    `image_encoder.described` tells of it, or empty.
    image_states_liked, image_states_disliked: CLIP vision's penultimate hidden states [n, T, E], or None;
    image_states_none [T, E]: those of an all-zero input, which adapters that read states take for no picture.
    """

    hidden: torch.Tensor | None
    image_embed_liked: torch.Tensor | None
    image_embed_disliked: torch.Tensor | None
    mllm: dict = field(default_factory=dict)
    clip_vision: dict = field(default_factory=dict)
    n_liked: int = 0
    n_disliked: int = 0
    digest: str = ""
    image_states_liked: torch.Tensor | None = None
    image_states_disliked: torch.Tensor | None = None
    image_states_none: torch.Tensor | None = None


@dataclass(frozen=True)
class FusedUser:
    """A user and the adapter whose branch it is for.

    vector: e_u [C + D + I]; for an IP-Adapter file k pictures side by side, embeddings [k, I] or states [k, T, E].
    no_user: what stands for no user, of the same shape; None is zeros. negative: `no_user` holds disliked pictures, and
    the unconditional half gets it in any case.
    """

    vector: torch.Tensor
    adapter: UserAdapter | ImageAdapter
    label: str = ""
    no_user: torch.Tensor | None = None
    negative: bool = False

    def keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V [2, N, width] of every block in file order, fp32 on the CPU: row 0 the user, row 1 no user."""
        no_user = torch.zeros_like(self.vector) if self.no_user is None else self.no_user
        return self.adapter.keys_values(torch.stack([self.vector, no_user]).detach().float().cpu())
