"""Stage 2b: the VAE's decoder against a discriminator, beside the UNet, which needs the encoder alone.

    python -m training.atelier.world.vae_decoder --runs runs/world

In: `vae.safetensors` and the pool's large pictures. Out: the same file with another decoder. Where a picture's details
can't be told from its latents, least squares paint their mean, which is soft: after stage 2 pictures came back with
0.7 to 0.8 of their mean absolute Laplacian. Here the loss of stage 2 stands beside an adversarial one on patches, as in
latent diffusion's autoencoders (arXiv 2112.10752, with pix2pix's patches, arXiv 1611.07004, and the hinge loss with
spectral normalisation, arXiv 1802.05957). The latents are disturbed as in stage 2.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from prefgen.atelier.models import WEIGHTS, load_vae_diffusers

from ...common.config.command import arguments
from ...common.config.world import WorldVaeDecoder
from ...common.files import save_weights
from ...common.optim import Ema, cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...data.world_pool import WorldPool, as_tensor
from .vae import crops, disturbed, figures, fresh_renders, reconstruction, show

# Pixels of a crop's side, as in the last fifth of stage 2.
SIDE = 128


class Discriminator(nn.Sequential):
    """Pictures [B, 3, H, W] in -1..1 -> [B, 1, H / 4, W / 4]: how likely each patch of 22 px is a render's."""

    def __init__(self, width: int = 32):
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.Conv2d(width, 2 * width, 4, 2, 1)]
        layers += [nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.Conv2d(4 * width, 1, 3, 1, 1)]
        normed = [spectral_norm(layer) for layer in layers]
        between = [part for layer in normed[:-1] for part in (layer, nn.LeakyReLU(0.2))]
        super().__init__(*between, normed[-1])


def main() -> None:
    args = arguments(WorldVaeDecoder, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    model = load_vae_diffusers().train().requires_grad_(False)
    decoder = nn.ModuleList([model.decoder, model.post_quant_conv]).requires_grad_(True)
    discriminator = Discriminator()
    optimiser = optimiser_of(section.optimiser, decoder, 0.0)
    # GANs' usual moments: with a longer first one both sides overshoot each other (arXiv 1511.06434).
    adversary = torch.optim.AdamW(discriminator.parameters(), betas=(0.5, 0.99))
    ema = Ema(decoder, 0.998)
    run.resume(model=decoder, optimiser=optimiser, ema=ema, discriminator=discriminator, adversary=adversary)
    shown = fresh_renders(0, 8)

    for step in run.steps(section.steps):
        with run.timer("data"):
            chosen = np.sort(batch_indices(section.seed, step, section.batch, len(pool.large)))
            pictures = crops(as_tensor(pool.large[chosen]), SIDE)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = model.encode(pictures).latent_dist.mean
            decoded = model.decode(disturbed(latents, section.noise)).sample.float()
            # Its own gradients of this are dropped below.
            fooled = -discriminator(decoded).float().mean()
        parts = reconstruction(decoded, pictures)
        loss = sum(parts.values()) + section.adversarial * fooled
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr))
        hinge = discriminate(discriminator, adversary, pictures, decoded.detach(), section.adversary_lr)
        ema.update(step)
        run.log(**parts, fooled=fooled, discriminator=hinge, grad_norm=norm)
        if step % 1000 == 999:
            show(model, shown, run)

    decoder.load_state_dict(ema.shadow)
    model.eval()
    show(model, shown, run)
    save_weights(model.state_dict(), WEIGHTS / "vae.safetensors", {"scaling_factor": "1.0"})
    run.finish(**figures(model, section.heldout))


def discriminate(
    discriminator: Discriminator,
    optimiser: torch.optim.Optimizer,
    pictures: torch.Tensor,
    decoded: torch.Tensor,
    lr: float,
) -> torch.Tensor:
    """One step of the discriminator. Returns its hinge loss, 2 where it knows nothing."""
    optimiser.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        real, painted = discriminator(pictures), discriminator(decoded)
    loss = F.relu(1 - real.float()).mean() + F.relu(1 + painted.float()).mean()
    loss.backward()
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    return loss.detach()


if __name__ == "__main__":
    main()
