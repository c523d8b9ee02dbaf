"""Stage 5: the CLIP pair (transformers CLIPModel), from nothing, on renders and their captions.

    python -m training.atelier.clip --runs runs/atelier

In: the pool's pictures [B, 3, 128, 128] and labels [B, 12], which random captions are written from. Out:
`clip.safetensors`, whose towers give embeddings [B, 128] and text states [B, 48, 128].

The contrastive loss alone needs far more pairs than two cores can show it, so linear heads that name the attributes
help both towers along; they are thrown away afterwards. Reports caption-to-picture retrieval on unseen renders.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel

from prefgen.atelier import captions
from prefgen.atelier.attributes import FAMILIES
from prefgen.atelier.models import WEIGHTS, clip_config, clip_tokenizer

from ..common.atelier_clip import image_features, text_features, tokenize
from ..common.config.atelier import Clip
from ..common.config.command import arguments
from ..common.files import save_weights
from ..common.optim import cosine, parameter_groups
from ..common.order import batch_indices
from ..common.run import Run
from ..data.picture_pool import PicturePool, label_names
from .captions import random_caption
from .heads import AttributeHeads

# Shares of captions without attributes, and of attribute lists without a subject.
NEUTRAL = 0.1
BARE = 0.3


def main() -> None:
    args = arguments(Clip, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    pool = PicturePool(args.runs)
    tokenizer = clip_tokenizer()
    model = CLIPModel(clip_config())
    run.warm_start(model, "clip")
    heads = AttributeHeads(model.config.projection_dim)
    both = nn.ModuleList([model, heads])
    optimiser = torch.optim.AdamW(parameter_groups(both, 0.02), betas=(0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)

    for step in run.steps(section.steps):
        # Sorted, so that the mapped file is read forwards.
        chosen = np.sort(batch_indices(section.seed, step, section.batch, pool.train_count))
        rng = np.random.default_rng([section.seed, step])
        with run.timer("data"):
            pictures = pool.batch(chosen)
            truth = torch.from_numpy(pool.labels[chosen])
            texts, named = zip(*(random_caption(pool.labels[i], rng, NEUTRAL, BARE) for i in chosen), strict=True)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            image = image_features(model, pictures).float()
            text = text_features(model, tokenize(tokenizer, list(texts)))[1].float()
        # CLIP's loss (arXiv 2103.00020): the pairs of a batch against each other, the scale clipped at 100.
        logits = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T * model.logit_scale.exp().clamp(max=100)
        pairs = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        # A caption is asked only for what it names, a picture for everything.
        reading = heads.loss(image, truth) + heads.loss(text, truth, torch.from_numpy(np.stack(named)))
        loss = contrast + section.heads * reading
        norm = run.optimise(loss, optimiser, cosine(step, section.steps, section.lr, 200))
        top1 = (logits.argmax(1) == pairs).float().mean()
        run.log(loss=loss, contrast=contrast, reading=reading, grad_norm=norm, top1=top1)

    model.eval()
    save_weights(model.state_dict(), WEIGHTS / "clip.safetensors")
    run.finish(**evaluate(model, heads, tokenizer, pool))


@torch.inference_mode()
def evaluate(model: CLIPModel, heads: AttributeHeads, tokenizer, pool: PicturePool) -> dict:
    """Full-caption retrieval among the unseen renders (1024), and how well a linear head reads the image embedding."""
    labels = pool.labels[pool.train_count :]
    texts = [captions.enriched(*label_names(row)) for row in labels]
    pictures = pool.batch(slice(pool.train_count, None))
    image = torch.cat([image_features(model, some) for some in pictures.split(128)])
    text = torch.cat([text_features(model, ids)[1] for ids in tokenize(tokenizer, texts).split(128)])
    ranks = (F.normalize(text, dim=1) @ F.normalize(image, dim=1).T).argsort(1, descending=True)
    hits = ranks == torch.arange(len(labels))[:, None]
    accuracy = heads.accuracy(image, torch.from_numpy(labels))
    return {
        "retrieval_top1": hits[:, :1].any(1).float().mean().item(),
        "retrieval_top10": hits[:, :10].any(1).float().mean().item(),
        "image_heads": dict(zip(["subject", "prop", *FAMILIES], accuracy, strict=True)),
    }


if __name__ == "__main__":
    main()
