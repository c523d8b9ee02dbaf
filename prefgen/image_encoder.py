"""What an image encoder is, by its weights: its architecture, its widths, and which training of it.

ComfyUI calls every image encoder CLIP_VISION. Adapters read CLIP (arXiv 2103.00020) alone, and a vector of equal width
from another encoder is noise to them. Two encoders are one where they embed the same picture alike, whatever their
files are called and however their weights are stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

CLIP = "CLIP"
SIGLIP = "SigLIP"
LLAVA = "LLaVA's CLIP"
DINO = "DINO"
# How transformers and ComfyUI name a CLIP's image side.
PREFIX = "vision_model."
PROJECTION = "visual_projection."
# So many values of each tensor go into the digest.
SAMPLED = 4096
# Least cosine between what one encoder makes of the fixed picture in different libraries and precisions.
SAME_ENCODER = 0.99


def described(state: Mapping[str, torch.Tensor]) -> dict:
    """{"architecture", "hidden_size", "digest"} of an encoder's weights by ComfyUI's or transformers' names; what they
    don't say is left out, so an encoder of another kind is {}."""
    about: dict = {}
    architecture = architecture_of(state)
    if architecture:
        about["architecture"] = architecture
    patches = next((value for key, value in state.items() if "patch_embedding" in key and value.ndim == 4), None)
    if patches is not None:
        about["hidden_size"] = patches.shape[0]
    digest = weights_digest(state) if architecture == CLIP else None
    if digest:
        about["digest"] = digest
    return about


def architecture_of(state: Mapping[str, torch.Tensor]) -> str | None:
    """CLIP, SIGLIP, LLAVA or DINO, by the names of the weights; None for another."""
    names = set(state)
    if any("layer_scale1" in name or name.endswith("embeddings.cls_token") for name in names):
        return DINO
    if not any(name.startswith(PREFIX) for name in names):
        return None
    if any(name.startswith("multi_modal_projector.") for name in names):
        # Its files have no visual_projection, so the embedding that ComfyUI makes of one is whatever was in memory.
        return LLAVA
    return CLIP if PREFIX + "embeddings.class_embedding" in names else SIGLIP


@torch.no_grad()
def weights_digest(state: Mapping[str, torch.Tensor]) -> str | None:
    """sha256 over names, shapes and evenly spaced values of every tensor of a CLIP's image side, rounded to fp16.

    The same for fp32 weights and for the fp16 ones that ComfyUI may make of them, in ComfyUI's and in transformers'
    classes; training anew moves values of every tensor. What was rounded coarser (bf16, fp8) can't be told from other
    weights that round alike: then it is None, as for weights that aren't there (meta device).
    """
    side = {
        name.removeprefix(PREFIX): value
        for name, value in state.items()
        if name.startswith((PREFIX, PROJECTION)) and value.is_floating_point()
    }
    digest = hashlib.sha256()
    for name in sorted(side):
        value = side[name]
        if value.is_meta:
            return None
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu()
        # A matrix whose every value bf16 holds exactly was bf16 or fp8 once. Norms of ones and biases of zeros may be.
        if value.ndim > 1 and sample.any() and torch.equal(sample.bfloat16().float(), sample):
            return None
        digest.update(f"{name} {[*value.shape]}\n".encode())
        digest.update(sample.half().numpy().tobytes())
    return digest.hexdigest() if side else None


def fixed_picture(side: int) -> torch.Tensor:
    """The picture that tells encoders apart: float32 [side, side, 3] in 0..1, waves and a disc in three colours.

    Drawn at the encoder's own size, so that no resizing has a part in the answer; whole steps of 1/255, as a file has.
    """
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    disc = torch.sigmoid((0.3 - torch.hypot(x - 0.6, y - 0.4)) * 40)
    red = 0.5 + 0.5 * torch.sin(2 * math.pi * (3 * x + y))
    green = (1 - disc) * y + disc * (1 - x)
    blue = 0.5 + 0.5 * torch.cos(2 * math.pi * (5 * x * y - 2 * x))
    return torch.stack([red, green, blue], dim=-1).mul(255).round().div(255)


def rounded(embedding: torch.Tensor) -> list[float]:
    """A unit embedding for a file's header: four digits move its cosine by less than 1e-4."""
    return [round(value, 4) for value in F.normalize(embedding.float(), dim=0).tolist()]


def likeness(one: Sequence[float], other: Sequence[float]) -> float:
    """Cosine between two embeddings of the fixed picture; 0 for those of different widths."""
    if len(one) != len(other):
        return 0.0
    return torch.cosine_similarity(torch.tensor(one), torch.tensor(other), dim=0).item()


def encoder_in_words(about: Mapping) -> str:
    """An encoder in words, from what `described` says of it and its `width`: "SigLIP (width 1152)"."""
    return f"{about['architecture']} (width {about.get('hidden_size', about.get('width', '?'))})"
