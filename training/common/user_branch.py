"""The parallel user cross-attention of PrefGen (arXiv 2512.06020), in a diffusers UNet, for training and measuring.

Every cross-attention block keeps its text attention and adds a second one over the user tokens, with K and V
projections of its own: the decoupled cross-attention of IP-Adapter (arXiv 2308.06721). In ComfyUI the same residual is
added by prefgen/comfy/run.py; `prefgen.branch.user_residual` is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from prefgen.branch import scaled_dot_product, user_residual

if TYPE_CHECKING:
    from .flux import FluxUserAttention

# (K, V) [B, N, width] of every block, in file order.
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


class UserAttention:
    """Text cross-attention plus the user branch, for diffusers blocks. `keys_values` is set before each UNet call.

    attention: a function (q, k, v, heads) -> [B, T, heads * d].
    """

    def __init__(self, attention: Callable | None = None):
        self.attention = attention or product_attention
        self.keys_values: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.to_q(hidden_states)
        keys = attn.to_k(encoder_hidden_states)
        values = attn.to_v(encoder_hidden_states)
        out = self.attention(query, keys, values, attn.heads)
        if self.keys_values is not None:
            user_keys, user_values = (t.to(out.dtype) for t in self.keys_values)
            out = out + user_residual(query, user_keys, user_values, attn.heads, attention=self.attention)
        linear, dropout = attn.to_out
        return dropout(linear(out))


# What is connected in every place of the branch, in file order.
Branch = Sequence["UserAttention | FluxUserAttention"]


def install(unet, fused: bool = False) -> Branch:
    """Put the branch into every cross-attention of a diffusers UNet, or every double block of a Flux transformer;
    returned in file order (down, up, mid).

    fused: torch's own attention kernels, which tiny UNets on a CPU are slower with.
    """
    if is_flux(unet):
        # Here, since it imports every way to quantise: seconds for those who train something else.
        from .flux import install_flux

        return install_flux(unet)
    attention = scaled_dot_product if fused else product_attention
    self_attention = AttnProcessor2_0 if fused else AttnProcessor
    processors = {
        name: UserAttention(attention) if _is_cross_attention(name) else self_attention()
        for name in unet.attn_processors
    }
    # A copy, since it empties the mapping that it is handed.
    unet.set_attn_processor(dict(processors))
    return [processors[name] for name in unet.attn_processors if _is_cross_attention(name)]


def connect(branch: Branch, keys_values: KeysValues | None) -> None:
    """Set K and V of every block for the next call of the UNet; None is the plain UNet."""
    pairs = [None] * len(branch) if keys_values is None else keys_values
    for processor, pair in zip(branch, pairs, strict=True):
        processor.keys_values = pair


def own_projections(unet) -> KeysValues:
    """The model's own (to_k, to_v) weights [width, X] of every place that the branch is in, in file order: where
    training starts."""
    if is_flux(unet):
        from .flux import flux_projections

        return flux_projections(unet)
    blocks = [
        unet.get_submodule(name.removesuffix(".processor"))
        for name in unet.attn_processors
        if _is_cross_attention(name)
    ]
    return [(block.to_k.weight.detach().clone(), block.to_v.weight.detach().clone()) for block in blocks]


def is_flux(unet) -> bool:
    """Whether a denoiser is a Flux transformer of diffusers'."""
    return hasattr(unet, "single_transformer_blocks")


def product_attention(q, k, v, heads, **_):
    """Plain softmax attention [B, T, heads * d]: with few keys it beats a CPU's fused kernel, backward above all."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _is_cross_attention(processor: str) -> bool:
    # diffusers calls a block's self-attention attn1, its cross-attention attn2.
    return processor.endswith("attn2.processor")
