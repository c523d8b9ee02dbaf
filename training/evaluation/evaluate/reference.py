"""Reference attention, the training-free way: self-attention also looks at the history's pictures.

FABRIC (arXiv 2307.10159): at every step the liked and the disliked pictures are noised to the step's level and read by
the same UNet; the states before each self-attention are kept, and the picture's own self-attention sees them beside its
own, the liked ones in the half with the prompt, the disliked ones in the unconditional half.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor


class ReferenceAttention(AttnProcessor):
    """Self-attention that keeps its input while `reading`, and otherwise also looks at what was kept."""

    def __init__(self):
        super().__init__()
        self.reading, self.kept, self.weight = False, None, 1.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if self.reading:
            self.kept = hidden_states
        if self.reading or self.kept is None:
            return super().__call__(attn, hidden_states)
        halves = self.kept.unflatten(0, (2, -1)).flatten(1, 2)  # [2, pictures * T, C]: disliked, liked
        each = len(hidden_states) // 2
        query, own = attn.to_q(hidden_states), hidden_states.shape[1]
        key, value = (
            torch.cat([project(hidden_states), project(halves).repeat_interleave(each, 0)], 1)
            for project in (attn.to_k, attn.to_v)
        )
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        bias = torch.zeros(key.shape[2], dtype=query.dtype)
        bias[own:] = math.log(self.weight)  # a factor on what a reference's token would weigh
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(own, -1))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def install(unet) -> list[ReferenceAttention]:
    """Put reference attention into every self-attention of a diffusers UNet; the other processors stay."""
    found = {name: ReferenceAttention() for name in unet.attn_processors if name.endswith("attn1.processor")}
    unet.set_attn_processor(dict(unet.attn_processors) | found)
    return list(found.values())


class Referenced:
    """A UNet whose every call first reads the references at the same noise level.

    disliked, liked: as many clean latents [n, c, h, w] of unit variance each. empty: text states [1, T, X].
    """

    def __init__(self, unet, processors: list[ReferenceAttention], disliked, liked, empty, alphas, weight: float):
        self.unet, self.processors, self.config = unet, processors, unet.config
        self.clean, self.empty, self.alphas, self.weight = torch.cat([disliked, liked]), empty, alphas, weight
        self.noise = torch.randn(self.clean.shape, generator=torch.Generator().manual_seed(0))

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor):
        level = self.alphas[timestep].float()
        noisy = level.sqrt() * self.clean + (1 - level).sqrt() * self.noise
        try:
            for processor in self.processors:
                processor.reading, processor.weight = True, self.weight
            self.unet(noisy, timestep, self.empty.expand(len(noisy), -1, -1))
            for processor in self.processors:
                processor.reading = False
            return self.unet(latents, timestep, states)
        finally:
            for processor in self.processors:
                processor.reading, processor.kept = False, None
