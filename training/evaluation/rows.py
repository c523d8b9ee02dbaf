"""The ways of painting that are compared, one row each: in the atelier all of them, on real bases some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Pictures = list[torch.Tensor]  # each [H, W, 3] in 0..1
SIZES = (1, 2, 4, 8, 16)
WEIGHTS = (0.5, 1.0, 1.25, 1.5)  # of the user attention, as the artist sets it


def as_it_is(liked: Pictures, disliked: Pictures) -> tuple[Pictures, Pictures]:
    return liked, disliked


@dataclass(frozen=True)
class Row:
    """One way of painting.

    adapter: "main", the name of another one (in the atelier, of a run of `training.evaluation.ablations`, whose MLLM
    it is as well), or "" for no user. of_other: the next user's history. words: what is written into the prompt, the
    taste as the "mllm" says it or the true "taste". negative: what is avoided is the negative prompt.

    In the atelier alone: history, from (liked, disliked) to what the encoder sees; size, liked and as many disliked
    pictures; parts, weights of (semantic, core, image); weight, of the user attention; reference, weight of the
    history's pictures in reference attention.
    """

    label: str
    adapter: str = ""
    of_other: bool = False
    words: str = ""
    negative: bool = False
    history: Callable[[Pictures, Pictures], tuple[Pictures, Pictures]] = as_it_is
    size: int = 8
    parts: tuple[float, float, float] = (1.0, 1.0, 1.0)
    weight: float = 1.0
    reference: float = 0.0

    @property
    def ablation(self) -> str:
        """The ablation whose weights paint this row, "" for the shipped ones."""
        return "" if self.adapter == "main" else self.adapter

    @property
    def reads_history(self) -> bool:
        return bool(self.adapter or self.reference or self.words == "mllm")


def grey(pictures: Pictures) -> Pictures:
    """Luminance alone."""
    return [p.mean(-1, keepdim=True).expand_as(p).contiguous() for p in pictures]


def colours_only(pictures: Pictures) -> Pictures:
    """The same pixels in random order: all colours in their amounts, nothing else."""
    order = torch.randperm(pictures[0][..., 0].numel(), generator=torch.Generator().manual_seed(0))
    return [p.flatten(0, 1)[order].view_as(p) for p in pictures]


ROWS = {
    "none": Row("no preference"),
    "mismatched": Row("another user's preference", "main", of_other=True),
    "image_only": Row("image-only adapter, trained as long", "image_only", parts=(0, 0, 1)),
    "described": Row("taste in the MLLM's words, in the prompt", words="mllm"),
    "described_both": Row("the same, what is avoided as negative prompt", words="mllm", negative=True),
    "reference_03": Row("reference attention, weight 0.3", reference=0.3),
    "reference_1": Row("reference attention, weight 1", reference=1.0),
    "prefgen": Row("PrefGen", "main"),
    "oracle": Row("likes in the prompt", words="taste"),
    "swapped": Row("verdicts swapped", "main", history=lambda liked, disliked: (disliked, liked)),
    "grey": Row("history without colour", "main", history=lambda *sides: tuple(map(grey, sides))),
    "colours": Row("history of colours only", "main", history=lambda *sides: tuple(map(colours_only, sides))),
    "liked_only": Row("liked pictures only", "main", history=lambda liked, disliked: (liked, [])),
    "no_semantic": Row("without e_sem", "main", parts=(0, 1, 1)),
    "no_core": Row("without e_core", "main", parts=(1, 0, 1)),
    "no_image": Row("without e_img", "main", parts=(1, 1, 0)),
    "semantic": Row("e_sem alone", "main", parts=(1, 0, 0)),
    "core": Row("e_core alone", "main", parts=(0, 1, 0)),
    "image": Row("e_img alone", "main", parts=(0, 0, 1)),
    "pointwise": Row("point-wise loss in place of MMD", "pointwise"),
    "first_layers": Row("the first four layers, and the second as core", "first_layers"),
    "untuned": Row("decoder of random weights, never tuned on histories", "untuned"),
    "blind_image": Row("image-only adapter, from verdicts alone", "blind_image", parts=(0, 0, 1)),
    "blind_image_other": Row("the same, another user's preference", "blind_image", of_other=True, parts=(0, 0, 1)),
    **{f"weight_{w:g}": Row(f"weight {w:g}", "main", weight=w) for w in WEIGHTS if w != 1},
    **{f"size_{n}": Row(f"history of {n} + {n}", "main", size=n) for n in SIZES if n != 8},
}
# In the order of the page. Beside the method what is cheap and strong: another user's preference, which a picture must
# be told from; the same branch on CLIP's embedding alone; the taste in words, which the prompt can carry without any
# branch; the training-free FABRIC (arXiv 2307.10159).
METHODS = (
    *("none", "mismatched", "image_only", "described", "described_both", "reference_03", "reference_1"),
    *("prefgen", "oracle"),
)
# What could sink the claim: the branch reads colours alone, or doesn't care which side a picture is on.
CONTROLS = ("swapped", "grey", "colours", "liked_only")
PARTS = ("no_semantic", "no_core", "no_image", "semantic", "core", "image")
TRAINED = ("pointwise", "first_layers", "untuned")
# Beside those that learnt from attributes: the adapter that saw none, with the user and with another one.
BLIND = ("mismatched", "image_only", "blind_image", "blind_image_other")
BASIC = ("none", "mismatched", "prefgen", "oracle")  # what needs nothing but the shipped weights, for quick looks
ON_REAL_BASES = ("none", "described", "described_both", "oracle", "mismatched", "prefgen", "image_only")
