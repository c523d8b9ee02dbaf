"""The user branch of one cross-attention: attention to the user's tokens beside the attention to the text.

`out = attention(q, K_text, V_text) + weight * attention(q, K_user, V_user)`: the decoupled cross-attention of
IP-Adapter (arXiv 2308.06721). The paper's (arXiv 2512.06020) parallel user cross-attention reads the tokens of a user
there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """torch's attention on [B, T, heads * dim_head]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def split_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """The same of a query whose heads are split already, [B, T, heads, dim_head], and so are the result's."""
    k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


def user_residual(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    weight: float = 1.0,
    attention: Callable = scaled_dot_product,
) -> torch.Tensor:
    """What the user adds to one cross-attention; same shape, dtype and device as `query`.

    query: [B, T, heads * dim_head], or [B, T, heads, dim_head] for `split_attention`. k, v: [B or 1, N, heads *
    dim_head], already projected. mask: in 0..1, [B or 1, T, 1] or with one more 1 for split heads, or None.
    attention: a function (q, k, v, heads) -> as query.
    """
    if k.shape[0] != query.shape[0]:
        k = k.expand(query.shape[0], -1, -1)
        v = v.expand(query.shape[0], -1, -1)
    # The output is linear in V, which is a thousand times smaller.
    residual = attention(query, k, v if weight == 1 else v * weight, heads)
    if mask is not None:
        residual = residual * mask
    return residual.to(query.dtype)


def mask_to_tokens(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize masks [b, H, W] in 0..1 of any size to a block's (height, width): [b, height * width, 1], row by row."""
    height, width = size
    # Averages where the mask shrinks, so that thin parts count for what they cover.
    area = mask.shape[-2] >= height and mask.shape[-1] >= width
    mode = {"mode": "area"} if area else {"mode": "bilinear", "align_corners": False}
    resized = F.interpolate(mask[:, None].float(), size, **mode).flatten(2).transpose(1, 2)
    # Interpolation leaves ones a hair below one, and a mask of ones must equal no mask exactly.
    return torch.where(resized > 1 - 1e-5, 1.0, resized)
