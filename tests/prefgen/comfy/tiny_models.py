"""Tiny models that ComfyUI and diffusers share: UNets with the blocks of SD1.5 and SDXL, CLIP vision of real widths."""

import json

import comfy.clip_vision
import comfy.sample
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from tests.prefgen.tiny_unets import UNETS

CPU = torch.device("cpu")
# The same UNets in ComfyUI's words; everything else is what ComfyUI detects in a checkpoint of the family.
COMFY = {
    "in_channels": 4,
    "out_channels": 4,
    "image_size": 16,
    "model_channels": 32,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
COMFY = {
    "sd15": COMFY
    | {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2] * 4,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sdxl": COMFY
    | {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": [2] * 3,
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}
ENCODERS = {"CLIP ViT-L": (1024, 768), "CLIP ViT-H": (1280, 1024), "CLIP ViT-bigG": (1664, 1280)}


class Both:
    """The same UNet in diffusers (inside a pipeline, which reads IP-Adapter files) and in ComfyUI."""

    def __init__(self, family):
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        self.family = family
        self.unet = UNet2DConditionModel(**UNETS[family]).eval()
        text = CLIPTextModel(CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10))
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
        parts = (vae, text, None, self.unet, DDIMScheduler(clip_sample=False, steps_offset=1), None, None)
        self.pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)

        config = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](COMFY[family])
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}).eval()
        names = comfy.utils.unet_to_diffusers(COMFY[family])
        state = {names[key]: value for key, value in self.unet.state_dict().items()}
        model.diffusion_model.load_state_dict(state)
        self.patcher = ModelPatcher(model, CPU, CPU)
        self.x, self.states = torch.randn(2, 4, 16, 16), torch.randn(2, 7, UNETS[family]["cross_attention_dim"])
        self.pooled, self.ids = torch.randn(2, 1280), torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)
        self.t = 500

    def latents(self, model):
        """What a sampler makes of a patcher of this model in three steps, the same noise and prompts every time."""
        pooled = {"pooled_output": self.pooled[:1]} if self.family == "sdxl" else {}
        conds = [[[self.states[i : i + 1], dict(pooled)]] for i in range(2)]
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return comfy.sample.sample(
                model, noise, 3, 4.0, "euler", "normal", *conds, torch.zeros_like(noise), disable_pbar=True, seed=0
            )

    def ours(self, patched, rows=(0, 1)):
        """Two rows, the positive and the unconditional half, through ComfyUI."""
        model = patched.model
        sigma = model.model_sampling.sigmas[self.t].repeat(2)
        options = {"cond_or_uncond": list(rows), "sigmas": sigma, "wrappers": patched.wrappers}
        extra = {}
        if self.family == "sdxl":
            times = self.unet.add_time_proj(self.ids.flatten()).reshape(2, -1)
            extra["y"] = torch.cat([self.pooled, times], 1)
        with torch.no_grad():
            return model.apply_model(self.x, sigma, c_crossattn=self.states, transformer_options=options, **extra)

    def theirs(self, path, image_embeds, weight):
        """The same through diffusers' IP-Adapter; image_embeds [2, pictures, ...], None for the plain model."""
        sampling = self.patcher.model.model_sampling
        sigma = sampling.sigmas[self.t].repeat(2)
        added = {"text_embeds": self.pooled, "time_ids": self.ids} if self.family == "sdxl" else {}
        if image_embeds is not None:
            self.pipeline.load_ip_adapter(
                str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None
            )
            self.pipeline.set_ip_adapter_scale(weight)
            added["image_embeds"] = [image_embeds]
        scaled = sampling.calculate_input(sigma, self.x)
        try:
            with torch.no_grad():
                noise = self.unet(scaled, torch.tensor([self.t] * 2), self.states, added_cond_kwargs=added).sample
        finally:
            if image_embeds is not None:
                self.pipeline.unload_ip_adapter()
        return sampling.calculate_denoised(sigma, noise, self.x)


def clip_vision(name, folder, pixels=56):
    """(transformers' model, ComfyUI's) as wide as `name`, three layers deep, random weights; `pixels`: its side."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    hidden, projection = ENCODERS[name]
    config = CLIPVisionConfig(
        hidden_size=hidden,
        projection_dim=projection,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
        hidden_act="gelu",
    )
    torch.manual_seed(len(name))
    theirs = CLIPVisionModelWithProjection(config).eval()
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    ours = comfy.clip_vision.ClipVisionModel(str(path))
    ours.dtype = torch.float32  # ComfyUI would hold the weights at half precision
    ours.model.float()
    ours.load_sd(theirs.state_dict())
    return theirs, ours


def draw_weights(module, is_one) -> None:
    """Random weights for a module, which ComfyUI leaves as the memory was. is_one: a function of the name of a vector,
    whether it holds ones (the scale of a norm) or zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                value = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
            else:
                value = torch.full(parameter.shape, float(is_one(name)))
            parameter.copy_(value.to(parameter.dtype))
