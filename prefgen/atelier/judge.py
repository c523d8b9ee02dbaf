"""The judge: a small CNN that reads subject, prop and every attribute off a picture.

It is trained on fresh renders alone and never sees a generated picture, so that what it says of generated pictures is
a measurement and not an echo of the generator's training.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .attributes import FAMILIES, PROPS, SUBJECTS
from .editions import READ_SIZE
from .models import load_weights

HEADS: dict[str, list[str]] = {
    "subject": list(SUBJECTS),
    "prop": list(PROPS),
    **{family: [attribute.name for attribute in attributes] for family, attributes in FAMILIES.items()},
}


class Judge(nn.Module):
    """Residual CNN with one linear head for subject, prop and each family.

    forward: pictures [B, 3, 128, 128] in 0..1 -> dict head -> logits [B, classes].
    """

    def __init__(self, width: int = 32):
        super().__init__()
        # A strided 4x4 stem: the world's details are at least 2 px wide and its patterns repeat every 8 px.
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        widths = [width, width * 2, width * 3, width * 4]
        self.stages = nn.ModuleList(Stage(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.grid = 4
        features = widths[-1]
        self.mix = nn.Conv2d(features, features, 1)
        # Composition and frame are about where things are: keep a coarse grid beside the global mean.
        self.place = nn.Linear(features // 4 * self.grid**2, features)
        self.squeeze = nn.Conv2d(features, features // 4, 1)
        self.heads = nn.ModuleDict({name: nn.Linear(features * 2, len(values)) for name, values in HEADS.items()})

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the heads read: pictures [B, 3, 128, 128] in 0..1 -> [B, 256]."""
        x = F.relu(self.stem(pictures * 2 - 1))
        for stage in self.stages:
            x = stage(x)
        mean = F.relu(self.mix(x)).mean((2, 3))
        place = F.relu(self.place(F.adaptive_avg_pool2d(self.squeeze(x), self.grid).flatten(1)))
        return torch.cat([mean, place], 1)

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, pictures, batch: int = 64) -> list[dict]:
        """Read pictures of the atelier.

        pictures: [B, H, W, 3], numpy or torch, uint8 0..255 or float 0..1.
        Returns one dict a picture: subject, prop, attributes {family: name}.
        """
        pictures = torch.from_numpy(pictures) if isinstance(pictures, np.ndarray) else pictures
        pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
        pictures = pictures.movedim(-1, 1)
        if pictures.shape[-2:] != (READ_SIZE, READ_SIZE):
            pictures = F.interpolate(pictures, (READ_SIZE, READ_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        readings = []
        for chunk in pictures.split(batch):
            picked = {name: logits.argmax(1).tolist() for name, logits in self(chunk).items()}
            for i in range(len(chunk)):
                names = {head: values[picked[head][i]] for head, values in HEADS.items()}
                readings.append({"subject": names.pop("subject"), "prop": names.pop("prop"), "attributes": names})
        return readings


class Stage(nn.Module):
    """Halves the picture, then one residual pair of 3x3 convolutions."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.down = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width_out)
        self.conv1 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.down(x)))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(x + y)


def load_judge() -> Judge:
    """The shipped judge in eval mode, fp32."""
    judge = Judge()
    # How many batches a norm has seen is a whole number that counts in training alone.
    weights = {key: value for key, value in load_weights("judge").items() if "num_batches" not in key}
    judge.load_state_dict(weights, strict=False)
    return judge.eval()
