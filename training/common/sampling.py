"""Sampling of latents while training, by diffusers' DDIM."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from prefgen.atelier.models import BETA_END, BETA_START, PREDICTION, TRAIN_TIMESTEPS, ZERO_TERMINAL_SNR


def atelier_scheduler() -> DDIMScheduler:
    """DDIM on the atelier's schedule."""
    return DDIMScheduler(
        TRAIN_TIMESTEPS,
        BETA_START,
        BETA_END,
        "scaled_linear",
        clip_sample=False,
        prediction_type=PREDICTION,
        rescale_betas_zero_snr=ZERO_TERMINAL_SNR,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


@torch.inference_mode()
def sample(
    unet,
    condition: torch.Tensor,
    unconditional: torch.Tensor,
    guidance: float = 3.0,
    steps: int = 20,
    seed: int = 0,
    first: int = 0,
) -> torch.Tensor:
    """Latents [B, channels, h, w] (scaled to unit variance) of the atelier for text states [B, T, X].

    unconditional: [1 or B, T, X]. The noise of picture i is that of (seed, first + i), whatever it is sampled with.
    """
    scheduler = atelier_scheduler()
    scheduler.set_timesteps(steps)
    size = unet.config.sample_size
    shape = (1, unet.config.in_channels, size, size)
    seeds = [seed * 10_000 + first + i for i in range(len(condition))]
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    states = torch.cat([unconditional.expand_as(condition), condition])
    for t in scheduler.timesteps:
        off, on = unet(torch.cat([latents, latents]), t, states).sample.float().chunk(2)
        latents = scheduler.step(off + guidance * (on - off), t, latents).prev_sample
    return latents


@torch.inference_mode()
def decode(vae, latents: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Unit-variance latents -> pictures [B, 3, H, W] in -1..1."""
    scaled = latents / vae.config.scaling_factor
    return torch.cat([vae.decode(z).sample for z in scaled.split(batch)]).clamp(-1, 1)
