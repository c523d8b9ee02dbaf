"""The noise that a diffusion UNet is trained on, and guided sampling with diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler

from prefgen.atelier.models import BETA_END, BETA_START, PREDICTION, TRAIN_TIMESTEPS, ZERO_TERMINAL_SNR


class NoiseSchedule:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise: DDPM's forward process (arXiv 2006.11239, eq. 4).

    alphas: a [timesteps], the cumulative product. prediction: what the UNet answers with, "epsilon" (the noise) or
    "v_prediction" (sqrt(a_t) noise - sqrt(1 - a_t) x_0; arXiv 2202.00512, appendix D). device: where latents are.
    """

    def __init__(self, alphas: torch.Tensor, prediction: str, device: torch.device | str = "cpu"):
        self.alphas = alphas.cpu()
        self.prediction = prediction
        # Roots are taken in the schedule's own precision, which may be fp64, and moved as fp32: MPS takes no other.
        # diffusers' add_noise rounds the alphas to the latents' precision first, which costs 1 - a its last digits.
        self.signal_scale = self.alphas.sqrt().float().to(device)
        self.noise_scale = (1 - self.alphas).sqrt().float().to(device)
        alphas32 = self.alphas.float()
        self.snr = (alphas32 / (1 - alphas32)).to(device)

    def __len__(self) -> int:
        return len(self.alphas)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(noisy latents, what the UNet should predict), both [B, c, h, w]. timesteps: int64 [B]."""
        signal_scale = self.signal_scale[timesteps][:, None, None, None]
        noise_scale = self.noise_scale[timesteps][:, None, None, None]
        noisy = signal_scale * latents + noise_scale * noise
        target = noise if self.prediction == "epsilon" else signal_scale * noise - noise_scale * latents
        return noisy, target

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """Weight [B] of each sample's loss: min(SNR, gamma) in terms of x_0 (Hang et al., arXiv 2303.09556), ones
        without gamma.

        An error in the noise is an error of 1 / SNR in x_0, one in v of 1 / (SNR + 1): hence the divisors.
        """
        snr = self.snr[timesteps]
        if gamma is None:
            return torch.ones_like(snr)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)


@torch.no_grad()
def guided_sample(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    scheduler,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Latents [B, c, h, w] from `noise` of that shape, by classifier-free guidance (arXiv 2207.12598).

    predict: (noisy [2B, c, h, w], timestep) -> the UNet's answer of that shape; the unconditional half comes first.
    """
    scheduler.set_timesteps(steps)
    latents = noise
    for timestep in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
        unconditional, conditional = predict(both, timestep).chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


def seeded_noise(shape: tuple[int, ...], seeds: Sequence[int]) -> torch.Tensor:
    """Standard normal noise [len(seeds), *shape]: a picture's depends on its own seed, not on its neighbours."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


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
    states = torch.cat([unconditional.expand_as(condition), condition])
    size = unet.config.sample_size
    seeds = [seed * 10_000 + first + i for i in range(len(condition))]
    noise = seeded_noise((unet.config.in_channels, size, size), seeds)

    def predict(noisy, timestep):
        return unet(noisy, timestep, states).sample.float()

    return guided_sample(predict, noise, atelier_scheduler(), steps, guidance)


def atelier_scheduler() -> DDIMScheduler:
    """DDIM on the atelier's schedule."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=PREDICTION,
        rescale_betas_zero_snr=ZERO_TERMINAL_SNR,
        # Zero terminal SNR only helps where sampling begins at the last timestep (arXiv 2305.08891, section 3.3).
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


@torch.inference_mode()
def decode(vae, latents: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Unit-variance latents -> pictures [B, 3, H, W] in -1..1."""
    # Flux' latents are shifted as well.
    scaled = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    return torch.cat([vae.decode(z).sample for z in scaled.split(batch)]).clamp(-1, 1)
