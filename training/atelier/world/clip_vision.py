"""Stage 5b: CLIP's image tower for longer, beside the UNet, which needs the text tower alone.

    python -m training.atelier.world.clip_vision --runs runs/world

In: `clip.safetensors`, the pool's pictures [B, 3, 128, 128] and random captions of their scenes. Out: the same file
with another image tower. The text tower stays as it is, since the UNet learns from its states (LiT, arXiv 2111.07991,
with the towers the other way round). A picture takes longer to learn to read than a caption: after stage 5 linear heads
named the subject of 0.67 of the unseen pictures (docs/evidence/second_edition.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from prefgen.atelier.models import WEIGHTS, clip_tokenizer, load_clip

from ...common.atelier_clip import image_features, text_features, tokenize
from ...common.config.command import arguments
from ...common.config.world import WorldClipVision
from ...common.files import save_weights
from ...common.optim import cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...data.world_pool import WorldPool, pool_scene
from .captions import random_caption
from .clip import BARE, NEUTRAL, contrastive, evaluate
from .heads import TraitHeads


def main() -> None:
    args = arguments(WorldClipVision, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    pool_seed = args.config.atelier.world.pool.seed
    tokenizer = clip_tokenizer()
    model = load_clip().train().requires_grad_(False)
    tower = nn.ModuleList([model.vision_model, model.visual_projection]).requires_grad_(True)
    heads = TraitHeads(model.config.projection_dim)
    both = nn.ModuleList([tower, heads])
    optimiser = optimiser_of(section.optimiser, both, 0.02, (0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)

    for step in run.steps(section.steps):
        # Sorted, so that the mapped file is read forwards.
        chosen = np.sort(batch_indices(section.seed, step, section.batch, pool.train_count))
        rng = np.random.default_rng([section.seed, step])
        with run.timer("data"):
            pictures = pool.batch(chosen)
            texts = [random_caption(pool_scene(pool_seed, i), rng, NEUTRAL, BARE).text for i in chosen]
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            image = image_features(model, pictures).float()
            with torch.no_grad():
                text = text_features(model, tokenize(tokenizer, texts))[1].float()
        contrast, top1 = contrastive(model, image, text)
        reading = heads.class_loss(image, pool.classes[chosen])
        values = heads.value_loss(image, pool.values[chosen], pool.seen[chosen])
        loss = contrast + section.heads * (reading + values)
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 200))
        run.log(loss=loss, contrast=contrast, reading=reading, values=values, grad_norm=norm, top1=top1)

    model.eval()
    save_weights(model.state_dict(), WEIGHTS / "clip.safetensors")
    run.finish(**evaluate(model, heads, tokenizer, pool, pool_seed))


if __name__ == "__main__":
    main()
