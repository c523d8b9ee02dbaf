"""Public IP-Adapter files as image-only adapters, known by their keys and shapes and never by their names.

Layouts (arXiv 2308.06721; files of h94/IP-Adapter): `image_proj.*` turns what CLIP vision says of a picture into
tokens; `ip_adapter.{1,3,5...}.to_k_ip.weight` / `to_v_ip.weight` are the branch, blocks in the order down, up, mid.

  base       proj, norm                                    one embedding [C]               -> 4 tokens
  plus       latents, proj_in, layers.*, proj_out, norm_out  penultimate states [T, E]     -> 16 tokens
  full face  proj.0, proj.2, proj.3                        penultimate states [T, E]       -> T tokens

No picture is a zero embedding for base, and the states of an all-zero input for the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .header import FAMILY_OF_WIDTH, FORMAT_VERSION, AdapterError, AdapterHeader

EMBEDDING, STATES = "image_embeds", "penultimate_hidden_states"
# CLIP vision models by the width of what they give.
ENCODERS = {
    EMBEDDING: {768: "CLIP ViT-L", 1024: "CLIP ViT-H", 1280: "CLIP ViT-bigG"},
    STATES: {1024: "CLIP ViT-L", 1280: "CLIP ViT-H", 1664: "CLIP ViT-bigG"},
}
HEAD_WIDTH = 64  # of every published resampler
FACE_WIDTH = 512  # InsightFace's embedding; no CLIP vision model has this width
OTHER_PREFIX = "adapter_modules."  # what some converters write for `ip_adapter.`


class EmbeddingProjection(nn.Module):
    """Base: [B, C] -> [B, tokens, X]."""

    def __init__(self, width: int, cross_attention_dim: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(width, tokens * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


class StatesProjection(nn.Module):
    """Full face: every state becomes a token, [B, T, E] -> [B, T, X]."""

    def __init__(self, width: int, cross_attention_dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, cross_attention_dim), nn.LayerNorm(cross_attention_dim)
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.proj(states)


class PerceiverAttention(nn.Module):
    """Latents [B, N, D] look at the states [B, T, D] and at themselves. Returns [B, N, D]."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.norm2(latents)
        seen = torch.cat([self.norm1(states), latents], dim=1)
        qkv = (self.to_q(latents), *self.to_kv(seen).chunk(2, dim=-1))
        q, k, v = (x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for x in qkv)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Plus: a fixed number of learned latents read the states, [B, T, E] -> [B, tokens, X]."""

    def __init__(self, width: int, hidden: int, cross_attention_dim: int, tokens: int, depth: int, inner: int, ff: int):
        super().__init__()
        self.tokens = tokens
        self.latents = nn.Parameter(torch.zeros(1, tokens, hidden))
        self.proj_in = nn.Linear(width, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(hidden, inner),
                    nn.Sequential(
                        nn.LayerNorm(hidden),
                        nn.Linear(hidden, ff, bias=False),
                        nn.GELU(),
                        nn.Linear(ff, hidden, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(hidden, cross_attention_dim)
        self.norm_out = nn.LayerNorm(cross_attention_dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states, latents = self.proj_in(states), self.latents.expand(len(states), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(states, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


@dataclass(frozen=True, eq=False)
class ImageAdapter:
    """One public IP-Adapter file. `to_k_ip`, `to_v_ip`: [width, X] of every block in file order and in the file's own
    precision: an SDXL file is 0.8 GB at half precision, and each weight is used once a run."""

    header: AdapterHeader
    projection: nn.Module
    to_k_ip: tuple[torch.Tensor, ...]
    to_v_ip: tuple[torch.Tensor, ...]
    name: str = ""

    @property
    def reads(self) -> str:
        """EMBEDDING or STATES."""
        return self.header.clip_vision["output"]

    def user_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """k pictures a user, side by side: [B, k, C] or [B, k, T, E] -> [B, k * N, X]."""
        return self.projection(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).flatten(1, 2)

    def keys_values(self, pictures: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(K [B, k * N, width], V) of every block in file order; pictures fp32 as for `user_tokens`."""
        tokens = self.user_tokens(pictures)
        pairs = zip(self.to_k_ip, self.to_v_ip, strict=True)
        return [(F.linear(tokens, k.float()), F.linear(tokens, v.float())) for k, v in pairs]


def is_ip_adapter(keys) -> bool:
    """Whether a file's keys speak of an IP-Adapter of any kind, supported or not."""
    return any(key.startswith(("ip_adapter.", "image_proj.", OTHER_PREFIX, "ip_adapter_proj_model.")) for key in keys)


