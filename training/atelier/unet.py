"""Stage 6: the text-conditioned UNet (diffusers UNet2DConditionModel, v-prediction), on cached latents.

    python -m training.atelier.unet --runs runs/atelier

In: the pool's latents [n, 8, 16, 16] and labels [n, 12], and CLIP's states of captions [B, 48, 128]. Out:
`unet.safetensors`, the averaged weights. Captions are drawn anew at every step (no attributes, some, all; shuffled), so
that the UNet obeys any part of a prompt. Reports, on held-out prompts and read by the judge, how often the subject and
the asked attributes are there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from prefgen.atelier import captions
from prefgen.atelier.attributes import FAMILIES
from prefgen.atelier.editions import FIRST
from prefgen.atelier.judge import load_judge
from prefgen.atelier.models import (
    PREDICTION,
    WEIGHTS,
    alphas_cumprod,
    clip_tokenizer,
    load_clip,
    load_unet_diffusers,
    load_vae_diffusers,
)

from ..common.atelier_clip import text_features, tokenize
from ..common.config.atelier import Unet
from ..common.config.command import arguments
from ..common.files import save_weights
from ..common.optim import Ema, cosine, parameter_groups
from ..common.order import batch_indices
from ..common.run import Run
from ..common.sampling import NoiseSchedule, decode, sample
from ..data.picture_pool import PicturePool, pool_latents
from .captions import random_caption


def main() -> None:
    args = arguments(Unet, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = PicturePool(args.runs)
    latents = pool_latents(args.runs, pool)
    clip = load_clip()
    tokenizer = clip_tokenizer()
    schedule = NoiseSchedule(alphas_cumprod(), PREDICTION)
    unet = UNet2DConditionModel(**FIRST.unet)
    run.warm_start(unet, "unet")
    # The fused kernel's backward is slow on CPUs at these sizes; plain products are 1.7 times faster.
    unet.set_attn_processor(AttnProcessor())
    optimiser = torch.optim.AdamW(parameter_groups(unet, 0.01), betas=(0.9, 0.99))
    ema = Ema(unet, section.ema)
    run.resume(model=unet, optimiser=optimiser, ema=ema)

    for step in run.steps(section.steps):
        chosen = batch_indices(section.seed, step, section.batch, len(pool))
        rng = np.random.default_rng([section.seed, step])
        with run.timer("data"):
            texts = [
                "" if rng.random() < section.empty else random_caption(pool.labels[i], rng, section.neutral)[0]
                for i in chosen
            ]
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                states = text_features(clip, tokenize(tokenizer, texts))[0].float()
            # A little more often the noisy half, where subject, palette and layout are decided.
            timesteps = (len(schedule) * torch.rand(section.batch) ** 0.75).long()
            clean = latents[chosen].float()
            noisy, target = schedule.add_noise(clean, torch.randn_like(clean), timesteps)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            prediction = unet(noisy, timesteps, states.clone()).sample.float()
        loss = F.mse_loss(prediction, target)
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 300))
        ema.update(step)
        run.log(loss=loss, grad_norm=norm)
        if step % 1000 == 999:
            export(ema)
            preview(run)

    export(ema)
    run.finish(**evaluate(section.pictures))


def export(ema: Ema) -> None:
    save_weights(ema.shadow, WEIGHTS / "unet.safetensors")


def heldout_requests(count: int, seed: int = 5) -> list[tuple[str, str, dict[str, str]]]:
    """Held-out prompts with five attributes each: what a picture is asked to show."""
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        subject, prop = captions.heldout_prompts()[i % len(captions.heldout_prompts())]
        families = rng.choice(list(FAMILIES), 5, replace=False)
        requests.append((subject, prop, {f: FAMILIES[f][rng.integers(len(FAMILIES[f]))].name for f in families}))
    return requests


@torch.inference_mode()
def draw(texts: list[str], guidance: float, steps: int = 20, batch: int = 40) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in -1..1 from the exported weights."""
    clip = load_clip()
    tokenizer = clip_tokenizer()
    unet = load_unet_diffusers()
    vae = load_vae_diffusers()
    empty = text_features(clip, tokenize(tokenizer, [""]))[0]
    pictures = []
    for start in range(0, len(texts), batch):
        states = text_features(clip, tokenize(tokenizer, texts[start : start + batch]))[0]
        with torch.autocast("cpu", torch.bfloat16):
            latents = sample(unet, states, empty, guidance, steps, seed=start)
        pictures.append(decode(vae, latents))
    return torch.cat(pictures)


def preview(run: Run) -> None:
    requests = heldout_requests(32)
    pictures = draw([captions.enriched(*request) for request in requests], 3.0)
    run.pictures("heldout", pictures)
    print(run.step + 1, obedience(pictures, requests), flush=True)


def obedience(pictures: torch.Tensor, requests) -> dict[str, float]:
    """Share of pictures whose subject the judge names, and share of asked attributes it sees."""
    readings = load_judge().read((pictures * 0.5 + 0.5).movedim(1, -1))
    subject = np.mean([reading["subject"] == asked[0] for reading, asked in zip(readings, requests, strict=True)])
    hits: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for reading, (_, _, asked) in zip(readings, requests, strict=True):
        for family, name in asked.items():
            hits[family].append(reading["attributes"][family] == name)
    shares = {family: round(float(np.mean(h)), 3) for family, h in hits.items() if h}
    return {
        "subject": round(float(subject), 3),
        "attributes": round(float(np.mean(sum(hits.values(), []))), 3),
        **shares,
    }


def evaluate(count: int) -> dict:
    """Obedience on held-out prompts with and without attributes in the prompt."""
    requests = heldout_requests(count)
    enriched = draw([captions.enriched(*request) for request in requests], 3.0)
    neutral = draw([captions.neutral(*request[:2]) for request in requests], 3.0)
    return {"enriched": obedience(enriched, requests), "neutral": obedience(neutral, requests), "pictures": count}


if __name__ == "__main__":
    main()
