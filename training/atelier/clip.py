"""Stage 5: the CLIP pair (transformers CLIPModel), from nothing, on renders and their captions.

    python -m training.atelier.clip --runs runs/atelier

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
from prefgen.atelier.attributes import FAMILIES, PROPS, SUBJECTS
from prefgen.atelier.models import MAX_TOKENS, WEIGHTS, clip_config, clip_tokenizer

from ..common.config.command import arguments
from ..common.files import save_weights
from ..common.optim import cosine, parameter_groups
from ..common.order import batch_indices
from ..common.run import Run
from .pool import PicturePool

CLASSES = [len(SUBJECTS), len(PROPS), *(len(values) for values in FAMILIES.values())]


def mapping(label_row) -> tuple[str, str, dict[str, str]]:
    """Class numbers [12] -> (subject, prop, {family: name})."""
    attributes = {family: values[int(label_row[i + 2])].name for i, (family, values) in enumerate(FAMILIES.items())}
    return list(SUBJECTS)[int(label_row[0])], list(PROPS)[int(label_row[1])], attributes


def random_caption(label_row, rng: np.random.Generator, neutral: float, bare: float) -> tuple[str, np.ndarray]:
    """A caption of one picture and the mask [12] of what it names.

    neutral: share of captions without attributes; bare: share of attribute lists without a subject.
    """
    subject, prop, attributes = mapping(label_row)
    named = np.zeros(len(CLASSES), bool)
    kind = rng.random()
    if kind < neutral:
        named[:2] = True
        return captions.neutral(subject, prop), named
    families = list(FAMILIES)
    count = len(families) if rng.random() < 0.3 else int(rng.integers(1, len(families) + 1))
    chosen = set(rng.choice(len(families), count, replace=False).tolist())
    subset = {family: attributes[family] for i, family in enumerate(families) if i in chosen}
    named[[i + 2 for i in chosen]] = True
    if kind < neutral + bare:
        phrases = captions.taste_phrases(subset)
        rng.shuffle(phrases)
        return ", ".join(phrases), named
    named[:2] = True
    return captions.enriched(subject, prop, subset, rng), named


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [B, 48], padded as ComfyUI pads."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def text_features(model: CLIPModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [B, 48, 128], projected pooled embedding [B, 128])."""
    output = model.text_model(input_ids=ids)
    return output.last_hidden_state, model.text_projection(output.pooler_output)


def image_features(model: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in -1..1 -> projected embedding [B, 128]."""
    return model.visual_projection(model.vision_model(pixel_values=pictures).pooler_output)


class AttributeHeads(nn.Module):
    """Linear readers of an embedding, used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in CLASSES)

    def loss(self, features: torch.Tensor, truth: torch.Tensor, named: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross entropy over the classes that are named. features [B, C], truth [B, 12], named bool [B, 12]."""
        losses = torch.stack(
            [F.cross_entropy(head(features), truth[:, i], reduction="none") for i, head in enumerate(self.heads)], 1
        )
        return losses.mean() if named is None else losses[named].mean()


def main() -> None:
    args = arguments("atelier.clip", __doc__)
    run = Run(args)
    if run.finished:
        return
    pool, tokenizer = PicturePool(args.runs), clip_tokenizer()
    train_count = pool.train_count
    model = CLIPModel(clip_config())
    run.warm_start(model, "clip")
    heads = AttributeHeads(model.config.projection_dim)
    both = nn.ModuleList([model, heads])
    optimiser = torch.optim.AdamW(parameter_groups(both, 0.02), betas=(0.9, 0.98))
    run.resume(model=both, optimiser=optimiser)
    for step in run.steps(args.steps):
        chosen = np.sort(batch_indices(args.seed, step, args.batch, train_count))
        rng = np.random.default_rng([args.seed, step])
        with run.timer("data"):
            pictures = pool.batch(chosen)
            truth = torch.from_numpy(pool.labels[chosen])
            texts, named = zip(*(random_caption(pool.labels[i], rng, 0.1, 0.3) for i in chosen), strict=True)
        with run.timer("forward"), torch.autocast("cpu", torch.bfloat16):
            image = image_features(model, pictures).float()
            text = text_features(model, tokenize(tokenizer, list(texts)))[1].float()
        logits = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T * model.logit_scale.exp().clamp(max=100)
        target = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        named = torch.from_numpy(np.stack(named))
        reading = heads.loss(image, truth) + heads.loss(text, truth, named)
        loss = contrast + args.heads * reading
        norm = run.optimise(loss, optimiser, cosine(step, args.steps, args.lr, 200))
        run.log(
            loss=loss,
            contrast=contrast,
            reading=reading,
            grad_norm=norm,
            top1=(logits.argmax(1) == target).float().mean(),
        )
    model.eval()
    save_weights(model.state_dict(), WEIGHTS / "clip.safetensors")
    run.finish(**evaluate(model, heads, tokenizer, pool, train_count))


@torch.inference_mode()
def evaluate(model, heads, tokenizer, pool, start: int) -> dict[str, float]:
    """Full-caption retrieval among 1024 unseen renders, and how well a linear head reads the image embedding."""
    rows = pool.labels[start:]
    texts = [captions.enriched(*mapping(row)) for row in rows]
    pictures = pool.batch(slice(start, None))
    image = torch.cat([image_features(model, p) for p in pictures.split(128)])
    text = torch.cat([text_features(model, t)[1] for t in tokenize(tokenizer, texts).split(128)])
    ranks = (F.normalize(text, dim=1) @ F.normalize(image, dim=1).T).argsort(1, descending=True)
    found = ranks == torch.arange(len(rows))[:, None]
    truth = torch.from_numpy(rows)
    read = {
        name: (head(image).argmax(1) == truth[:, i]).float().mean().item()
        for i, (name, head) in enumerate(zip(["subject", "prop", *FAMILIES], heads.heads, strict=True))
    }
    return {
        "retrieval_top1": found[:, :1].any(1).float().mean().item(),
        "retrieval_top10": found[:, :10].any(1).float().mean().item(),
        "image_heads": read,
    }


if __name__ == "__main__":
    main()
