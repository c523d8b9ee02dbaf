"""Captions as CLIP and the UNet learn from them: nothing but the subject, a few phrases, or all of them."""

from __future__ import annotations

import numpy as np
import torch

from prefgen.atelier.world.labels import CLASSES
from prefgen.atelier.world.prompts import Caption, caption
from prefgen.atelier.world.scenes import Scene

# How often a caption says every trait that has words; else every share of them is equally likely.
ALL_SAID = 0.3


def random_caption(scene: Scene, rng: np.random.Generator, neutral: float, bare: float = 0.0) -> Caption:
    """A caption of a scene. neutral: share of captions without phrases; bare: share of phrases alone."""
    kind = rng.random()
    keep = 1.0 if rng.random() < ALL_SAID else float(rng.random())
    if kind < neutral:
        keep = 0.0
    return caption(scene, rng, keep, bare=neutral <= kind < neutral + bare)


def named_classes(captions: list[Caption]) -> torch.Tensor:
    """bool [B, 12]: which of CLASSES each caption names."""
    return torch.tensor([[name in one.names for name in CLASSES] for one in captions])
