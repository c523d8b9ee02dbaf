"""A CLIP image encoder of transformers by its folder: what gives e_img on real bases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from prefgen.errors import MendableError
from prefgen.image_encoder import described

PICTURES_AT_ONCE = 16
# What transformers and safetensors raise for a broken folder. Not TypeError: that would be a call of ours.
BROKEN_FOLDER = (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError)


class ClipVisionError(MendableError):
    """An image encoder that can't be used: one sentence."""


class ClipVision:
    """transformers' CLIPVisionModelWithProjection. Gives image embeddings, float32 [B, I], not normalised.

    about: what `image_encoder.described` tells of it. ClipVisionError for a folder that isn't one, or not whole.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        from transformers import CLIPVisionModelWithProjection

        try:
            model, report = CLIPVisionModelWithProjection.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except BROKEN_FOLDER as error:
            raise ClipVisionError(
                f"{folder} is no CLIP vision folder of transformers with safetensors weights: download it whole."
            ) from error
        # transformers draws at random what a folder lacks, such as all of a SigLIP or the projection of a bare tower.
        absent = sorted(report["missing_keys"])
        if absent:
            raise ClipVisionError(
                f"{folder} lacks {absent[0]}{' and more' if absent[1:] else ''}: it is no CLIP vision model with its "
                "projection. Choose one that is, such as CLIP ViT-H."
            )
        self.about = described(model.state_dict())
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        rows = []
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            pixels = clip_pixels(pictures[start : start + PICTURES_AT_ONCE], self.model.config.image_size)
            output = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
            rows.append(output.image_embeds.float().cpu())
        return torch.cat(rows)


def clip_pixels(pictures: Sequence[Image.Image], side: int) -> torch.Tensor:
    """[B, 3, side, side] as CLIP wants them: shorter side resized (bicubic), middle cut out, normalised."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return processor(images=list(pictures), return_tensors="pt").pixel_values
