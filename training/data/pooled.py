"""What a history shows without a decoder: the controls that the MLLM's reading is measured against.

Both take the place of H: a "layer" for the liked pictures and one for the disliked ones, each a mean over pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .image_encoders import ImageEncoder
from .readers import Reader
from .worlds import History


class StatesReader(Protocol):
    """Reads histories as H [B, layers, D]. fingerprint: as `PreferenceMLLM.fingerprint`."""

    @property
    def fingerprint(self) -> dict: ...

    def states(self, histories: Sequence[History]) -> torch.Tensor: ...


class PooledTokens:
    """Mean image tokens of the liked and of the disliked pictures, [B, 2, D]; zeros for a side without pictures."""

    def __init__(self, reader: Reader):
        self.reader = reader

    @property
    def fingerprint(self) -> dict:
        return self.reader.fingerprint | {"num_layers": 2, "states": "tokens"}

    @torch.inference_mode()
    def states(self, histories: Sequence[History]) -> torch.Tensor:
        width = self.fingerprint["hidden_size"]
        # Qwen3-VL's tokens carry deeper layers behind their own channels.
        return side_means(histories, lambda numbers: self.reader.features(numbers)[:, :width].cpu(), width)


class PooledEmbeddings:
    """Mean CLIP embeddings of the liked and of the disliked pictures, [B, 2, I]; zeros for a side without pictures."""

    def __init__(self, encoder: ImageEncoder):
        self.encoder = encoder

    @property
    def fingerprint(self) -> dict:
        width = self.encoder.about["width"]
        return {"name": self.encoder.about["name"], "num_layers": 2, "hidden_size": width, "states": "embeddings"}

    @torch.inference_mode()
    def states(self, histories: Sequence[History]) -> torch.Tensor:
        return side_means(histories, self.encoder, self.encoder.about["width"])


def side_means(histories: Sequence[History], read, width: int) -> torch.Tensor:
    """[B, 2, width]: the mean of read(numbers) [n, width] over the liked and over the disliked pictures."""
    rows = []
    for history in histories:
        sides = [history.pictures[history.liked], history.pictures[~history.liked]]
        rows.append(torch.stack([read(side).mean(0) if len(side) else torch.zeros(width) for side in sides]))
    return torch.stack(rows).float()
