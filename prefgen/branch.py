"""The user branch of one cross-attention: attention to the user's tokens beside the attention to the text.

`out = attention(q, K_text, V_text) + weight * attention(q, K_user, V_user)` (IP-Adapter, arXiv 2308.06721; PrefGen).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F


def user_residual(
    base_output: torch.Tensor,
    query: torch.Tensor,
    metadata: Mapping,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the user adds to one cross-attention; same shape, dtype and device as `base_output`.

    base_output, query: [B, T, heads * dim_head]. k, v: [B or 1, N, heads * dim_head], already projected.
    metadata: "heads" (int), "weight" (float, 1 if it is missing), "attention": a function (q, k, v, heads) ->
    [B, T, heads * dim_head] such as ComfyUI's optimized_attention, or None for torch's own.
    mask: [B or 1, T, 1] in 0..1, or None.
    """
    attention = metadata.get("attention") or scaled_dot_product
    if k.shape[0] != query.shape[0]:
        k, v = (x.expand(query.shape[0], -1, -1) for x in (k, v))
    weight = metadata.get("weight", 1.0)
    # The output is linear in V, which is a thousand times smaller.
    residual = attention(query, k, v if weight == 1 else v * weight, metadata["heads"])
    if mask is not None:
        residual = residual * mask
    return residual.to(base_output.dtype)


def scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """torch's attention on [B, T, heads * dim_head]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mask_to_tokens(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize masks [b, H, W] in 0..1 of any size to a block's (height, width): [b, height * width, 1], row by row."""
    height, width = size
    # Averages where the mask shrinks, so that thin parts count for what they cover.
    area = mask.shape[-2] >= height and mask.shape[-1] >= width
    mode = {"mode": "area"} if area else {"mode": "bilinear", "align_corners": False}
    resized = F.interpolate(mask[:, None].float(), size, **mode).flatten(2).transpose(1, 2)
    # Interpolation leaves ones a hair below one, and a mask of ones must equal no mask exactly.
    return torch.where(resized > 1 - 1e-5, 1.0, resized)
