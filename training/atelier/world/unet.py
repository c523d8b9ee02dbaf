"""Stage 6: the text-conditioned UNet (diffusers UNet2DConditionModel, v-prediction), on cached latents.

    python -m training.atelier.world.unet --runs runs/world

In: latents of the pool [n, 8, 32, 32] and CLIP's states of captions [B, 64, 128], drawn anew at every step. Out:
`unet.safetensors` and `trait_tokens.safetensors`, the averaged weights; the UNet's matrices in 8 bits, if it paints the
same with them, before anything is trained on it.

Every third batch has two trait tokens (`training.data.trait_tokens`) behind its text: they say what has no words, for a
teacher that isn't words and for the ceiling of this UNet. Timesteps are shifted towards noise, since 32 x 32 cells keep
a picture's layout visible under more of it than 16 x 16 do (Hoogeboom et al., arXiv 2301.11093), and every fourth batch
has the last 30 % alone: fine detail is what the first world's UNet lost. Reports, on held-out prompts and read by judge
A, how often what was asked for is there.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from prefgen.atelier.editions import SECOND
from prefgen.atelier.models import (
    PREDICTION,
    WEIGHTS,
    alphas_cumprod,
    as_int8,
    clip_tokenizer,
    load_clip,
    load_weights,
)

from ...common.atelier_clip import text_features, tokenize
from ...common.config.command import arguments
from ...common.config.world import WorldUnet
from ...common.files import save_weights
from ...common.optim import Ema, cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...common.sampling import NoiseSchedule
from ...data.trait_tokens import TraitTokens, random_said
from ...data.world_pool import WorldPool, pool_latents, pool_scene
from .captions import random_caption
from .obedience import draw, heldout_requests, measure

# Share of captions without phrases.
NEUTRAL = 0.15
# By how much the logarithm of the signal-to-noise ratio is lowered, and the timesteps of the fine batches.
SHIFT = 2.0
FINE = 300
# What must be drawn when asked for after so many steps, or the night is better spent on another UNet.
GATE_STEP = 5000
GATE = {"shape": 0.55, "ornament": 0.8}
# Pictures painted with weights in 8 bits against those in 16, in dB.
INT8_PSNR = 40.0


def main() -> None:
    args = arguments(WorldUnet, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    pool_seed = args.config.atelier.world.pool.seed
    count = min(section.latents, pool.train_count)
    latents = pool_latents(args.runs, pool, pool_seed, count)
    clip = load_clip()
    tokenizer = clip_tokenizer()
    schedule = NoiseSchedule(alphas_cumprod(), PREDICTION)
    shifted = shifted_timesteps(schedule)
    unet = UNet2DConditionModel(**SECOND.unet)
    # The fused kernel's backward is slow on CPUs at these sizes; plain products are 1.7 times faster.
    unet.set_attn_processor(AttnProcessor())
    both = nn.ModuleDict({"unet": unet, "trait_tokens": TraitTokens(SECOND.unet["cross_attention_dim"])})
    optimiser = optimiser_of(section.optimiser, both, 0.01)
    ema = Ema(both, section.ema)
    run.resume(model=both, optimiser=optimiser, ema=ema)

    for step in run.steps(section.steps):
        chosen = batch_indices(section.seed, step, section.batch, count)
        rng = np.random.default_rng([section.seed, step])
        with run.timer("data"):
            scenes = [pool_scene(pool_seed, i) for i in chosen]
            texts = [
                "" if rng.random() < section.empty else random_caption(scene, rng, NEUTRAL).text for scene in scenes
            ]
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                states = text_features(clip, tokenize(tokenizer, texts))[0].float()
            timesteps = random_timesteps(shifted, section.batch, fine=step % section.fine_batches == 0)
            clean = latents[chosen].float()
            noisy, target = schedule.add_noise(clean, torch.randn_like(clean), timesteps)
        context = states.clone()
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            if step % section.trait_batches == 0:
                said = random_said(pool.seen[chosen], torch.rand(section.batch))
                tokens = both["trait_tokens"](pool.classes[chosen], pool.values[chosen], said)
                context = torch.cat([context, tokens.to(context.dtype)], 1)
            prediction = unet(noisy, timesteps, context).sample.float()
        loss = F.mse_loss(prediction, target)
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 300))
        ema.update(step)
        run.log(loss=loss, grad_norm=norm)
        if (step + 1) % section.measure_every == 0 and step + 1 < section.steps:
            export(ema)
            figures = report(run, section.pictures)
            if step + 1 == GATE_STEP:
                check_gate(run, figures)

    export(ema)
    run.finish(**report(run, section.pictures), int8_psnr=store_int8())


def check_gate(run: Run, figures: dict) -> None:
    """SystemExit for figures below GATE."""
    missed = [f"{name} {figures[name]:.2f}, not {bar:.2f}" for name, bar in GATE.items() if figures[name] < bar]
    if missed:
        run.stop(
            f"After {GATE_STEP} steps the UNet draws too little of what it is asked for ({'; '.join(missed)}): give it "
            "more channels or attention, or drop the world's busiest patterns. The same command trains on all the same."
        )


def shifted_timesteps(schedule: NoiseSchedule) -> torch.Tensor:
    """For every timestep the one whose log signal-to-noise ratio is lower by SHIFT, int64 [1000]."""
    ratios = schedule.snr.log()
    # The ratios fall: searched in the reversed, rising order.
    places = torch.searchsorted(ratios.flip(0).contiguous(), ratios - SHIFT)
    return (len(schedule) - 1 - places).clamp(0, len(schedule) - 1)


def random_timesteps(shifted: torch.Tensor, count: int, fine: bool) -> torch.Tensor:
    """Timesteps [count]: uniform ones shifted towards noise, or uniform among the finest."""
    if fine:
        return torch.randint(0, FINE, (count,))
    return shifted[torch.randint(0, len(shifted), (count,))]


def export(ema: Ema) -> None:
    """Write the averaged weights, the UNet's and the trait tokens' apart."""
    for name in ("unet", "trait_tokens"):
        weights = {
            key.removeprefix(f"{name}."): value for key, value in ema.shadow.items() if key.startswith(f"{name}.")
        }
        save_weights(weights, WEIGHTS / f"{name}.safetensors")


def store_int8(pictures: int = 16) -> float:
    """Store the exported UNet's matrices in 8 bits, half the file, if pictures stay what they are. Returns the PSNR in
    dB between pictures of both, which has to be INT8_PSNR."""
    texts = [request.text for request in heldout_requests(pictures)]
    exact = load_weights("unet")
    before = draw(texts)
    save_weights(as_int8(exact), WEIGHTS / "unet.safetensors")
    error = (draw(texts) - before).square().mean()
    # Pictures span 2, from -1 to 1.
    psnr = (10 * torch.log10(4 / error.clamp(min=1e-12))).item()
    if psnr < INT8_PSNR:
        print(f"In 8 bits the UNet draws other pictures ({psnr:.1f} dB): it stays in 16.", flush=True)
        save_weights(exact, WEIGHTS / "unet.safetensors")
    return psnr


def report(run: Run, count: int) -> dict:
    """Draw held-out requests with the exported weights, show some, and say how often they are obeyed."""
    requests = heldout_requests(count)
    figures, pictures = measure(requests)
    run.pictures("heldout", pictures)
    line = json.dumps({"step": run.step, "requests": count, **figures})
    with open(run.folder / "obedience.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)
    return figures


if __name__ == "__main__":
    main()
