"""Public IP-Adapter files as image-only adapters, recognised by their keys and shapes and never by their names.

Layouts (arXiv 2308.06721; files of h94/IP-Adapter): `image_proj.*` turns what CLIP vision says of a picture into
tokens; `ip_adapter.{1,3,5...}.to_k_ip.weight` / `to_v_ip.weight` are the branch, blocks in the order down, up, mid.

  base       proj, norm                                    one embedding [C]               -> 4 tokens
  plus       latents, proj_in, layers.*, proj_out, norm_out  penultimate states [T, E]     -> 16 tokens
  full face  proj.0, proj.2, proj.3                        penultimate states [T, E]       -> T tokens

No picture is a zero embedding for base, and the states of an all-zero input for the others.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import FAMILY_OF_WIDTH, FORMAT_VERSION, AdapterFile, AdapterHeader, EmbeddingProjection
from .adapter_weights import OTHER_PREFIX, XLABS_PROJECTION, assign, check_shapes, weight_of
from .errors import AdapterError

# What a projection reads of CLIP vision.
EMBEDDING = "image_embeds"
STATES = "penultimate_hidden_states"
# CLIP vision models by the width of what they give.
ENCODERS = {
    EMBEDDING: {768: "CLIP ViT-L", 1152: "SigLIP so400m", 1024: "CLIP ViT-H", 1280: "CLIP ViT-bigG"},
    STATES: {1024: "CLIP ViT-L", 1280: "CLIP ViT-H", 1664: "CLIP ViT-bigG"},
}
# Of every published resampler; the file doesn't say it.
HEAD_WIDTH = 64
# InsightFace's embedding; no CLIP vision model has this width.
FACE_WIDTH = 512
PROJECTION = "image_proj."
BRANCH = "ip_adapter."
# One weight of each layout's projection that the others don't have: base, plus, full face.
LAYOUT_KEYS = {"proj.weight", "latents", "proj.3.weight"}


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
    """Latents [B, N, D] look at the states [B, T, D] and at themselves, as in Flamingo's perceiver (arXiv 2204.14198).
    Returns [B, N, D]."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(states), latents], dim=1)).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(heads(self.to_q(latents)), heads(k), heads(v))
        return self.to_out(attended.transpose(1, 2).flatten(2))


def heads(x: torch.Tensor) -> torch.Tensor:
    """[B, N, heads * 64] -> [B, heads, N, 64]."""
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


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
        states = self.proj_in(states)
        latents = self.latents.expand(len(states), -1, -1)
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
    file: AdapterFile | None = None

    @property
    def reads(self) -> str:
        """EMBEDDING or STATES."""
        return self.header.clip_vision["output"]

    @property
    def digest(self) -> str:
        """As a UserAdapter's."""
        return self.file.digest if self.file else ""

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
    return any(key.startswith((BRANCH, PROJECTION, OTHER_PREFIX, XLABS_PROJECTION)) for key in keys)


def build_image_adapter(name: str, tensors: dict[str, torch.Tensor], file: AdapterFile | None = None) -> ImageAdapter:
    """The adapter of a file's weights. Raises AdapterError with one sentence for a kind that isn't supported and for a
    weight that is missing or doesn't fit; ValueError for weights that don't fit together."""
    tensors = {re.sub(f"^{re.escape(OTHER_PREFIX)}", BRANCH, key): value for key, value in tensors.items()}
    kind = _unsupported_kind(tensors)
    if kind:
        raise AdapterError(
            f"{name} is {kind}, which PrefGen doesn't load: choose a base, plus or full-face IP-Adapter for SD1.5 or "
            "SDXL, or one for Flux.1."
        )
    with torch.device("meta"):
        projection, reads, width = _projection(name, tensors)
    assign(name, projection, PROJECTION, tensors)
    projection.eval().requires_grad_(False)
    text_width = _text_width(name, tensors)
    to_k_ip, to_v_ip = _branch(name, tensors, text_width)
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
    return ImageAdapter(header, projection, to_k_ip, to_v_ip, name, file)


def encoder_name(reads: str, width: int) -> str:
    """What people call a CLIP vision model whose embedding or states are so wide."""
    return ENCODERS[reads].get(width, f"a CLIP vision model of width {width}")


def other_width_of(reads: str, width: int) -> int | None:
    """How wide the states of a CLIP vision model are whose embedding is so wide, or the other way round; None for a
    model that isn't in ENCODERS."""
    name = ENCODERS[reads].get(width)
    other = ENCODERS[STATES if reads == EMBEDDING else EMBEDDING]
    return next((other_width for other_width, other_name in other.items() if other_name == name), None)


