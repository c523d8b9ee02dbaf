"""A CLIP image encoder by path, which gives e_img."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from prefgen.image_encoder import described

from ..scores import BATCH, BROKEN, ScoreError, clip_pixels


class Vision:
    """transformers' CLIPVisionModelWithProjection. Gives image embeddings, float32 [B, I], not normalised. about: what
    `image_encoder.described` tells of it."""

    def __init__(self, folder: Path, device: str = "cpu"):
        from transformers import CLIPVisionModelWithProjection

        try:
            model, report = CLIPVisionModelWithProjection.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except BROKEN as error:
            raise ScoreError(
                f"{folder} is no CLIP vision folder of transformers with safetensors weights: download it whole."
            ) from error
        # transformers draws at random what a folder lacks, such as all of a SigLIP or the projection of a bare tower.
        absent = sorted(report["missing_keys"])
        if absent:
            raise ScoreError(
                f"{folder} lacks {absent[0]}{' and more' if absent[1:] else ''}: it is no CLIP vision model with its "
                "projection. Choose one that is, such as CLIP ViT-H."
            )
        self.about = described(model.state_dict())
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        rows, side = [], self.model.config.image_size
        for start in range(0, len(pictures), BATCH):
            pixels = clip_pixels(pictures[start : start + BATCH], side).to(self.model.device, self.model.dtype)
            rows.append(self.model(pixel_values=pixels).image_embeds.float().cpu())
        return torch.cat(rows)
