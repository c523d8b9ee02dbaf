"""The atelier's CLIP (transformers CLIPModel) as stages and measures read with it."""

from __future__ import annotations

import torch
from transformers import CLIPModel


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [B, T], padded as ComfyUI pads."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def text_features(model: CLIPModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [B, T, 128], projected pooled embedding [B, 128]) of token ids [B, T]."""
    output = model.text_model(input_ids=ids)
    return output.last_hidden_state, model.text_projection(output.pooler_output)


def image_features(model: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, 128, 128] in -1..1 -> projected embedding [B, 128], not normalised."""
    return model.visual_projection(model.vision_model(pixel_values=pictures).pooler_output)
