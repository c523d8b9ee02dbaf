"""The adapter: everything between an encoded history and the UNet (arXiv 2512.06020).

From H, the MLLM's hidden states, it makes ĕ_sem and e_core; beside e_img they are the user vector e_u, which becomes
user tokens and then the keys and values of the user branch. How it lies in a file: adapter_file.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .aligner import LayerStandardiser, SemanticAligner
from .errors import AdapterError
from .files import file_sha256, file_state

# Goes up when an older PrefGen would misread the file; entries that it can pass over leave it as it is.
FORMAT_VERSION = 1
FLUX = "flux"
FAMILY_NAMES = {
    "atelier": "the atelier",
    "sd15": "SD1.5",
    "sd2": "SD2",
    "sdxl": "SDXL",
    "sdxl_refiner": "SDXL refiner",
    FLUX: "Flux.1",
}
# By the width of the text states, which is all that an IP-Adapter file says of its UNet.
FAMILY_OF_WIDTH = {768: "sd15", 1024: "sd2", 1280: "sdxl_refiner", 2048: "sdxl"}


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter was trained for.

    semantic_width, core_width, image_width: C, D and I; 0 for a part that wasn't trained, of which the file holds
    nothing. block_widths: attention width of every cross-attention in file order (down, up, mid).
    mllm: name, revision, lora, prompt_version, precision, num_layers, hidden_size, sem_layers (none without that part),
    core_layer (null without); None for an image-only adapter. clip_vision: name, width, preprocessing, what
    `image_encoder.described` tells and the encoder's embedding of `fixed_picture`, by which another one is known; for
    an IP-Adapter file also output, what it reads; empty for an adapter that reads no pictures by themselves; examples,
    of how many liked pictures e_img is, the last ones, where it isn't of all.
    kind: "prefgen", or "ip_adapter" for a public IP-Adapter file. tokens: 0 where the pictures decide. in_attention: of
    an adapter for Flux, whether it adds to a block's attention, before its output projection, or after the block.
    """

    format_version: int
    kind: str
    base_family: str
    semantic_width: int
    core_width: int
    image_width: int
    cross_attention_dim: int
    tokens: int
    block_widths: list[int]
    mllm: dict | None = None
    clip_vision: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    in_attention: bool = False

    @property
    def user_width(self) -> int:
        """C + D + I, the width of e_u."""
        return self.semantic_width + self.core_width + self.image_width

    @property
    def sem_layers(self) -> list[int]:
        """The layers of H that e_sem is. KeyError for an image-only adapter."""
        return (self.mllm or {})["sem_layers"]

    @property
    def core_layer(self) -> int:
        """The layer of H that e_core is. KeyError for an image-only adapter."""
        return (self.mllm or {})["core_layer"]


@dataclass(frozen=True)
class AdapterFile:
    """The file that an adapter was read from, as it was then."""

    path: Path
    state: tuple[int, ...]

    @classmethod
    def of(cls, path: str | os.PathLike) -> AdapterFile:
        """Raises OSError where there is none."""
        return cls(Path(path), file_state(path))

    @cached_property
    def digest(self) -> str:
        """sha256 of its bytes, read when asked for. Raises AdapterError if the file isn't the one that was read."""
        try:
            digest = file_sha256(self.path)
            unchanged = file_state(self.path) == self.state
        except OSError:
            unchanged = False
        if not unchanged:
            raise AdapterError(f"{self.path.name} has changed since it was read: queue again.")
        return digest


class UserProjection(nn.Module):
    """User tokens = LayerNorm(MLP(e_u)): the layout that stock diffusers loads as an IP-Adapter FaceID projection.

    forward: [B, width] -> [B, tokens, cross_attention_dim]. hidden must be a multiple of width for diffusers.
    """

    def __init__(self, width: int, cross_attention_dim: int, tokens: int = 4, hidden: int | None = None):
        super().__init__()
        self.tokens = tokens
        self.cross_attention_dim = cross_attention_dim
        # diffusers works the ratio of the two out of the shapes, as a whole number.
        hidden = hidden or 2 * width
        self.proj = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, tokens * cross_attention_dim))
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(vector).unflatten(-1, (self.tokens, self.cross_attention_dim)))


