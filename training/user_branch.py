"""The user branch beside the cross-attention of a diffusers UNet, for training and for painting while training."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from prefgen.branch import scaled_dot_product, user_residual


class UserAttention:
    """Text cross-attention plus the user branch. `keys_values` is set before each UNet call, None for no branch."""

    def __init__(self, attention):
        self.attention, self.keys_values = attention, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query = attn.to_q(hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out = self.attention(query, key, value, attn.heads)
        if self.keys_values is not None:
            k, v = (t.to(out.dtype) for t in self.keys_values)
            metadata = {"heads": attn.heads, "weight": 1.0, "attention": self.attention}
            out = out + user_residual(out, query, metadata, k, v)
        return attn.to_out[1](attn.to_out[0](out))


def product_attention(q, k, v, heads, **_):
    """Plain softmax attention [B, T, heads * d]: on CPUs it beats the fused kernel, backward above all."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def install(unet) -> list[UserAttention]:
    """Put the branch into every cross-attention of a diffusers UNet; returned in file order (down, up, mid)."""
    on_cpu = next(unet.parameters()).device.type == "cpu"
    plain, attention = (AttnProcessor, product_attention) if on_cpu else (AttnProcessor2_0, scaled_dot_product)
    processors = {
        name: UserAttention(attention) if name.endswith("attn2.processor") else plain() for name in unet.attn_processors
    }
    unet.set_attn_processor(dict(processors))  # it empties the one it is given
    return [processors[name] for name in unet.attn_processors if name.endswith("attn2.processor")]


def set_users(branch: list[UserAttention], keys_values: list | None) -> None:
    """K and V of the users for the next UNet call, a pair a block; None for no user branch."""
    for processor, pair in zip(branch, keys_values or [None] * len(branch), strict=True):
        processor.keys_values = pair


def own_projections(unet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The UNet's own (to_k, to_v) weights of every cross-attention, in file order, fp32."""
    modules = (
        unet.get_submodule(n.removesuffix(".processor")) for n in unet.attn_processors if n.endswith("attn2.processor")
    )
    return [tuple(m.weight.detach().float().cpu().clone() for m in (a.to_k, a.to_v)) for a in modules]
