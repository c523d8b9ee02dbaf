"""Fusion: the three parts of a user, scaled by the artist, in one vector, and its projection to user tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .clip import pool_image_embeds
from .encoded import EncodedPreference, FusedUser
from .ip_adapter import STATES, ImageAdapter
from .pooling import PUSH_AWAY, pool_pictures

if TYPE_CHECKING:
    from .adapter import UserAdapter


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


def fuse_user(
    adapter: UserAdapter | ImageAdapter,
    encoded: EncodedPreference,
    semantic: float = 1.0,
    core: float = 1.0,
    image: float = 1.0,
    pooling: str = PUSH_AWAY,
    push: float = 0.5,
    label: str = "",
) -> FusedUser:
    """The user of an encoded history that `check_encoded` has passed. `semantic` and `core` are for PrefGen adapters,
    `pooling` and `push` (see `pool_pictures`) for IP-Adapter files, `image` for both."""
    if isinstance(adapter, ImageAdapter):
        return fuse_pictures(adapter, encoded, image, pooling, push, label)
    return FusedUser(fuse_user_vector(adapter, encoded, semantic, core, image), adapter, label)


@torch.no_grad()
def fuse_pictures(
    adapter: ImageAdapter,
    encoded: EncodedPreference,
    image: float = 1.0,
    pooling: str = PUSH_AWAY,
    push: float = 0.5,
    label: str = "",
) -> FusedUser:
    """The user of an adapter that reads pictures alone. `image`: 0 is no picture, 1 the pictures, above overdoes them.

    The unconditional half gets what IP-Adapter trained as no picture, or with the pooling "negative" the disliked
    pictures, `push` of the way from there.
    """
    if adapter.reads == STATES:
        liked, disliked, nothing = encoded.image_states_liked, encoded.image_states_disliked, encoded.image_states_none
        nothing = nothing.float()
    else:
        liked, disliked = encoded.image_embed_liked, encoded.image_embed_disliked
        nothing = torch.zeros(liked.shape[1:])
    user, negative = pool_pictures(liked, disliked, pooling, push)
    if image != 1:
        user = torch.lerp(nothing.expand_as(user), user, image)
    no_user = nothing if negative is None else torch.lerp(nothing.expand_as(negative), negative, push)
    return FusedUser(user, adapter, label, no_user.expand_as(user), negative is not None)


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
