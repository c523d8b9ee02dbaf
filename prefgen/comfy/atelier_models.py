"""The atelier's weights in ComfyUI's own classes, so that every ComfyUI node works on them.

The files hold transformers and diffusers keys; here they are renamed into ComfyUI's layout, driven by the
configs of the edition whose weights there are. Everything runs in fp32: the models are tiny and the training compares
with it.
"""

from __future__ import annotations

import json
import os
import tempfile

import comfy.clip_model
import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

from ..atelier import models


def load_atelier() -> tuple:
    """(ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, ClipVisionModel) of the embedded atelier.

    Raises FileNotFoundError with one sentence when a weight file is missing.
    """
    clip = models.load_weights("clip")
    return load_unet(), build_clip(clip), build_vae(models.load_weights("vae")), build_clip_vision(clip)


def unet_config_from_diffusers(config: dict) -> dict:
    """The arguments of ComfyUI's UNetModel for those of diffusers' UNet2DConditionModel.

    Both list levels from fine to coarse; diffusers' `attention_head_dim` is the number of heads (its historical name).
    """
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    down = [int("CrossAttn" in kind) for kind in config["down_block_types"]]
    up = [int("CrossAttn" in kind) for kind in reversed(config["up_block_types"])]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "context_dim": config["cross_attention_dim"],
        "num_heads": config["attention_head_dim"],
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
    }


class AtelierModel(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders know of a model family; this one is never detected from a file."""

    prefgen_family = "atelier"  # by which Apply User Cross-Attention names it

    sampling_settings = {
        "beta_schedule": "linear",  # ComfyUI's "linear" is diffusers' "scaled_linear"
        "linear_start": models.BETA_START,
        "linear_end": models.BETA_END,
        "timesteps": models.TRAIN_TIMESTEPS,
        "zsnr": models.ZERO_TERMINAL_SNR,
    }
    unet_extra_config: dict[str, object] = {}
    memory_usage_factor = 1.0

    def __init__(self, unet_config: dict, scaling_factor: float):
        super().__init__(unet_config)
        self.latent_format.latent_channels = unet_config["in_channels"]
        self.latent_format.scale_factor = scaling_factor
        self.set_inference_dtype(torch.float32, None)

    def model_type(self, state_dict, prefix=""):
        kinds = comfy.model_base.ModelType
        return kinds.V_PREDICTION if models.PREDICTION == "v_prediction" else kinds.EPS

    def inpaint_model(self) -> bool:
        return False  # the base class takes more than four input channels for an inpainting model


def build_unet(state: dict[str, torch.Tensor], scaling_factor: float) -> comfy.model_patcher.ModelPatcher:
    """MODEL from diffusers UNet2DConditionModel weights; `scaling_factor` is the VAE's (latents of unit variance)."""
    trained = models.edition().unet
    config = unet_config_from_diffusers(trained)
    model = AtelierModel(config, scaling_factor).get_model(state)
    names = comfy.utils.unet_to_diffusers(config)
    model.diffusion_model.load_state_dict({names[key]: value for key, value in state.items()})
    set_norm_groups(model.diffusion_model, trained)
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # Newer ComfyUI asks the loader for a copy for every further card, and for one without its own paging of weights.
    patcher.cached_patcher_init = (load_unet, ())
    return patcher


def load_unet(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """MODEL of the embedded weights, read anew. disable_dynamic: ComfyUI asks every loader so; it never is, here."""
    return build_unet(models.load_weights("unet"), models.vae_scaling_factor())


def build_vae(state: dict[str, torch.Tensor]) -> comfy.sd.VAE:
    """VAE from diffusers AutoencoderKL weights."""
    config = models.edition().vae
    widths = config["block_out_channels"]
    network = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    parameters = {"params": {"ddconfig": network, "embed_dim": config["latent_channels"]}}
    vae = comfy.sd.VAE(sd=dict(state), config=parameters, dtype=torch.float32)
    vae.latent_channels = config["latent_channels"]
    set_norm_groups(vae.first_stage_model, config)
    return vae


def set_norm_groups(network: torch.nn.Module, config: dict) -> None:
    """ComfyUI's classes are built for 32 groups; the atelier's narrow layers were trained with fewer."""
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]


class _TextTransformer(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with a vocabulary and a projection of the config's size instead of OpenAI's."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        width = config["hidden_size"]
        placement = {"dtype": dtype, "device": device}
        self.set_input_embeddings(operations.Embedding(config["vocab_size"], width, **placement))
        self.text_projection = operations.Linear(width, config["projection_dim"], bias=False, **placement)


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device, dtype, model_options):
        tokenizer = models.clip_tokenizer()
        special = {"start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        edition = models.edition()
        config = edition.clip_text | {"vocab_size": len(tokenizer), "eos_token_id": special["end"]}
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=edition.max_tokens,
            textmodel_json_config=config,
            model_class=_TextTransformer,
            special_tokens=special,
            model_options=model_options,
        )


class AtelierClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device, dtype, model_options):
        super().__init__(device, dtype, model_options, clip_name="atelier", clip_model=_TextEncoder)


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        edition = models.edition()
        super().__init__(
            tokenizer_path=str(models.CLIP_TOKENIZER),
            max_length=edition.max_tokens,
            pad_token=models.clip_tokenizer().pad_token_id,
            embedding_directory=embedding_directory,
            embedding_size=edition.clip_text["hidden_size"],
            embedding_key="clip_atelier",
            tokenizer_data=tokenizer_data or {},
        )


class AtelierTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, clip_name="atelier", tokenizer=_Tokenizer)


def build_clip(state: dict[str, torch.Tensor]) -> comfy.sd.CLIP:
    """CLIP (text) from transformers CLIPModel weights."""
    target = comfy.supported_models_base.ClipTarget(AtelierTokenizer, AtelierClip)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": torch.float32},
    )
    clip.load_sd({key: value for key, value in state.items() if key.startswith("text_")})
    return clip


def build_clip_vision(state: dict[str, torch.Tensor]) -> comfy.clip_vision.ClipVisionModel:
    """CLIP_VISION from transformers CLIPModel weights."""
    config = models.CLIP_VISION_CONFIG | {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "image_mean": list(models.CLIP_MEAN),
        "image_std": list(models.CLIP_STD),
    }
    with tempfile.TemporaryDirectory() as folder:  # ComfyUI's class reads its config from a file
        path = os.path.join(folder, "config.json")
        with open(path, "w") as file:
            json.dump(config, file)
        clip_vision = comfy.clip_vision.ClipVisionModel(path)
    clip_vision.dtype = torch.float32
    clip_vision.model.float()
    clip_vision.load_sd({key: value for key, value in state.items() if key.startswith("vis")})
    return clip_vision
