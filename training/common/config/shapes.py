"""The models that a configuration names, as shapes: built on the meta device, nothing is loaded, no file is needed.

A folder's own config.json is read where it is there; else the published shape, found by the folder's name.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from prefgen.atelier import models as atelier
from prefgen.files import read_text

from .schema import Config

# The published configurations, as far as they differ from the library's defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
UNETS: dict[str, dict] = {"sd15": SD15, "sdxl": SDXL, "atelier": atelier.UNET_CONFIG}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
# Text encoders, pooled text embedding (what the alignment aims at), and embedding of the CLIP vision tower.
TEXT_ENCODERS = {"sd15": 123_060_480, "sdxl": 123_060_480 + 694_659_840}
TEXT_WIDTH = {"sd15": 768, "sdxl": 768 + 1280, "atelier": 128}
VISION_WIDTH = {"sd15": 1024, "sdxl": 1024, "atelier": 128}  # CLIP ViT-H
VISION_PARAMETERS = {"sd15": 632_076_800, "sdxl": 632_076_800, "atelier": 1_300_000}

SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
PERCEIVER = {
    "hidden_size": 4096,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
}
MLLMS = {
    "smolvlm2-2.2b": {
        "model_type": "smolvlm",
        "scale_factor": 3,
        "tie_word_embeddings": False,
        "vision_config": SIGLIP | {"image_size": 384},
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 49280,
        },
    },
    "idefics2-8b": {
        "model_type": "idefics2",
        "tie_word_embeddings": False,
        "vision_config": SIGLIP | {"image_size": 980},
        "perceiver_config": PERCEIVER,
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32003,
        },
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "patch_size": 14,
        },
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
    },
    "qwen3-vl-4b": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "num_heads": 16,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "deepstack_visual_indexes": [5, 11, 17],
            "num_position_embeddings": 2304,
        },
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    },
}


def unet(config: Config) -> torch.nn.Module:
    """The base's UNet2DConditionModel, frozen, on the meta device."""
    from diffusers import UNet2DConditionModel

    shape = UNETS[config.base.family]
    own = config.base.path and config.base.path / "unet" / "config.json"
    if own and own.exists():
        shape = {k: v for k, v in json.loads(read_text(own)).items() if not k.startswith("_")}
    with torch.device("meta"):
        return UNet2DConditionModel(**shape).requires_grad_(False)


def vae(config: Config) -> torch.nn.Module:
    """The base's AutoencoderKL, frozen, on the meta device."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        shape = atelier.VAE_CONFIG if config.base.family == "atelier" else VAE
        return AutoencoderKL(**shape).requires_grad_(False)


def mllm(config: Config) -> torch.nn.Module | None:
    """The MLLM as transformers builds it, on the meta device; None when neither folder nor name is known."""
    from transformers import AutoModelForImageTextToText

    shape = mllm_config(config.mllm.path)
    if shape is None:
        return None
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape)
    model.tie_weights()
    return model


def mllm_config(path: Path | None):
    """transformers' configuration of a folder, or of the published model with its name."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if path is None:
        return atelier.mllm_config()
    if (path / "config.json").exists():
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    shape = next((shape for name, shape in MLLMS.items() if path.name.lower().startswith(name)), None)
    return shape and CONFIG_MAPPING[shape["model_type"]](**{k: v for k, v in shape.items() if k != "model_type"})


def parameters(module: torch.nn.Module) -> int:
    """How many weights a module has."""
    return sum(parameter.numel() for parameter in module.parameters())
