"""Stage 4: judge B, which every reported figure is read by, trained on renders alone.

    python -m training.atelier.world.judge_b --runs runs/world

As judge A, of another width, another augmentation and another seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...common.config.command import arguments
from ...common.config.world import WorldSecondJudge
from .judges import shade, train_judge


def main() -> None:
    train_judge(arguments(WorldSecondJudge, __doc__), "judge_b", augment)


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in 0..1, half of them moved by up to 3 px and a third made smaller and large again."""
    if torch.rand(()) < 1 / 3:
        small = F.interpolate(pictures, scale_factor=0.75, mode="bilinear", antialias=True)
        pictures = F.interpolate(small, pictures.shape[-2:], mode="bicubic").clamp(0, 1)
    padded = F.pad(pictures, (3, 3, 3, 3), mode="replicate")
    corners = torch.where(torch.rand(len(pictures), 1) < 0.5, torch.randint(0, 7, (len(pictures), 2)), 3).tolist()
    side = pictures.shape[-1]
    moved = torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)])
    return shade(moved, 0.06, 0.02)


if __name__ == "__main__":
    main()
