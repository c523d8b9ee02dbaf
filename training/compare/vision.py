"""A CLIP image encoder by path, which gives e_img."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..evaluate.scores import BATCH, ScoreError, clip_pixels


class Vision:
    """transformers' CLIPVisionModelWithProjection. Gives image embeddings, float32 [B, I], not normalised."""

    def __init__(self, folder: Path, device: str = "cpu"):
        from transformers import CLIPVisionModelWithProjection

        try:
            model = CLIPVisionModelWithProjection.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers and safetensors raise many kinds for a broken folder
            raise ScoreError(
                f"{folder} is no CLIP vision folder of transformers with safetensors weights: download it whole."
            ) from error
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        rows, side = [], self.model.config.image_size
        for start in range(0, len(pictures), BATCH):
            pixels = clip_pixels(pictures[start : start + BATCH], side).to(self.model.device, self.model.dtype)
            rows.append(self.model(pixel_values=pixels).image_embeds.float().cpu())
        return torch.cat(rows)
