"""Stage 5: the CLIP pair (transformers CLIPModel), from nothing, on renders and their captions.

    python -m training.atelier.world.clip --runs runs/world

In: the pool's pictures [B, 3, 128, 128] and random captions of their scenes. Out: `clip.safetensors`, whose towers give
embeddings [B, 128] and text states [B, 64, 128].

The contrastive loss alone needs far more pairs than two cores can show it, so linear heads that read traits help both
towers along, and are thrown away. A picture's heads read the traits without words too, since an artist's CLIP has seen
more than captions say. Reports retrieval among unseen renders and what the heads read off unseen pictures.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel

from prefgen.atelier.models import WEIGHTS, clip_config, clip_tokenizer

from ...common.atelier_clip import image_features, text_features, tokenize
from ...common.config.command import arguments
from ...common.config.world import WorldClip
from ...common.files import save_weights
from ...common.optim import cosine, optimiser_of
from ...common.order import batch_indices
from ...common.run import Run
from ...data.world_pool import WorldPool, pool_scene
from .captions import named_classes, random_caption
from .heads import TraitHeads

# Shares of captions without phrases, and of phrases alone.
NEUTRAL = 0.1
BARE = 0.3


def main() -> None:
    args = arguments(WorldClip, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = WorldPool(args.runs)
    pool_seed = args.config.atelier.world.pool.seed
    tokenizer = clip_tokenizer()
    model = CLIPModel(clip_config())
    heads = TraitHeads(model.config.projection_dim)
    both = nn.ModuleList([model, heads])
    optimiser = optimiser_of(section.optimiser, both, 0.02, (0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)

    for step in run.steps(section.steps):
        # Sorted, so that the mapped file is read forwards.
        chosen = np.sort(batch_indices(section.seed, step, section.batch, pool.train_count))
        rng = np.random.default_rng([section.seed, step])
        with run.timer("data"):
            pictures = pool.batch(chosen)
            truth = pool.classes[chosen]
            captions = [random_caption(pool_scene(pool_seed, i), rng, NEUTRAL, BARE) for i in chosen]
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            image = image_features(model, pictures).float()
            text = text_features(model, tokenize(tokenizer, [one.text for one in captions]))[1].float()
        contrast, top1 = contrastive(model, image, text)
        # A caption is asked only for what it names, a picture for everything that can be seen.
        reading = heads.class_loss(image, truth) + heads.class_loss(text, truth, named_classes(captions))
        values = heads.value_loss(image, pool.values[chosen], pool.seen[chosen])
        loss = contrast + section.heads * (reading + values)
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 200))
        run.log(loss=loss, contrast=contrast, reading=reading, values=values, grad_norm=norm, top1=top1)

    model.eval()
    save_weights(model.state_dict(), WEIGHTS / "clip.safetensors")
    run.finish(**evaluate(model, heads, tokenizer, pool, pool_seed))


def contrastive(model: CLIPModel, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(CLIP's loss, arXiv 2103.00020: the pairs of a batch against each other; share of texts that find their picture)
    of embeddings [B, 128]."""
    # CLIP clips the scale at 100.
    logits = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T * model.logit_scale.exp().clamp(max=100)
    pairs = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    return loss, (logits.argmax(1) == pairs).float().mean()


@torch.inference_mode()
def evaluate(model: CLIPModel, heads: TraitHeads, tokenizer, pool: WorldPool, pool_seed: int) -> dict:
    """Full-caption retrieval among unseen renders, and what the heads read off their embeddings."""
    unseen = slice(pool.train_count, None)
    count = len(pool) - pool.train_count
    rng = np.random.default_rng(0)
    scenes = [pool_scene(pool_seed, pool.train_count + i) for i in range(count)]
    texts = [random_caption(scene, rng, 0.0).text for scene in scenes]
    image = torch.cat([image_features(model, some) for some in pool.batch(unseen).split(128)])
    text = torch.cat([text_features(model, ids)[1] for ids in tokenize(tokenizer, texts).split(128)])
    ranks = (F.normalize(text, dim=1) @ F.normalize(image, dim=1).T).argsort(1, descending=True)
    hits = ranks == torch.arange(count)[:, None]
    return {
        "retrieval_top1": hits[:, :1].any(1).float().mean().item(),
        "retrieval_top10": hits[:, :10].any(1).float().mean().item(),
        "image_heads": heads.figures(image, pool.classes[unseen], pool.values[unseen], pool.seen[unseen]),
        "unseen": count,
    }


if __name__ == "__main__":
    main()
