"""Public IP-Adapter files for Flux.1 as image-only adapters, recognised by their keys and shapes.

  XLabs      ip_adapter_proj_model.{proj,norm}, double_blocks.N.processor.ip_adapter_double_stream_{k,v}_proj
             one CLIP ViT-L embedding -> Linear and norm -> 4 (v1) or 16 (v2) tokens
  diffusers  image_proj.{proj,norm}, ip_adapter.N.to_{k,v}_ip with biases: the same in another spelling, and the layout
             of PrefGen's own adapters for Flux
  InstantX   image_proj.{proj.0,proj.2,norm}, ip_adapter.N.to_{k,v}_ip without biases, double blocks before single ones
             one SigLIP embedding -> MLP and norm -> 128 tokens

Blocks are numbered 0, 1, 2 ..., where a UNet's cross-attentions take 1, 3, 5 ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import FLUX, FORMAT_VERSION, AdapterFile, AdapterHeader, EmbeddingProjection, UserProjection
from .adapter_weights import XLABS_PROJECTION, assign, check_shapes, weight_of
from .image_encoder import CLIP, SIGLIP
from .ip_adapter import BRANCH, EMBEDDING, PROJECTION, ImageAdapter, encoder_name

# How XLabs spells what diffusers' layout calls `ip_adapter.N.to_k_ip.`.
XLABS_BRANCH = re.compile(r"^double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_([kv])_proj\.")
NUMBERED = re.compile(r"^ip_adapter\.(\d+)\.to_[kv]_ip\.")
# What the published files read: the embeddings of CLIP ViT-L and of SigLIP so400m.
FLUX_WIDTHS = (768, 1152)
# Of every Flux.1 model; InstantX norms K and V for each head, and its file doesn't say how wide one is.
HEAD_WIDTH = 128
RMS_EPS = 1e-5


@dataclass(frozen=True, eq=False)
class FluxImageAdapter(ImageAdapter):
    """One public IP-Adapter file for Flux.1. k_bias, v_bias: [width] of every block, empty for InstantX' layout, which
    norms K and V in their place."""

    k_bias: tuple[torch.Tensor, ...] = ()
    v_bias: tuple[torch.Tensor, ...] = ()

    def keys_values(self, pictures: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As an ImageAdapter's."""
        if not self.header.in_attention:
            tokens = self.user_tokens(pictures)
            blocks = zip(self.to_k_ip, self.k_bias, self.to_v_ip, self.v_bias, strict=True)
            return [
                (F.linear(tokens, k.float(), k_bias.float()), F.linear(tokens, v.float(), v_bias.float()))
                for k, k_bias, v, v_bias in blocks
            ]
        return [(rms_normed(k), rms_normed(v)) for k, v in super().keys_values(pictures)]


def rms_normed(x: torch.Tensor) -> torch.Tensor:
    """[B, N, heads * 128] with every head brought to a root mean square of 1, without weights."""
    heads = x.unflatten(-1, (-1, HEAD_WIDTH))
    return (heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + RMS_EPS)).flatten(-2)


def is_flux(keys: Iterable[str]) -> bool:
    """Whether a file's keys are those of an IP-Adapter for Flux.1: XLabs' own, or a branch that numbers every block."""
    keys = list(keys)
    if any(XLABS_BRANCH.match(key) for key in keys):
        return True
    numbers = {int(match[1]) for match in map(NUMBERED.match, keys) if match}
    return {0, 1} <= numbers


def is_sd3(keys: Iterable[str]) -> bool:
    """Whether a file's keys are those of InstantX' IP-Adapter for SD3.5, whose tokens are normed by the step."""
    return any(re.match(r"ip_adapter\.\d+\.norm_ip\.", key) for key in keys)


def build_flux_adapter(
    name: str, tensors: Mapping[str, torch.Tensor], file: AdapterFile | None = None
) -> FluxImageAdapter:
    """The adapter of a file's weights that `is_flux`. Raises AdapterError with one sentence for a weight that is
    missing or doesn't fit; ValueError for weights that don't fit together."""
    tensors = {_usual_name(key): value for key, value in tensors.items()}
    in_attention = PROJECTION + "proj.0.weight" in tensors
    text_width = weight_of(name, tensors, PROJECTION + "norm.weight", 1).shape[0]
    with torch.device("meta"):
        projection, width, tokens = _projection(name, tensors, text_width, in_attention)
    assign(name, projection, PROJECTION, tensors)
    projection.eval().requires_grad_(False)
    parts = _branch(name, tensors, text_width, in_attention)
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind="ip_adapter",
        base_family=FLUX,
        semantic_width=0,
        core_width=0,
        image_width=width,
        cross_attention_dim=text_width,
        tokens=tokens,
        block_widths=[len(weight) for weight in parts["to_k_ip.weight"]],
        clip_vision={
            "name": encoder_name(EMBEDDING, width),
            "width": width,
            "output": EMBEDDING,
            "architecture": SIGLIP if in_attention else CLIP,
        },
        in_attention=in_attention,
    )
    keys, values = parts["to_k_ip.weight"], parts["to_v_ip.weight"]
    biases = parts.get("to_k_ip.bias", ()), parts.get("to_v_ip.bias", ())
    return FluxImageAdapter(header, projection, keys, values, name, file, *biases)


def _usual_name(key: str) -> str:
    """XLabs' names in diffusers' spelling, others as they are."""
    key = XLABS_BRANCH.sub(lambda match: f"{BRANCH}{match[1]}.to_{match[2]}_ip.", key)
    return PROJECTION + key.removeprefix(XLABS_PROJECTION) if key.startswith(XLABS_PROJECTION) else key


def _projection(
    name: str, tensors: Mapping[str, torch.Tensor], text_width: int, in_attention: bool
) -> tuple[nn.Module, int, int]:
    """(module of the right shape, width of the embedding that it reads, tokens that it gives)."""
    if in_attention:
        hidden, width = weight_of(name, tensors, PROJECTION + "proj.0.weight", 2).shape
        tokens = max(1, weight_of(name, tensors, PROJECTION + "proj.2.weight", 2).shape[0] // text_width)
        return UserProjection(width, text_width, tokens, hidden), width, tokens
    rows, width = weight_of(name, tensors, PROJECTION + "proj.weight", 2).shape
    tokens = max(1, rows // text_width)
    return EmbeddingProjection(width, text_width, tokens), width, tokens


def _branch(
    name: str, tensors: Mapping[str, torch.Tensor], text_width: int, in_attention: bool
) -> dict[str, tuple[torch.Tensor, ...]]:
    """{"to_k_ip.weight": one of every block, ...} of blocks 0, 1, 2 ... without a gap."""
    branch = {key: value for key, value in tensors.items() if key.startswith(BRANCH)}
    blocks = 1 + max(int(match[1]) for match in map(NUMBERED.match, branch) if match)
    ends = ["to_k_ip.weight", "to_v_ip.weight", *([] if in_attention else ["to_k_ip.bias", "to_v_ip.bias"])]
    width = weight_of(name, branch, f"{BRANCH}0.to_k_ip.weight", 2).shape[0]
    if in_attention and width % HEAD_WIDTH:
        raise ValueError(f"an attention {width} wide")
    shapes = {
        f"{BRANCH}{block}.{end}": (width, text_width) if end.endswith("weight") else (width,)
        for block in range(blocks)
        for end in ends
    }
    check_shapes(name, shapes, branch)
    return {end: tuple(branch[f"{BRANCH}{block}.{end}"] for block in range(blocks)) for end in ends}
