"""Histories as lists of IMAGE tensors: from an artist's folder, or drawn for a bundled example user."""

from __future__ import annotations

from pathlib import Path

import torch

from ..history import PreferenceHistory

EXAMPLE_PICTURES, EXAMPLE_SEED = 8, 1


def load(history: Path | int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(liked, disliked): pictures [1, H, W, 3] in 0..1, each in its own size.

    history: a folder (see `PreferenceHistory.from_folder` for what is refused), or the number of an example user.
    """
    if isinstance(history, int):
        return _draw(history)
    read = PreferenceHistory.from_folder(history)
    return [item.image[None] for item in read.liked], [item.image[None] for item in read.disliked]


def _draw(number: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    from ..atelier import users
    from ..atelier.renderer import render

    examples = users.history(users.user(number), EXAMPLE_PICTURES, EXAMPLE_PICTURES, EXAMPLE_SEED)
    drawn = [(torch.from_numpy(render(e.scene)).float()[None] / 255, e.liked) for e in examples]
    return [p for p, liked in drawn if liked], [p for p, liked in drawn if not liked]
