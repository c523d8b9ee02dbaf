"""Reference attention, the training-free way: self-attention also looks at the history's pictures.

FABRIC (arXiv 2307.10159): at every step the liked and the disliked pictures are noised to the step's level and read by
the same UNet; the states before each self-attention are noted, and the picture's own self-attention sees them beside
its own, the liked ones in the half with the prompt, the disliked ones in the unconditional half.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor

from prefgen.atelier.models import alphas_cumprod

from ..common.sampling import atelier_scheduler


class ReferenceAttention(AttnProcessor):
    """Self-attention that notes its input while `reading`, and otherwise also looks at what it noted."""

    def __init__(self):
        super().__init__()
        self.reading = False
        self.references: torch.Tensor | None = None  # [2 * pictures, T, C], the disliked ones first
        self.weight = 1.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if self.reading:
            self.references = hidden_states
        if self.reading or self.references is None:
            return super().__call__(attn, hidden_states)
        tokens = hidden_states.shape[1]
        each_half = len(hidden_states) // 2
        # [2, pictures * T, C]: the disliked for the unconditional half, the liked for the half with the prompt.
        references = self.references.unflatten(0, (2, -1)).flatten(1, 2)

        def with_references(project) -> torch.Tensor:
            return torch.cat([project(hidden_states), project(references).repeat_interleave(each_half, 0)], 1)

        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), with_references(attn.to_k), with_references(attn.to_v))
        )
        bias = torch.zeros(key.shape[2], dtype=query.dtype)
        # Added to a logit, the logarithm is a factor on what a reference's token would weigh.
        bias[tokens:] = math.log(self.weight)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(tokens, -1))
        linear, dropout = attn.to_out
        return dropout(linear(out.transpose(1, 2).flatten(2)))


def install(unet) -> list[ReferenceAttention]:
    """Put reference attention into every self-attention of a diffusers UNet; the other processors stay."""
    processors = {name: ReferenceAttention() for name in unet.attn_processors if name.endswith("attn1.processor")}
    unet.set_attn_processor(dict(unet.attn_processors) | processors)
    return list(processors.values())


class Referenced:
    """A UNet whose every call first reads the references at the same noise level.

    disliked, liked: as many clean latents [n, c, h, w] of unit variance each. empty: text states [1, T, X].
    """

    def __init__(self, unet, processors: list[ReferenceAttention], disliked, liked, empty, weight: float):
        self.unet = unet
        self.config = unet.config
        self.processors = processors
        self.clean = torch.cat([disliked, liked])
        self.empty = empty
        self.weight = weight
        self.scheduler = atelier_scheduler()
        # As the UNet was trained: the last level is nearly zero, where diffusers' own rescaling ends at zero.
        self.scheduler.alphas_cumprod = alphas_cumprod()
        self.noise = torch.randn(self.clean.shape, generator=torch.Generator().manual_seed(0))

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor):
        noisy = self.scheduler.add_noise(self.clean, self.noise, timestep)
        try:
            for processor in self.processors:
                processor.reading = True
                processor.weight = self.weight
            self.unet(noisy, timestep, self.empty.expand(len(noisy), -1, -1))
            for processor in self.processors:
                processor.reading = False
            return self.unet(latents, timestep, states)
        finally:
            for processor in self.processors:
                processor.reading = False
                processor.references = None
