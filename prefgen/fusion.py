"""Fusion: the three parts of a user, scaled by the artist, in one vector, and its projection to user tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .clip import pool_image_embeds

if TYPE_CHECKING:
    from .adapter import UserAdapter
    from .encoded import EncodedPreference


class UserProjection(nn.Module):
    """User tokens = LayerNorm(MLP(e_u)): the layout that stock diffusers loads as an IP-Adapter FaceID projection.

    forward: [B, width] -> [B, tokens, cross_attention_dim]. hidden must be a multiple of width for diffusers.
    """

    def __init__(self, width: int, cross_attention_dim: int, tokens: int = 4, hidden: int | None = None):
        super().__init__()
        self.tokens, self.cross_attention_dim = tokens, cross_attention_dim
        hidden = hidden or 2 * width
        self.proj = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, tokens * cross_attention_dim))
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(vector).unflatten(-1, (self.tokens, self.cross_attention_dim)))


@torch.no_grad()
def fuse_user_vector(
    adapter: UserAdapter, encoded: EncodedPreference, semantic: float = 1.0, core: float = 1.0, image: float = 1.0
) -> torch.Tensor:
    """e_u = [semantic * ĕ_sem ; core * e_core ; image * e_img], fp32 [C + D + I] on the CPU.

    Each part has length about 1 before its weight. A weight of 0, or a part that was not encoded, gives zeros: what
    training calls a dropped part.
    """
    header = adapter.header
    parts = [torch.zeros(w) for w in (header.semantic_width, header.core_width, header.image_width)]
    if encoded.hidden is not None and header.mllm:
        hidden = encoded.hidden.float()[None]
        if semantic:
            parts[0] = semantic * adapter.semantic(hidden)[0]
        if core:
            parts[1] = core * adapter.core(hidden)[0]
    if encoded.image_embed_liked is not None and image:
        parts[2] = image * pool_image_embeds(encoded.image_embed_liked, encoded.image_embed_disliked)
    return torch.cat(parts)


def semantic_part(aligner: nn.Module, standardised: torch.Tensor) -> torch.Tensor:
    """ĕ_sem [B, C] of unit length from standardised top layers [B, layers, D]."""
    return F.normalize(aligner(standardised), dim=1)


def core_part(standardised: torch.Tensor) -> torch.Tensor:
    """e_core [B, D] of length about 1 from one standardised layer [B, 1, D]."""
    return standardised[:, 0] / standardised.shape[-1] ** 0.5
