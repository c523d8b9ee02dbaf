"""The ways of painting that are compared, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Pictures = list[torch.Tensor]  # each [H, W, 3] in 0..1
SIZES = (1, 2, 4, 8, 16)
WEIGHTS = (0.5, 1.0, 1.25, 1.5)  # of the user attention, as the artist sets it


@dataclass(frozen=True)
class Row:
    """One way of painting. history: from (liked, disliked) to what the encoder sees, or None for no user.

    size: liked and as many disliked pictures. parts: weights of (semantic, core, image). weight: of the user attention.
    of_other: the next user's history. taste: the true taste is written into the prompt. words: the taste in the MLLM's
    words is, "positive" the liked traits, "both" the disliked ones as the negative prompt too. reference: weight of the
    history's pictures in reference attention. ablation: the adapter and the MLLM are those of this run of
    `training.evaluation.ablations`.
    """

    label: str
    history: Callable[[Pictures, Pictures], tuple[Pictures, Pictures]] | None = lambda *sides: sides
    size: int = 8
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0)
    weight: float = 1.0
    of_other: bool = False
    taste: bool = False
    words: str = ""
    reference: float = 0.0
    ablation: str = ""


def grey(pictures: Pictures) -> Pictures:
    """Luminance alone."""
    return [p.mean(-1, keepdim=True).expand_as(p).contiguous() for p in pictures]


def colours_only(pictures: Pictures) -> Pictures:
    """The same pixels in random order: all colours in their amounts, nothing else."""
    order = torch.randperm(pictures[0][..., 0].numel(), generator=torch.Generator().manual_seed(0))
    return [p.flatten(0, 1)[order].view_as(p) for p in pictures]


ROWS = {
    "none": Row("no preference", None),
    "mismatched": Row("another user's preference", of_other=True),
    "image_only": Row("image-only adapter, trained as long", parts=(0, 0, 1), ablation="image_only"),
    "described": Row("taste in the MLLM's words, in the prompt", None, words="positive"),
    "described_both": Row("the same, what is avoided as negative prompt", None, words="both"),
    "reference_03": Row("reference attention, weight 0.3", None, reference=0.3),
    "reference_1": Row("reference attention, weight 1", None, reference=1.0),
    "prefgen": Row("PrefGen"),
    "oracle": Row("likes in the prompt", None, taste=True),
    "swapped": Row("verdicts swapped", lambda liked, disliked: (disliked, liked)),
    "grey": Row("history without colour", lambda liked, disliked: (grey(liked), grey(disliked))),
    "colours": Row("history of colours only", lambda liked, disliked: (colours_only(liked), colours_only(disliked))),
    "liked_only": Row("liked pictures only", lambda liked, disliked: (liked, [])),
    "no_semantic": Row("without e_sem", parts=(0, 1, 1)),
    "no_core": Row("without e_core", parts=(1, 0, 1)),
    "no_image": Row("without e_img", parts=(1, 1, 0)),
    "semantic": Row("e_sem alone", parts=(1, 0, 0)),
    "core": Row("e_core alone", parts=(0, 1, 0)),
    "image": Row("e_img alone", parts=(0, 0, 1)),
    "pointwise": Row("point-wise loss in place of MMD", ablation="pointwise"),
    "first_layers": Row("the first four layers, and the second as core", ablation="first_layers"),
    "untuned": Row("decoder of random weights, never tuned on histories", ablation="untuned"),
    **{f"weight_{w:g}": Row(f"weight {w:g}", weight=w) for w in WEIGHTS if w != 1},
    **{f"size_{n}": Row(f"history of {n} + {n}", size=n) for n in SIZES if n != 8},
}
METHODS = (
    *("none", "mismatched", "image_only", "described", "described_both", "reference_03", "reference_1"),
    *("prefgen", "oracle"),
)
CONTROLS = ("swapped", "grey", "colours", "liked_only")
PARTS = ("no_semantic", "no_core", "no_image", "semantic", "core", "image")
TRAINED = ("pointwise", "first_layers", "untuned")
BASIC = ("none", "mismatched", "prefgen", "oracle")  # what needs nothing but the shipped weights, for quick looks
