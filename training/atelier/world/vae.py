"""Stage 2: the VAE (diffusers AutoencoderKL, 8x, 8 channels).

    python -m training.atelier.world.vae --runs runs/world

In: the pool's large pictures [B, 3, 256, 256]. Out: `vae.safetensors`, the averaged weights, whose latents
[B, 8, 32, 32] have mean 0 and variance 1 in every channel: ComfyUI scales all channels by one factor, so each channel's
own is folded into the convolutions beside the latents.

Four fifths of the steps see 64 px crops on the 8 px grid, the last fifth 128 px ones, so that group normalisation ends
on statistics near those that it will meet. Loss: L1, L1 of the worst tenth of the pixels (small ornaments), MSE, L1 of
finite differences (edges), a little KL, and at every other step scale equivariance: latents averaged to half the size
are decoded to the picture averaged to half the size (EQ-VAE, arXiv 2502.09509), which leaves a latent space whose
coarse half says what the picture's coarse half is.

The decoder sees latents with noise in them (l-DeTok, arXiv 2507.15856). A UNet's are never exact, and without noise the
details are hidden where no UNet reaches: 28 dB there and back became 21 with a fifth of the latents' deviation added.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from prefgen.atelier.editions import SECOND
from prefgen.atelier.models import WEIGHTS
from prefgen.atelier.world.render import render
from prefgen.atelier.world.scenes import random_scene

from ...common.config.command import arguments
from ...common.config.world import WorldVae
from ...common.files import save_weights
from ...common.optim import Ema, cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...common.sharpness import laplacian
from ...data.world_pool import WorldPool, as_tensor

HELDOUT_SEED = 900_002
CHANNELS = SECOND.vae["latent_channels"]
# Of the noise that it is measured with, in deviations of the latents.
ERROR = 0.2


def main() -> None:
    args = arguments(WorldVae, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    model = AutoencoderKL(**SECOND.vae)
    # Start almost without sampling noise: unit noise on an untrained code teaches the decoder to ignore it.
    torch.nn.init.constant_(model.quant_conv.bias[CHANNELS:], -6.0)
    optimiser = optimiser_of(section.optimiser, model, 1e-4)
    ema = Ema(model, 0.998)
    run.resume(model=model, optimiser=optimiser, ema=ema)
    shown = fresh_renders(0, 8)

    for step in run.steps(section.steps):
        first = step < section.steps * 4 // 5
        side = 64 if first else 128
        # Four crops have as many pixels as one of twice the side.
        batch = section.batch if first else section.batch // 4
        with run.timer("data"):
            chosen = np.sort(batch_indices(section.seed, step, batch, len(pool.large)))
            pictures = crops(as_tensor(pool.large[chosen]), side)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            decoded = model.decode(disturbed(posterior.sample(), section.noise)).sample.float()
        parts = reconstruction(decoded, pictures)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = sum(parts.values()) + section.kl * kl
        if section.equivariance and step % 2:
            with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
                coarse = model.decode(F.avg_pool2d(posterior.mean, 2)).sample.float()
            equivariance = F.l1_loss(coarse, F.avg_pool2d(pictures, 2))
            loss = loss + section.equivariance * equivariance
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr))
        ema.update(step)
        run.log(**parts, kl=kl, grad_norm=norm)
        if step % 1000 == 999:
            show(model, shown, run)

    model.load_state_dict(ema.shadow)
    model.eval()
    fold_scale(model, *channel_statistics(model, as_tensor(pool.large[:: max(1, len(pool.large) // 256)])))
    show(model, shown, run)
    save_weights(model.state_dict(), WEIGHTS / "vae.safetensors", {"scaling_factor": "1.0"})
    run.finish(**figures(model, section.heldout))


def disturbed(latents: torch.Tensor, most: float) -> torch.Tensor:
    """Latents [B, c, h, w] with white noise of 0 to `most` standard deviations of their channel, another strength for
    every picture."""
    deviation = latents.detach().float().std((0, 2, 3), keepdim=True)
    strength = torch.rand(len(latents), 1, 1, 1) * most
    return latents + strength * deviation * torch.randn_like(deviation.expand_as(latents))


def crops(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """One crop of `side` px a picture, its corner on the 8 px grid."""
    places = torch.randint(0, (pictures.shape[-1] - side) // 8 + 1, (len(pictures), 2)) * 8
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(pictures, places.tolist(), strict=True)])


def reconstruction(decoded: torch.Tensor, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weighted parts of the loss between two batches [B, 3, H, W]."""
    difference = decoded - pictures
    errors = difference.abs().mean(1).flatten(1)
    across = difference[..., 1:] - difference[..., :-1]
    down = difference[..., 1:, :] - difference[..., :-1, :]
    return {
        "l1": difference.abs().mean(),
        # A mean over all pixels hardly notices a lost star: without this term the first world's judge saw the ornament
        # in 46 % of reconstructed renders (docs/evidence/notes.md).
        "worst": 0.3 * errors.topk(errors.shape[1] // 10, 1).values.mean(),
        "mse": 4 * difference.square().mean(),
        "edges": 0.5 * (across.abs().mean() + down.abs().mean()),
    }


@torch.inference_mode()
def channel_statistics(model: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [8], standard deviation [8]) of the latents of pictures [n, 3, 256, 256]."""
    latents = torch.cat([model.encode(some).latent_dist.mean for some in pictures.split(16)])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.no_grad()
def fold_scale(model: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Give the latents mean 0 and variance 1 in every channel, and the decoder what it had: in place."""
    encoder = model.quant_conv
    encoder.weight[:CHANNELS] /= std[:, None, None, None]
    encoder.bias[:CHANNELS] = (encoder.bias[:CHANNELS] - mean) / std
    encoder.bias[CHANNELS:] -= 2 * std.log()
    decoder = model.post_quant_conv
    decoder.bias += (decoder.weight * mean[None, :, None, None]).sum((1, 2, 3))
    decoder.weight *= std[None, :, None, None]


def fresh_renders(first: int, count: int) -> torch.Tensor:
    """Renders outside the pool: [count, 3, 256, 256] in -1..1."""
    scenes = [random_scene(np.random.default_rng([HELDOUT_SEED, i])) for i in range(first, first + count)]
    return as_tensor(np.stack([render(scene) for scene in scenes]))


@torch.inference_mode()
def show(model: AutoencoderKL, pictures: torch.Tensor, run: Run) -> None:
    model.eval()
    decoded = model.decode(model.encode(pictures).latent_dist.mean).sample
    run.pictures("decoded", torch.cat([pictures, decoded]))
    model.train()


@torch.inference_mode()
def figures(model: AutoencoderKL, count: int) -> dict:
    """PSNR (dB, of the mean square over all fresh renders' pixels), the same with noise of ERROR deviations in the
    latents, how crisp pictures stay (ratio of mean absolute Laplacians), and the share of the latents' power above half
    of Nyquist's frequency."""
    generator = torch.Generator().manual_seed(0)
    squares = []
    noisy_squares = []
    sharpness = []
    powers = []
    for start in range(0, count, 16):
        pictures = fresh_renders(start, min(16, count - start))
        latents = model.encode(pictures).latent_dist.mean
        decoded = model.decode(latents).sample.clamp(-1, 1)
        squares.append((decoded - pictures).square().mean((1, 2, 3)))
        # Exported latents have variance 1 in every channel.
        noisy = latents + ERROR * torch.randn(latents.shape, generator=generator)
        noisy_squares.append((model.decode(noisy).sample.clamp(-1, 1) - pictures).square().mean((1, 2, 3)))
        sharpness.append(torch.stack([laplacian(decoded), laplacian(pictures)], 1))
        powers.append(high_power(latents))
    ratio = torch.cat(sharpness).mean(0)
    return {
        "psnr": decibels(squares),
        "psnr_noisy": decibels(noisy_squares),
        "sharpness": (ratio[0] / ratio[1]).item(),
        "high_power": torch.cat(powers).mean().item(),
        "renders": count,
    }


def decibels(squares: list[torch.Tensor]) -> float:
    """PSNR of pictures' mean squared errors, [n] each. Pictures span 2, from -1 to 1."""
    return (10 * torch.log10(4 / torch.cat(squares).mean())).item()


def high_power(latents: torch.Tensor) -> torch.Tensor:
    """Share of the power of latents [B, c, h, w] above half of Nyquist's frequency, [B]."""
    power = torch.fft.fft2(latents - latents.mean((2, 3), keepdim=True)).abs().square()
    frequencies = torch.fft.fftfreq(latents.shape[-1]).abs()
    high = torch.maximum(frequencies[:, None], frequencies[None, :]) > 0.25
    return power[..., high].sum((1, 2)) / power.sum((1, 2, 3))


if __name__ == "__main__":
    main()
