"""The second world's small models: configs of transformers' and diffusers' own classes, as in `prefgen.atelier.models`.

They take the place of the first world's when their weights are there. Pictures are 256 px; the VAE has all of them,
every encoder and judge reads them averaged to 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..models import CLIP_TEXT_CONFIG as FIRST_TEXT
from ..models import CLIP_TOKENIZER, CLIP_VISION_CONFIG, load_weights
from ..models import UNET_CONFIG as FIRST_UNET
from ..models import VAE_CONFIG as FIRST_VAE
from ..models import mllm_config as first_mllm_config
from .render import SIZE

READ_SIZE = 128
LATENT_SIZE = SIZE // 8
# A caption that says every trait has up to 57 tokens.
MAX_TOKENS = 64

MLLM_SCALE_FACTOR = 2  # 8 x 8 patches become 4 x 4 image tokens

CLIP_TEXT_CONFIG = FIRST_TEXT | {"max_position_embeddings": MAX_TOKENS}

VAE_CONFIG = FIRST_VAE | {"sample_size": SIZE}
UNET_CONFIG = FIRST_UNET | {"sample_size": LATENT_SIZE, "block_out_channels": (64, 128, 192)}


def as_read(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 256, 256] (or any multiple of 128) as encoders and judges see them: [B, 3, 128, 128]."""
    return F.interpolate(pictures, (READ_SIZE, READ_SIZE), mode="area")


def clip_tokenizer():
    """transformers CLIPTokenizer over the world's own BPE vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), model_max_length=MAX_TOKENS)


def clip_config():
    """CLIPConfig whose vocabulary size and special ids come from the tokenizer's files."""
    from transformers import CLIPConfig

    tokenizer = clip_tokenizer()
    text = CLIP_TEXT_CONFIG | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    width = CLIP_TEXT_CONFIG["projection_dim"]
    return CLIPConfig(text_config=text, vision_config=CLIP_VISION_CONFIG, projection_dim=width)


def load_clip():
    """transformers CLIPModel in eval mode, fp32."""
    from transformers import CLIPModel

    model = CLIPModel(clip_config())
    model.load_state_dict(load_weights("clip"), strict=False)
    return model.eval()


def load_vae():
    """diffusers AutoencoderKL in eval mode, fp32; its latents have unit variance as they are."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**VAE_CONFIG, scaling_factor=1.0)
    model.load_state_dict(load_weights("vae"))
    return model.eval()


def mllm_config():
    """SmolVLMConfig of the preference MLLM: 16 image tokens a picture, since angles and spacings have to be seen."""
    config = first_mllm_config()
    config.scale_factor = MLLM_SCALE_FACTOR
    return config
