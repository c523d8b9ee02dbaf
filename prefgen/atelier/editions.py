"""The two editions of the atelier, and which one a weights folder holds.

The first paints 128 px; the second 256, of which every encoder and judge reads an average of 128 px. Both are of the
same public classes; an edition is the numbers in which they differ. A folder says by a note which one is in it; without
a note it is the first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MendableError
from ..files import read_text, write_atomic

NOTE = "edition.json"
# What CLIP, the MLLM's tower and every judge read, in pixels.
READ_SIZE = 128

CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "projection_dim": 128,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 8,
    # 32 groups of 32 channels would be instance norm, which forgets the colour of the whole picture.
    "norm_num_groups": 8,
}
UNET: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    # diffusers' historical name for the number of heads.
    "attention_head_dim": 4,
}


class EditionError(MendableError):
    """A weights folder whose note can't be read: one sentence."""


@dataclass(frozen=True)
class Edition:
    """The numbers of one edition. image_size: side of its pictures in pixels; max_tokens: of a prompt; scale_factor:
    so many patches a side of the MLLM's 8 x 8 become one image token; unet_widths, vae_widths: of their levels, fine
    to coarse."""

    name: str
    image_size: int
    max_tokens: int
    scale_factor: int
    unet_widths: tuple[int, ...]
    vae_widths: tuple[int, ...]

    @property
    def clip_text(self) -> dict[str, Any]:
        """Arguments of transformers' CLIPTextConfig, without the vocabulary's."""
        return CLIP_TEXT | {"max_position_embeddings": self.max_tokens}

    @property
    def vae(self) -> dict[str, Any]:
        """Arguments of diffusers' AutoencoderKL."""
        return VAE | {"sample_size": self.image_size, "block_out_channels": self.vae_widths}

    @property
    def unet(self) -> dict[str, Any]:
        """Arguments of diffusers' UNet2DConditionModel."""
        return UNET | {"sample_size": self.image_size // 8, "block_out_channels": self.unet_widths}


FIRST = Edition("first", 128, 48, 4, (64, 128, 128), (32, 32, 64, 64))
# A caption that says every trait has up to 57 tokens.
SECOND = Edition("second", 256, 64, 2, (64, 128, 192), (32, 32, 64, 64))
EDITIONS = {edition.name: edition for edition in (FIRST, SECOND)}


def edition_of(folder: Path) -> Edition:
    """The edition whose weights a folder holds. EditionError for a note that names none."""
    path = folder / NOTE
    if not path.exists():
        return FIRST
    try:
        return EDITIONS[json.loads(read_text(path))["edition"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EditionError(
            f"{path} names no edition of the atelier ({' or '.join(EDITIONS)}): delete it, and run the command that "
            "made the folder again."
        ) from error


def write_note(folder: Path, edition: Edition) -> None:
    """Say that a folder's weights are of an edition."""
    write_atomic(folder / NOTE, json.dumps({"edition": edition.name}).encode())