def build_image_adapter(name: str, tensors: dict[str, torch.Tensor]) -> ImageAdapter:
    """The adapter of a file's tensors. Raises AdapterError with one sentence for a kind that isn't supported; KeyError,
    RuntimeError or ValueError for weights that are missing or don't fit together."""
    tensors = {re.sub(f"^{re.escape(OTHER_PREFIX)}", "ip_adapter.", key): value for key, value in tensors.items()}
    image_proj = {k.removeprefix("image_proj."): v for k, v in tensors.items() if k.startswith("image_proj.")}
    other = _unsupported(tensors, image_proj)
    if other:
        raise AdapterError(
            f"{name} is {other}, which PrefGen doesn't load: choose a base, plus or full-face IP-Adapter for SD1.5 or "
            "SDXL."
        )
    projection, reads, width = _projection(image_proj)
    projection.load_state_dict({key: value.float() for key, value in image_proj.items()})
    projection.eval().requires_grad_(False)
    text_width = _norm_width(image_proj)
    to_k_ip, to_v_ip = (_branch(tensors, side, text_width) for side in "kv")
    if [len(k) for k in to_k_ip] != [len(v) for v in to_v_ip]:
        raise ValueError("to_k_ip and to_v_ip differ")
    header = AdapterHeader(
        format_version=FORMAT_VERSION,
        kind="ip_adapter",
        base_family=FAMILY_OF_WIDTH.get(text_width, f"a UNet with text width {text_width}"),
        semantic_width=0,
        core_width=0,
        image_width=width,
        cross_attention_dim=text_width,
        tokens=getattr(projection, "tokens", 0),
        block_widths=[len(weight) for weight in to_k_ip],
        clip_vision={"name": encoder_name(reads, width), "width": width, "output": reads},
    )
    return ImageAdapter(header, projection, to_k_ip, to_v_ip, name)


def encoder_name(reads: str, width: int) -> str:
    """What people call a CLIP vision model whose embedding or states are so wide."""
    return ENCODERS[reads].get(width, f"a CLIP vision model of width {width}")


def _unsupported(tensors: dict, image_proj: dict) -> str:
    """What a file is, if it is something else than the three layouts; else nothing."""
    if any("lora" in key for key in tensors) or any("perceiver_resampler" in key for key in image_proj):
        return "an IP-Adapter FaceID file"
    if {"proj.0.weight", "norm.weight"} <= image_proj.keys():
        return "an IP-Adapter FaceID file"
    if "latents" in image_proj and image_proj["proj_in.weight"].shape[-1] == FACE_WIDTH:
        return "an InstantID file"
    known = {"proj.weight", "latents", "proj.3.weight"} & image_proj.keys()
    numbers = [int(n) for n in re.findall(r"^ip_adapter\.(\d+)\.", "\n".join(tensors), re.MULTILINE)]
    # A UNet's self-attentions take the even numbers, so a branch that has them is for something else.
    if any(n % 2 == 0 for n in numbers) or not (known or numbers):
        return "an IP-Adapter for another kind of model"
    return "an IP-Adapter of an unknown kind" if image_proj and not known else ""


def _projection(weights: dict[str, torch.Tensor]) -> tuple[nn.Module, str, int]:
    """(module of the right shape, what it reads, how wide that is)."""
    if "latents" in weights:
        _, tokens, hidden = weights["latents"].shape
        width = weights["proj_in.weight"].shape[1]
        depth = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
        inner, ff = weights["layers.0.0.to_q.weight"].shape[0], weights["layers.0.1.1.weight"].shape[0]
        if inner % HEAD_WIDTH:
            raise ValueError(f"an attention {inner} wide")
        return Resampler(width, hidden, _norm_width(weights), tokens, depth, inner, ff), STATES, width
    if "proj.3.weight" in weights:
        width = weights["proj.0.weight"].shape[1]
        return StatesProjection(width, _norm_width(weights)), STATES, width
    rows, width = weights["proj.weight"].shape
    return EmbeddingProjection(width, _norm_width(weights), rows // _norm_width(weights)), EMBEDDING, width


def _norm_width(weights: dict[str, torch.Tensor]) -> int:
    """X, the width of a user token: that of the layer norm every layout ends with."""
    (norm,) = {"norm.weight", "norm_out.weight", "proj.3.weight"} & weights.keys()
    width = weights[norm].shape[0]
    if not width:
        raise ValueError(f"an empty {norm}")
    return width


def _branch(tensors: dict[str, torch.Tensor], side: str, text_width: int) -> tuple[torch.Tensor, ...]:
    """to_k_ip or to_v_ip of blocks 1, 3, 5 ... without a gap."""
    found = [key for key in tensors if re.fullmatch(rf"ip_adapter\.\d+\.to_{side}_ip\.weight", key)]
    weights = tuple(tensors[f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight"] for i in range(len(found)))
    if not weights or any(weight.ndim != 2 or weight.shape[1] != text_width for weight in weights):
        raise ValueError(f"to_{side}_ip")
    return weights
