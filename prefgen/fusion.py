"""Fusion (arXiv 2512.06020): e_u = [ĕ_sem ; e_core ; e_img], each part scaled by the artist.

For a public IP-Adapter file, which reads pictures alone, the user is what CLIP vision says of the liked ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from .adapter import FLUX, UserAdapter
from .encoded import EncodedPreference
from .ip_adapter import STATES, ImageAdapter
from .pooling import PUSH_AWAY, pool_image_embeds, pool_pictures


@dataclass(frozen=True)
class FusedUser:
    """A user and the adapter whose branch it is for.

    vector: e_u [C + D + I]; for an IP-Adapter file k pictures side by side, embeddings [k, I] or states [k, T, E].
    no_user: what stands for no user, of the same shape; None is zeros. negative: `no_user` holds disliked pictures, and
    the unconditional half gets it in any case. taste: what it was made of, such as sea@1a2b3c4d; "" where nobody said.
    """

    vector: torch.Tensor
    adapter: UserAdapter | ImageAdapter
    no_user: torch.Tensor | None = None
    negative: bool = False
    taste: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 of its numbers: the same adapter with the same digest paints the same user."""
        digest = hashlib.sha256(str(int(self.negative)).encode())
        for part in (self.vector, self.no_user):
            if part is not None:
                digest.update(str(tuple(part.shape)).encode())
                digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V [2, N, width] of every block in file order, fp32 on the CPU: row 0 the user, row 1 no user."""
        no_user = torch.zeros_like(self.vector) if self.no_user is None else self.no_user
        return self.adapter.keys_values(torch.stack([self.vector, no_user]).detach().float().cpu())


def fuse_user(
    adapter: UserAdapter | ImageAdapter,
    encoded: EncodedPreference,
    semantic: float = 1.0,
    core: float = 1.0,
    image: float = 1.0,
    pooling: str = PUSH_AWAY,
    push: float = 0.5,
) -> FusedUser:
    """The user of an encoded history that `check_encoded` has passed. `semantic` and `core` are for PrefGen adapters,
    `pooling` and `push` (see `pool_pictures`) for IP-Adapter files, `image` for both."""
    if isinstance(adapter, ImageAdapter):
        return _fuse_pictures(adapter, encoded, image, pooling, push)
    vector = fuse_user_vector(adapter, encoded, semantic, core, image)
    return FusedUser(vector, adapter, taste=encoded.taste)


@torch.no_grad()
def fuse_user_vector(
    adapter: UserAdapter, encoded: EncodedPreference, semantic: float = 1.0, core: float = 1.0, image: float = 1.0
) -> torch.Tensor:
    """e_u = [semantic * ĕ_sem ; core * e_core ; image * e_img], fp32 [C + D + I] on the CPU.

    Each part has length about 1 before its weight. A weight of 0, or a part that was not encoded, gives zeros: what
    training calls a dropped part. A part that the adapter wasn't trained with has no place in e_u, whatever its weight.
    """
    header = adapter.header
    semantic_part = torch.zeros(header.semantic_width)
    core_part = torch.zeros(header.core_width)
    image_part = torch.zeros(header.image_width)
    if encoded.hidden is not None and header.mllm:
        hidden = encoded.hidden.float()[None]
        if semantic and header.semantic_width:
            semantic_part = semantic * adapter.semantic(hidden)[0]
        if core and header.core_width:
            core_part = core * adapter.core(hidden)[0]
    # The paper's e_img is one liked picture, here it is the mean of all that are liked, or for an adapter whose header
    # says so of the last few of them: docs/departures.md.
    if encoded.image_embed_liked is not None and image and header.image_width:
        examples = header.clip_vision.get("examples")
        liked = encoded.image_embed_liked if examples is None else encoded.image_embed_liked[-int(examples) :]
        image_part = image * pool_image_embeds(liked, encoded.image_embed_disliked)
    return torch.cat([semantic_part, core_part, image_part])


@torch.no_grad()
def _fuse_pictures(
    adapter: ImageAdapter, encoded: EncodedPreference, image: float, pooling: str, push: float
) -> FusedUser:
    """The user of an adapter that reads pictures alone. `image`: 0 is no picture, 1 the pictures, above overdoes them.

    The unconditional half gets what IP-Adapter trained as no picture, or with the pooling "negative" the disliked
    pictures, `push` of the way from there.
    """
    if adapter.reads == STATES:
        liked = encoded.image_states_liked
        disliked = encoded.image_states_disliked
        no_picture = encoded.image_states_none
    else:
        liked = encoded.image_embed_liked
        disliked = encoded.image_embed_disliked
        no_picture = None if liked is None else torch.zeros(liked.shape[1:])
        if adapter.header.base_family == FLUX:
            no_picture = encoded.image_embed_none
    # `check_encoded` has seen to both.
    assert liked is not None and no_picture is not None
    no_picture = no_picture.float()
    user, negative = pool_pictures(liked, disliked, pooling, push)
    if image != 1:
        user = torch.lerp(no_picture.expand_as(user), user, image)
    no_user = no_picture if negative is None else torch.lerp(no_picture.expand_as(negative), negative, push)
    return FusedUser(user, adapter, no_user.expand_as(user), negative is not None, encoded.taste)
