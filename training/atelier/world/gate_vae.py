"""Gate after VAE and judge A: whether what a picture shows survives the way through the latents.

    python -m training.atelier.world.gate_vae --runs runs/world

In: `vae.safetensors` and `judge_a.safetensors`. Out: `gate_vae.json` in the runs folder, with the VAE's PSNR and what
judge A reads off fresh renders after there and back. Ends with a sentence and status 1 below a bar: nothing that is
trained on such latents could show what they have lost.
"""

from __future__ import annotations

import json

import torch

from prefgen.atelier.models import load_vae_diffusers
from prefgen.atelier.world.judge import load_judge
from prefgen.files import write_atomic

from ...common.config.command import arguments
from ...common.config.world import WorldVae
from .judges import figures
from .vae import figures as vae_figures

PSNR = 30.0
ACCURACY = 0.98
R2 = 0.90


@torch.inference_mode()
def main() -> None:
    args = arguments(WorldVae, __doc__, "atelier.world.gate_vae")
    vae = load_vae_diffusers()

    def there_and_back(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([vae.decode(vae.encode(some).latent_dist.mean).sample for some in pictures.split(16)])

    count = args.section.heldout
    measured = {**vae_figures(vae, count), **figures(load_judge("a"), count, there_and_back)}
    write_atomic(args.runs / "gate_vae.json", json.dumps(measured, indent=1).encode())
    print(json.dumps(measured), flush=True)
    if missed := below_bars(measured):
        raise SystemExit(
            f"The VAE loses what pictures show: {'; '.join(missed)}. Train it longer, or with more channels."
        )


def below_bars(measured: dict) -> list[str]:
    """What doesn't reach its bar, in words."""
    missed = [f"PSNR {measured['psnr']:.1f} dB, not {PSNR:.0f}"] if measured["psnr"] < PSNR else []
    missed += [
        f"{name} {share:.3f}, not {ACCURACY}" for name, share in measured["accuracy"].items() if share < ACCURACY
    ]
    missed += [f"{name} R2 {share:.2f}, not {R2:.2f}" for name, share in measured["r2"].items() if share < R2]
    return missed


if __name__ == "__main__":
    main()
