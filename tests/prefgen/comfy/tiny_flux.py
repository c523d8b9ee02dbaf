"""A tiny Flux.1 in ComfyUI and in diffusers, with the same random weights, and the real sampler."""

import comfy.sample
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher

from tests.prefgen import flux_files
from tests.prefgen.comfy.tiny_models import CPU, draw_weights
from tests.prefgen.flux_files import TINY

HEADS = TINY.width // 128
AXES = (16, 56, 56)
POOLED = 32
TEXT_TOKENS = 5
SIZE = (8, 12)  # latent pixels; 4 x 6 tokens
COMMON = {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": TINY.text,
    "hidden_size": TINY.width,
    "mlp_ratio": 4.0,
    "num_heads": HEADS,
    "depth": TINY.doubles,
    "depth_single_blocks": TINY.singles,
    "axes_dim": list(AXES),
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
CONFIGS = {
    "Flux": COMMON | {"vec_in_dim": POOLED, "guidance_embed": True},
    "FluxSchnell": COMMON | {"vec_in_dim": POOLED, "guidance_embed": False},
    "Fill": COMMON | {"vec_in_dim": POOLED, "guidance_embed": True, "in_channels": 96},
    "Chroma": COMMON
    | {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": TINY.width, "hidden_dim": 32, "n_layers": 1},
}
# What newer ComfyUI asks for beside.
NEWER = {"txt_ids_dims": [], "vec_in_dim": POOLED}


def parameters(family):
    """Of a family's transformer, as this ComfyUI asks for them."""
    fields = (ChromaParams if family == "Chroma" else FluxParams).__dataclass_fields__
    return {name: value for name, value in NEWER.items() if name in fields} | CONFIGS[family]


def build(family="Flux", dtype=torch.float32, compute=torch.float32, operations=None, state=None, **shape):
    """ModelPatcher of a family, random weights or those of a state dict. dtype: of the weights, compute: of what is
    computed. operations: the layers' classes, in place of ComfyUI's own."""
    config_class = getattr(comfy.supported_models, "FluxInpaint" if family == "Fill" else family)
    config = config_class(parameters(family) | shape)
    config.set_inference_dtype(dtype, None if dtype == compute else compute)
    config.custom_operations = operations or config.custom_operations
    model = config.get_model({}).eval()
    if state is None:
        draw_weights(model.diffusion_model, lambda name: "norm" in name)
    else:
        model.diffusion_model.load_state_dict(state)
    return ModelPatcher(model, CPU, CPU)


def conditions(**extra):
    """(positive, negative) in ComfyUI's form."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(2, TEXT_TOKENS, TINY.text, generator=generator)
    pooled = {"pooled_output": torch.randn(1, POOLED, generator=generator)}
    return [[[states[i : i + 1], pooled | extra]] for i in range(2)]


def latents(model, batch=1, steps=2, cfg=3.0, conds=None, size=SIZE, **settings):
    """What KSampler makes of fixed conditions and noise."""
    noise = torch.randn(batch, 16, *size, generator=torch.Generator().manual_seed(0))
    start = torch.zeros_like(noise)
    settings = {"disable_pbar": True, "seed": 0} | settings
    with torch.no_grad():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", *(conds or conditions()), start, **settings
        )


def user_of(pack, folder, kind="xlabs-v1", seed=0):
    """A user of a random file of that kind, made in `folder`; no picture is a vector of its own."""
    adapter = pack("prefgen.adapter_file").load_adapter(flux_files.write(folder, kind, seed=seed))
    generator = torch.Generator().manual_seed(seed + 1)
    pictures = torch.randn(2, 1, adapter.header.image_width, generator=generator)
    return pack("prefgen.fusion").FusedUser(pictures[0], adapter, pictures[1])


class Seen:
    """Stands in a block's slot as another pack would, and keeps what the block gives."""

    def __init__(self):
        self.out = []

    def __call__(self, args, extra):
        out = extra["original_block"](args)
        self.out.append(out["img"].clone())
        return out


def seen_after_block_0(model, **settings):
    """(latents, what the first double block gave in the first step)."""
    model, seen = model.clone(), Seen()
    model.set_model_patch_replace(seen, "dit", "double_block", 0)
    return latents(model, steps=1, **settings), seen.out[0]


class BothFlux:
    """The same transformer in diffusers and in ComfyUI; two rows, the prompt's half and the unconditional one."""

    def __init__(self):
        from diffusers import FluxTransformer2DModel

        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=TINY.doubles,
            num_single_layers=TINY.singles,
            attention_head_dim=128,
            num_attention_heads=HEADS,
            joint_attention_dim=TINY.text,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
            axes_dims_rope=AXES,
        ).eval()
        self.patcher = build()
        state = dict(self.patcher.model.diffusion_model.state_dict())
        names = comfy.utils.flux_to_diffusers(CONFIGS["Flux"])
        for key, value in self.transformer.state_dict().items():
            target = names[key]
            if isinstance(target, str):
                state[target] = value
                continue
            if len(target) > 2:
                value = target[2](value)
            if target[1] is None:
                state[target[0]] = value
            else:
                dim, start, length = target[1]
                state[target[0]].narrow(dim, start, length).copy_(value)
        self.patcher.model.diffusion_model.load_state_dict(state)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(2, 16, *SIZE, generator=generator)
        self.states = torch.randn(2, TEXT_TOKENS, TINY.text, generator=generator)
        self.pooled = torch.randn(2, POOLED, generator=generator)
        self.sigma = torch.tensor([0.6, 0.6])

    def ours(self, patched, rows=(0, 1), **extra):
        options = {"cond_or_uncond": list(rows), "sigmas": self.sigma, "wrappers": patched.wrappers}
        with torch.no_grad():
            return patched.model.apply_model(
                self.x,
                self.sigma,
                c_crossattn=self.states,
                y=self.pooled,
                guidance=torch.full((2,), 3.5),
                transformer_options=options,
                **extra,
            )

    def theirs(self, weights=None, embeds=None, scale=1.0):
        """diffusers' own IP-Adapter. weights: of a file in diffusers' spelling. embeds: [2, 1, C]."""
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        if weights is None:
            return self.denoised()
        parts = {
            part: {key.removeprefix(part + "."): value for key, value in weights.items() if key.startswith(part)}
            for part in ("image_proj", "ip_adapter")
        }
        self.transformer._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
        for processor in self.transformer.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]
        try:
            return self.denoised(joint_attention_kwargs={"ip_adapter_image_embeds": [embeds]})
        finally:
            self.transformer.set_attn_processor(FluxAttnProcessor())

    def denoised(self, **kwargs):
        """What diffusers makes of the latents."""
        height, width = (side // 2 for side in SIZE)
        packed = self.x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)
        ids = torch.zeros(height, width, 3)
        ids[..., 1] += torch.arange(height)[:, None]
        ids[..., 2] += torch.arange(width)[None]
        with torch.no_grad():
            out = self.transformer(
                hidden_states=packed.flatten(3).flatten(1, 2),
                encoder_hidden_states=self.states,
                pooled_projections=self.pooled,
                timestep=self.sigma,
                img_ids=ids.flatten(0, 1),
                txt_ids=torch.zeros(TEXT_TOKENS, 3),
                guidance=torch.full((2,), 3.5),
                **kwargs,
            ).sample
        out = out.unflatten(1, (height, width)).unflatten(3, (16, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return self.x - out.flatten(4).flatten(2, 3) * self.sigma[:, None, None, None]
