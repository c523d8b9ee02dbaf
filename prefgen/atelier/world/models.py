"""The second world's small models: configs of transformers' and diffusers' own classes, as in `prefgen.atelier.models`.

They take the place of the first world's when their weights are there. Pictures are 256 px; the VAE has all of them,
every encoder and judge reads them averaged to 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..models import UNET_CONFIG as FIRST_UNET
from ..models import VAE_CONFIG as FIRST_VAE
from .render import SIZE

READ_SIZE = 128
LATENT_SIZE = SIZE // 8

VAE_CONFIG = FIRST_VAE | {"sample_size": SIZE}
UNET_CONFIG = FIRST_UNET | {"sample_size": LATENT_SIZE, "block_out_channels": (64, 128, 192)}


def as_read(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 256, 256] (or any multiple of 128) as encoders and judges see them: [B, 3, 128, 128]."""
    return F.interpolate(pictures, (READ_SIZE, READ_SIZE), mode="area")
