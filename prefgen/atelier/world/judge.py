"""The judges: small CNNs that read a scene off a picture.

Two of them are trained, of other widths, augmentations and seeds, on fresh renders alone: A is asked where something is
chosen, B where something is reported. Neither ever sees a generated picture, so that what they say of one is a
measurement and not an echo of the generator's training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..judge import Stage
from .labels import CLASSES, scene_of
from .models import as_read
from .scenes import Scene
from .traits import CONTINUOUS

WIDTHS = {"a": 32, "b": 40}
PERIODIC = torch.tensor([trait.period for trait in CONTINUOUS.values()])
# Of the logarithm of a variance, in squared shares of the range: a spread of 0.3 % to 100 %.
LEAST_LOG_VARIANCE = -11.5
MOST_LOG_VARIANCE = 0.0


@dataclass(frozen=True)
class Reading:
    """What a judge sees in a picture. errors: standard deviation of each continuous trait in shares of its range."""

    scene: Scene
    errors: tuple[float, ...]


class Judge(nn.Module):
    """Residual CNN with a linear head for every class and three numbers for every continuous trait.

    forward: pictures [B, 3, 128, 128] in 0..1 -> (dict name -> logits [B, kinds], values [B, 13, 2], log variances
    [B, 13]). A trait whose range ends has its share in the first number; one that wraps has cosine and sine.
    """

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        widths = [width, width * 2, width * 3, width * 4]
        self.stages = nn.ModuleList(Stage(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.grid = 4
        features = widths[-1]
        self.mix = nn.Conv2d(features, features, 1)
        # Frames, settings and numbers are about where things are: a coarse grid stands beside the global mean, and the
        # mean of squares says how much of a texture there is.
        self.place = nn.Linear(features // 4 * self.grid**2, features)
        self.squeeze = nn.Conv2d(features, features // 4, 1)
        self.classes = nn.ModuleDict({name: nn.Linear(features * 3, len(kinds)) for name, kinds in CLASSES.items()})
        self.hidden = nn.Linear(features * 3, features * 3)
        self.values = nn.Linear(features * 3, len(CONTINUOUS) * 3)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the heads read: pictures [B, 3, 128, 128] in 0..1 -> [B, 12 * width]."""
        x = F.relu(self.stem(pictures * 2 - 1))
        for stage in self.stages:
            x = stage(x)
        mixed = F.relu(self.mix(x))
        mean = mixed.mean((2, 3))
        spread = (mixed.float().square().mean((2, 3)) + 1e-4).sqrt().to(mean.dtype)
        place = F.relu(self.place(F.adaptive_avg_pool2d(self.squeeze(x), self.grid).flatten(1)))
        return torch.cat([mean, spread, place], 1)

    def forward(self, pictures: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        features = self.features(pictures)
        numbers = self.values(F.relu(self.hidden(features))).float().unflatten(1, (len(CONTINUOUS), 3))
        logits = {name: head(features) for name, head in self.classes.items()}
        return logits, numbers[..., :2], numbers[..., 2].clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE)

    @torch.inference_mode()
    def read(self, pictures: torch.Tensor, batch: int = 64) -> list[Reading]:
        """Read pictures [B, 3, H, W] in -1..1, H and W multiples of 128."""
        readings = []
        for some in pictures.split(batch):
            logits, values, log_variances = self(as_read(some) * 0.5 + 0.5)
            classes = torch.stack([logits[name].argmax(1) for name in CLASSES], 1).tolist()
            shares = shares_of(values).tolist()
            errors = (0.5 * log_variances).exp().tolist()
            readings += [
                Reading(scene_of(kinds, row), tuple(error))
                for kinds, row, error in zip(classes, shares, errors, strict=True)
            ]
        return readings


def shares_of(values: torch.Tensor) -> torch.Tensor:
    """A judge's values [B, 13, 2] as shares of the ranges [B, 13], 0..1."""
    turns = torch.atan2(values[..., 1], values[..., 0]) / (2 * np.pi) % 1
    return torch.where(PERIODIC, turns, values[..., 0].clamp(0, 1))


def distances(shares: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How far shares lie apart, [B, 13]; the short way where the range wraps."""
    straight = (shares - truth).abs()
    return torch.where(PERIODIC, torch.minimum(straight, 1 - straight), straight)


def load_judge(which: Literal["a", "b"]) -> Judge:
    """One of the two judges in eval mode, fp32; FileNotFoundError where its weights are missing."""
    from ..models import load_weights

    judge = Judge(WIDTHS[which])
    # How many batches a norm has seen is a whole number that counts in training alone.
    weights = {key: value for key, value in load_weights(f"judge_{which}").items() if "num_batches" not in key}
    judge.load_state_dict(weights, strict=False)
    return judge.eval()
