"""Stage 3: judge A, which every choice is made by, trained on renders alone.

    python -m training.atelier.world.judge_a --runs runs/world

In: the pool's pictures [B, 3, 128, 128] with what they show. Out: `judge_a.safetensors`. It never sees a generated
picture. Reports the accuracy of every head and R2 of every continuous trait on fresh renders.
"""

from __future__ import annotations

import torch

from ...common.config.command import arguments
from ...common.config.world import WorldJudge
from .judges import shade, soften, train_judge


def main() -> None:
    train_judge(arguments(WorldJudge, __doc__), "judge_a", augment)


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in 0..1, some of them blurred, all of them shaded a little."""
    return shade(soften(pictures, 0.9, 0.6), 0.04, 0.03)


if __name__ == "__main__":
    main()
