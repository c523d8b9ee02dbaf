"""What differs between MLLM families: where the parts are, and how a picture stands in the text.

One small class a family; everything else in the package is the same for all.
"""

from __future__ import annotations

import torch


class Idefics3Family:
    """Idefics3 and SmolVLM: vision tower, pixel-shuffle connector, Llama decoder."""

    model_types = ("idefics3", "smolvlm")

    def __init__(self, model):
        self.vision = model.model.vision_model
        self.connector = model.model.connector
        self.text = model.model.text_model
        config = model.config
        self.image_size = config.vision_config.image_size
        self.patch_size = config.vision_config.patch_size
        self.tokens_per_image = (self.image_size // self.patch_size // config.scale_factor) ** 2
        self.image_token_id = config.image_token_id

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, S, S] in -1..1 -> image tokens [B, n, D]."""
        side = self.image_size // self.patch_size
        mask = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
        states = self.vision(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
        return self.connector(states)

    def image_text(self, image_token: str) -> str:
        """How one unsplit picture is written in a chat template's text."""
        return f"<fake_token_around_image><global-img>{image_token * self.tokens_per_image}<fake_token_around_image>"


FAMILIES = (Idefics3Family,)


def family_of(model_type: str) -> type | None:
    """The class for a config's model_type, or None for a family that PrefGen doesn't know."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
