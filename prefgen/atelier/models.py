"""The atelier's small models: ordinary CLIP, VAE, UNet and MLLM architectures with configs of our own.

The configs are the arguments of the public classes (transformers `CLIPConfig`, `SmolVLMConfig`; diffusers
`AutoencoderKL`, `UNet2DConditionModel`). The weights lie beside it as safetensors and were made by `training/`; numbers
in which the two editions differ are in `editions`, and the weights folder says which one it holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .editions import READ_SIZE, Edition, edition_of

# Training and its tests point elsewhere, so that an unfinished run never touches the shipped files.
WEIGHTS = Path(os.environ.get("PREFGEN_ATELIER_WEIGHTS") or Path(__file__).parent / "weights")
CLIP_TOKENIZER = WEIGHTS / "clip_tokenizer"
MLLM_FOLDER = WEIGHTS / "mllm"

# Behind the name of a tensor that is stored as int8.
SCALE = ".int8_scale"

# Noise schedule of the UNet: SD1.5's betas with zero terminal SNR, because a palette fills the whole picture and a
# schedule that never reaches pure noise cannot move the mean colour (Lin et al., arXiv 2305.08891).
PREDICTION = "v_prediction"
BETA_START = 0.00085
BETA_END = 0.012
TRAIN_TIMESTEPS = 1000
ZERO_TERMINAL_SNR = True

CLIP_VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": READ_SIZE,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "projection_dim": 128,
}
CLIP_MEAN = CLIP_STD = (0.5, 0.5, 0.5)

# CLIP's tower once more: the MLLM's vision tower starts from its weights.
MLLM_VISION_CONFIG = {key: value for key, value in CLIP_VISION_CONFIG.items() if key != "projection_dim"}
MLLM_TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
}


def edition() -> Edition:
    """The edition whose weights there are."""
    return edition_of(WEIGHTS)


def clip_tokenizer():
    """transformers CLIPTokenizer over the atelier's own BPE vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(CLIP_TOKENIZER), model_max_length=edition().max_tokens)


def clip_config():
    """CLIPConfig whose vocabulary size and special ids come from the tokenizer's files."""
    from transformers import CLIPConfig

    tokenizer = clip_tokenizer()
    text = edition().clip_text | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(text_config=text, vision_config=CLIP_VISION_CONFIG, projection_dim=text["projection_dim"])


def mllm_tokenizer():
    """transformers tokenizer of the preference MLLM."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(MLLM_FOLDER))


def mllm_config():
    """SmolVLMConfig of the preference MLLM; special ids come from its tokenizer."""
    from transformers import SmolVLMConfig

    tokenizer = mllm_tokenizer()
    pad = tokenizer.pad_token_id
    text = MLLM_TEXT_CONFIG | {
        "vocab_size": len(tokenizer),
        "pad_token_id": pad,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<end_of_utterance>"),
        "tie_word_embeddings": True,
    }
    return SmolVLMConfig(
        text_config=text,
        vision_config=MLLM_VISION_CONFIG,
        scale_factor=edition().scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=pad,
        tie_word_embeddings=True,
    )


def load_weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of one shipped file ("clip", "vae", "unet", "judge") in fp32; FileNotFoundError if it is missing.

    A tensor that was stored as int8 (`as_int8`) is decoded.
    """
    from safetensors.torch import load_file

    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"The atelier's {name} weights are missing ({path.name}): run `make train-atelier`.")
    stored = load_file(str(path))
    weights = {key: value.float() for key, value in stored.items() if not key.endswith(SCALE)}
    for key in weights:
        if stored[key].dtype == torch.int8:
            weights[key] *= stored[key + SCALE].float().reshape(-1, *[1] * (weights[key].ndim - 1))
    return weights


def as_int8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with every matrix and kernel as int8 and one fp16 scale an output channel (`NAME.int8_scale`).

    Vectors are biases and norms, few and sensitive: they stay as they are.
    """
    stored = {}
    for key, value in weights.items():
        if value.ndim < 2:
            stored[key] = value
            continue
        rows = value.float().flatten(1)
        # Rounded to fp16 before it divides, so that decoding multiplies by the same number. Channels whose largest
        # weight is below 0.008 get the smallest scale that fp16 has in full, and fewer steps.
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float16).tiny).half()
        stored[key] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(value.shape)
        stored[key + SCALE] = scale
    return stored


def load_clip(random: bool = False):
    """transformers CLIPModel in eval mode, fp32."""
    from transformers import CLIPModel

    model = CLIPModel(clip_config())
    if not random:
        model.load_state_dict(load_weights("clip"), strict=False)
    return model.eval()


def load_vae_diffusers(random: bool = False):
    """diffusers AutoencoderKL in eval mode, fp32. Pictures in -1..1; latents are scaled to unit variance by
    `config.scaling_factor`."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**edition().vae, scaling_factor=vae_scaling_factor())
    if not random:
        model.load_state_dict(load_weights("vae"))
    return model.eval()


def vae_scaling_factor() -> float:
    """1 / std of the latents over the training pictures, kept in the VAE file's header; 1.0 before it exists, and where
    the VAE was folded to give unit variance."""
    from safetensors import safe_open

    path = WEIGHTS / "vae.safetensors"
    if not path.exists():
        return 1.0
    with safe_open(str(path), "pt") as file:
        return float((file.metadata() or {}).get("scaling_factor", 1.0))


def load_unet_diffusers(random: bool = False):
    """diffusers UNet2DConditionModel in eval mode, fp32, v-prediction."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**edition().unet)
    if not random:
        model.load_state_dict(load_weights("unet"))
    return model.eval()


def alphas_cumprod() -> torch.Tensor:
    """The UNet's cumulative alphas, float64 [1000]: scaled-linear betas rescaled to zero terminal SNR.

    The last entry is ComfyUI's stand-in for zero, so that its sigma stays finite in both worlds.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    cumulative = torch.cumprod(1 - betas, 0)
    if not ZERO_TERMINAL_SNR:
        return cumulative
    root = cumulative.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = root**2
    rescaled[-1] = 4.8973451890853435e-08
    return rescaled