def _unsupported_kind(tensors: dict[str, torch.Tensor]) -> str:
    """What a file is, if it is something else than the three layouts; else nothing."""
    projection = {key.removeprefix(PROJECTION) for key in tensors if key.startswith(PROJECTION)}
    branch = [key for key in tensors if key.startswith(BRANCH)]
    if _is_face_id(tensors, projection):
        return "an IP-Adapter FaceID file"
    if "latents" in projection and _input_width(tensors) == FACE_WIDTH:
        return "an InstantID file"
    has_layout = bool(LAYOUT_KEYS & projection)
    numbers = [int(n) for n in re.findall(r"^ip_adapter\.(\d+)\.", "\n".join(branch), re.MULTILINE)]
    # A UNet's self-attentions take the even numbers, so a branch that has them is for something else.
    if any(n % 2 == 0 for n in numbers) or not (has_layout or numbers):
        return "an IP-Adapter for another kind of model"
    plain = all(re.fullmatch(r"ip_adapter\.\d+\.to_[kv]_ip\.weight", key) for key in branch)
    return "" if plain and (has_layout or not projection) else "an IP-Adapter of an unknown kind"


def _is_face_id(tensors: dict[str, torch.Tensor], projection: set[str]) -> bool:
    """Whether a file reads a face recogniser's embedding. projection: its projection's keys without their prefix."""
    if {"proj.0.weight", "norm.weight"} <= projection or any("lora" in key for key in tensors):
        return True
    return any("perceiver_resampler" in key for key in projection)


def _input_width(tensors: dict[str, torch.Tensor]) -> int | None:
    """What a resampler reads is so wide; None without one."""
    weight = tensors.get(PROJECTION + "proj_in.weight")
    return weight.shape[-1] if weight is not None and weight.ndim else None


def _projection(name: str, weights: dict[str, torch.Tensor]) -> tuple[nn.Module, str, int]:
    """(module of the right shape, what it reads, how wide that is)."""

    def size(key: str, dims: int = 2) -> torch.Size:
        return weight_of(name, weights, PROJECTION + key, dims).shape

    text_width = _text_width(name, weights)
    if PROJECTION + "latents" in weights:
        _, tokens, hidden = size("latents", 3)
        depth = len({key.split(".")[2] for key in weights if key.startswith(PROJECTION + "layers.")})
        inner = size("layers.0.0.to_q.weight")[0]
        ff = size("layers.0.1.1.weight")[0]
        if inner % HEAD_WIDTH:
            raise ValueError(f"an attention {inner} wide")
        width = size("proj_in.weight")[1]
        return Resampler(width, hidden, text_width, tokens, depth, inner, ff), STATES, width
    if PROJECTION + "proj.3.weight" in weights:
        width = size("proj.0.weight")[1]
        return StatesProjection(width, text_width), STATES, width
    rows, width = size("proj.weight")
    return EmbeddingProjection(width, text_width, max(1, rows // text_width)), EMBEDDING, width


def _text_width(name: str, weights: dict[str, torch.Tensor]) -> int:
    """X, the width of a user token: that of the layer norm every layout ends with."""
    if PROJECTION + "latents" in weights:
        norm = "norm_out.weight"
    else:
        norm = "proj.3.weight" if PROJECTION + "proj.3.weight" in weights else "norm.weight"
    return weight_of(name, weights, PROJECTION + norm, 1).shape[0]


def _branch(
    name: str, tensors: dict[str, torch.Tensor], text_width: int
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """to_k_ip and to_v_ip of blocks 1, 3, 5 ... without a gap."""
    branch = {key: value for key, value in tensors.items() if key.startswith(BRANCH)}
    blocks = max(1, math.ceil(len(branch) / 2))
    keys = [f"{BRANCH}{2 * i + 1}.to_k_ip.weight" for i in range(blocks)]
    values = [f"{BRANCH}{2 * i + 1}.to_v_ip.weight" for i in range(blocks)]
    shapes = {}
    for key, value in zip(keys, values, strict=True):
        shapes[key] = shapes[value] = (weight_of(name, branch, key, 2).shape[0], text_width)
    check_shapes(name, shapes, branch)
    return tuple(branch[key] for key in keys), tuple(branch[key] for key in values)