class EmbeddingProjection(nn.Module):
    """Tokens = LayerNorm(Linear(vector)), [B, width] -> [B, tokens, X]: of base IP-Adapter files and of Flux."""

    def __init__(self, width: int, cross_attention_dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(width, tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class UserAdapter(nn.Module):
    """The trained parts of one adapter file. `to_k_ip`, `to_v_ip`: projections of every block, file order, with biases
    for Flux alone.

    aligner, sem_norm: None without a semantic part; core_norm: None without a core part.
    """

    def __init__(
        self,
        header: AdapterHeader,
        projection: UserProjection | EmbeddingProjection,
        aligner: SemanticAligner | None,
        sem_norm: LayerStandardiser | None,
        core_norm: LayerStandardiser | None,
        name: str = "",
        file: AdapterFile | None = None,
    ):
        super().__init__()
        self.header = header
        self.name = name
        self.file = file
        self.projection = projection
        self.aligner = aligner
        self.sem_norm = sem_norm
        self.core_norm = core_norm
        # All keys before all values: the order in which their random weights are drawn.
        self.to_k_ip = _branch(header)
        self.to_v_ip = _branch(header)

    def parts(self) -> dict[str, nn.Module]:
        """Every module by the prefix of its keys in the file."""
        own = {"aligner": self.aligner, "sem_norm": self.sem_norm, "core_norm": self.core_norm}
        parts: dict[str, nn.Module] = {"image_proj.": self.projection}
        parts |= {f"prefgen.{name}.": module for name, module in own.items() if module is not None}
        for i, (k, v) in enumerate(zip(self.to_k_ip, self.to_v_ip, strict=True)):
            # IP-Adapter numbers all attentions of a UNet, and a cross-attention follows every self-attention: 1, 3, 5
            # ... In Flux every double block has one.
            number = i if self.header.base_family == FLUX else 2 * i + 1
            parts |= {f"ip_adapter.{number}.to_k_ip.": k, f"ip_adapter.{number}.to_v_ip.": v}
        return parts

    @property
    def digest(self) -> str:
        """sha256 of the file that it was read from, read when asked for; empty without one. Raises AdapterError if the
        file has changed since."""
        return self.file.digest if self.file else ""

    def semantic(self, hidden: torch.Tensor) -> torch.Tensor:
        """ĕ_sem [B, C] from H [B, layers, D]."""
        if self.aligner is None or self.sem_norm is None:
            return hidden.new_zeros(len(hidden), 0)
        return semantic_part(self.aligner, self.sem_norm(hidden[:, self.header.sem_layers]))

    def core(self, hidden: torch.Tensor) -> torch.Tensor:
        """e_core [B, D] from H [B, layers, D]."""
        if self.core_norm is None:
            return hidden.new_zeros(len(hidden), 0)
        return core_part(self.core_norm(hidden[:, [self.header.core_layer]]))

    def user_tokens(self, vector: torch.Tensor) -> torch.Tensor:
        """[B, C + D + I] -> [B, N, X]."""
        return self.projection(vector)

    def keys_values(self, vector: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(K [B, N, width], V [B, N, width]) of every block in file order, for user vectors [B, C + D + I]."""
        tokens = self.user_tokens(vector)
        return [(k(tokens), v(tokens)) for k, v in zip(self.to_k_ip, self.to_v_ip, strict=True)]


def _branch(header: AdapterHeader) -> nn.ModuleList:
    """One projection of the user tokens for every block."""
    bias = header.base_family == FLUX
    return nn.ModuleList(nn.Linear(header.cross_attention_dim, width, bias=bias) for width in header.block_widths)


def new_projection(header: AdapterHeader, hidden: int | None = None) -> UserProjection | EmbeddingProjection:
    """The module that makes user tokens of e_u, for an adapter of this header: what stock diffusers reads there."""
    if header.base_family == FLUX:
        return EmbeddingProjection(header.user_width, header.cross_attention_dim, header.tokens)
    return UserProjection(header.user_width, header.cross_attention_dim, header.tokens, hidden)


# PrefGen reads e_sem off the MLLM's top 4 layers, where likes, dislikes and style are, and e_core off middle to upper
# ones, where users can be told apart (arXiv 2512.06020). How it scales them isn't published: here both have a length
# of about 1, as e_img has.


def semantic_part(aligner: nn.Module, standardised: torch.Tensor) -> torch.Tensor:
    """ĕ_sem [B, C] of unit length from standardised top layers [B, layers, D]."""
    return F.normalize(aligner(standardised), dim=1)


def core_part(standardised: torch.Tensor) -> torch.Tensor:
    """e_core [B, D] of length about 1 from one standardised layer [B, 1, D]."""
    return standardised[:, 0] / standardised.shape[-1] ** 0.5
