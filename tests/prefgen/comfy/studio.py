"""A tiny UNet of any family as ComfyUI builds it, random users for it, and the real sampler."""

import comfy.sample
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

from tests.closeness import FAR, difference
from tests.prefgen.adapters import random_adapter
from tests.prefgen.comfy.tiny_models import COMFY, CPU, draw_weights

TOKENS = 7


def build(family="SD15", dtype=torch.float32, compute=None, model_type=None, **shape):
    """ModelPatcher of a family of comfy.supported_models, random weights. shape: changes to the tiny UNet's."""
    config = getattr(comfy.supported_models, family)(
        COMFY["sdxl" if "XL" in family or "SSD" in family else "sd15"] | shape
    )
    config.set_inference_dtype(dtype, compute)
    if model_type is not None:
        config.model_type = lambda *_: model_type
    model = config.get_model({}).eval()
    draw_weights(model.diffusion_model, lambda name: name.endswith("weight"))
    return ModelPatcher(model, CPU, CPU)


def users(pack, model, count=2, base_family="sd15"):
    """Users with random vectors, of one random adapter that fits the model."""
    blocks = [
        attention
        for _, attention in pack("prefgen.comfy.patcher").unet_blocks(model.get_model_object("diffusion_model"))
    ]
    part, text = 8, blocks[0].to_k.in_features
    widths = [attention.heads * attention.dim_head for attention in blocks]
    torch.manual_seed(3)
    adapter = random_adapter(
        widths, text, (part, part, part), aligner_hidden=512, package=pack, base_family=base_family
    )
    fused = pack("prefgen.fusion").FusedUser
    return [fused(torch.randn(3 * part) * 2, adapter) for _ in range(count)]


def conditions(model, **extra):
    """(positive, negative) in ComfyUI's form."""
    unet = model.get_model_object("diffusion_model")
    width = model.model.model_config.unet_config["context_dim"]
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(2, TOKENS, width, generator=generator)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)} if unet.num_classes is not None else {}
    return [[[states[i : i + 1], pooled | extra]] for i in range(2)]


def latents(model, batch=1, steps=2, cfg=4.0, conds=None, size=(16, 16), sampler="euler", **settings):
    """What KSampler makes of fixed conditions and noise."""
    noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(0))
    start = torch.zeros_like(noise)
    settings = {"disable_pbar": True, "seed": 0} | settings
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "normal", *(conds or conditions(model)), start, **settings
        )


def far(one, other, least=FAR):
    """Whether two latents differ somewhere by more than a share of the largest value."""
    return difference(one, other) > least
