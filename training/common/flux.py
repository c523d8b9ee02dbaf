"""Flux.1 as a base: flow matching, T5 and CLIP for its text, and the user branch in its double blocks."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

from .base import Base, Text
from .sampling import NoiseSchedule

# Of T5's 512: padding is text as well, and a prompt's states take 2 MB in the cache.
T5_TOKENS = 256
# What Flux.1 dev is told in place of guidance, as diffusers' pipeline tells it by default.
GUIDANCE = 3.5
TIMESTEPS = 1000
# Of V at the start. Of zeros neither K nor what makes the tokens would have a gradient.
V_SCALE = 0.01
# Fewer steps look at high noise with a larger shift; the pipeline's own for 1024 px.
SHIFT = 3.16


class FlowSchedule(NoiseSchedule):
    """x_s = (1 - s) x_0 + s noise, and the model answers noise - x_0: rectified flow (arXiv 2403.03206).

    A timestep is a rank among TIMESTEPS noise levels s whose logit is normal, as that paper draws them (section 3.1):
    ranks drawn evenly look most at the middle.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        ranks = (torch.arange(TIMESTEPS, dtype=torch.float64) + 0.5) / TIMESTEPS
        self.levels = torch.special.ndtri(ranks).sigmoid().float().to(device)

    def __len__(self) -> int:
        return TIMESTEPS

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        level = self.levels[timesteps][:, None, None, None]
        return (1 - level) * latents + level * noise, noise - latents

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """Ones: a schema that asks for gamma here is refused."""
        return torch.ones_like(self.levels[timesteps])


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' own, with the one call more that guided sampling makes of every scheduler."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return sample


class FluxBase(Base):
    """As a Base; `unet` is its transformer. encoders: (tokenizer, CLIP text model), then (tokenizer, T5 encoder)."""

    # It was distilled to guide itself: true guidance would come on top.
    guidance = 1.0
    schedule: FlowSchedule

    def _schedule(self, scheduler, alphas: torch.Tensor | None) -> FlowSchedule:
        return FlowSchedule(self.device)

    @property
    def latent_channels(self) -> int:
        # A token is a square of four latent pixels.
        return self.unet.config.in_channels // 4

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Text:
        """fp32 on the base's device: T5's states and CLIP's pooled embedding."""
        with self.autocast():
            states, (pooled,) = self._encode(prompts)
        return Text(states.float(), pooled.float())

    def predict(self, noisy, timesteps, text: Text, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """The transformer's answer [B, c, h, w], fp32. timesteps: ranks of the schedule (whole numbers), or noise
        levels in 0..1000 as diffusers' schedulers have them (floats)."""
        assert text.pooled is not None
        height, width = noisy.shape[-2:]
        level = timesteps / TIMESTEPS if timesteps.is_floating_point() else self.schedule.levels[timesteps]
        guided = self.unet.config.guidance_embeds
        with self.autocast():
            out = self.unet(
                hidden_states=FluxPipeline._pack_latents(noisy.to(self.dtype), *noisy.shape),
                encoder_hidden_states=text.states.to(self.dtype),
                pooled_projections=text.pooled.to(self.dtype),
                timestep=level.to(self.device).expand(len(noisy)).to(self.dtype),
                img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, self.device, self.dtype),
                txt_ids=torch.zeros(text.states.shape[1], 3, device=self.device, dtype=self.dtype),
                guidance=torch.full((len(noisy),), GUIDANCE, device=self.device) if guided else None,
            ).sample
        squares = out.float().unflatten(1, (height // 2, width // 2)).unflatten(3, (noisy.shape[1], 2, 2))
        return squares.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return super()._encode_pixels(pixels) - self.vae.config.shift_factor * self.vae.config.scaling_factor

    def _encode(self, prompts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(T5's states [B, T, X], [CLIP's pooled embedding [B, P]])."""
        (clip_tokenizer, clip), *second = self.encoders
        pooled = clip(**self._tokens(clip_tokenizer, prompts, clip_tokenizer.model_max_length)).pooler_output
        ((t5_tokenizer, t5),) = second
        return t5(**self._tokens(t5_tokenizer, prompts, T5_TOKENS)).last_hidden_state, [pooled]

    def _tokens(self, tokenizer, prompts: list[str], length: int) -> dict[str, torch.Tensor]:
        # Without a mask, as Flux was trained: what pads a prompt is read as well.
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {"input_ids": tokens.input_ids.to(self.device)}


class FluxUserAttention(FluxIPAdapterAttnProcessor):
    """diffusers' own IP-Adapter attention of a double block, on K and V that are set before each call of the
    transformer: [B, N, width]. It returns the user's part beside picture and text, and the block adds it at its end."""

    def __init__(self):
        nn.Module.__init__(self)
        self.scale = [1.0]
        self.to_k_ip = [lambda _: self._side(0)]
        self.to_v_ip = [lambda _: self._side(1)]
        self.keys_values: tuple[torch.Tensor, torch.Tensor] | None = None
        self.plain = FluxAttnProcessor()

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ) -> tuple[torch.Tensor, ...]:
        if self.keys_values is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, ip_hidden_states=[None]
        )

    def _side(self, number: int) -> torch.Tensor:
        """K or V; under autocast the query is in half precision."""
        assert self.keys_values is not None
        side = self.keys_values[number]
        device = side.device.type
        return side.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else side


def install_flux(transformer) -> list[FluxUserAttention]:
    """Put the branch into every double block of a diffusers Flux transformer; returned in order."""
    double = [name for name in transformer.attn_processors if name.startswith("transformer_blocks.")]
    processors = {name: FluxAttnProcessor() for name in transformer.attn_processors}
    branch = {name: FluxUserAttention() for name in double}
    transformer.set_attn_processor(processors | branch)
    return list(branch.values())


def flux_projections(transformer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(to_k, to_v) weights [width, X] of every double block, where training starts: K and V as a block makes them of
    the text that enters the model, V a hundredth of it, since nothing scales it down on its way to the picture."""
    embed = _matrix(transformer.context_embedder)
    sides = [(block.attn.add_k_proj, block.attn.add_v_proj) for block in transformer.transformer_blocks]
    return [(_matrix(k) @ embed, V_SCALE * _matrix(v) @ embed) for k, v in sides]


@torch.no_grad()
def _matrix(linear: nn.Linear) -> torch.Tensor:
    """A biased layer's weights, fp32 [out, in], by what it makes of a unit matrix: in 4 bits they are packed."""
    unit = torch.eye(linear.in_features, device=linear.bias.device, dtype=linear.bias.dtype)
    return (linear(unit) - linear.bias).T.float()
