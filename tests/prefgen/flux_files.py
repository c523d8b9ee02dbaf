"""Public IP-Adapter files for Flux.1: the published keys and shapes, and the same narrowed to a tiny transformer.

XLabs' keys and shapes are those that InvokeAI lists of flux-ip-adapter and flux-ip-adapter-v2, InstantX' those that its
loader reads of FLUX.1-dev-IP-Adapter, whose pickle holds two dicts that a safetensors copy flattens.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Sizes:
    text: int = 4096
    width: int = 3072
    doubles: int = 19
    singles: int = 38
    clip: int = 768
    siglip: int = 1152
    many: int = 128  # InstantX' tokens


PUBLISHED = Sizes()
TINY = Sizes(text=64, width=256, doubles=2, singles=2, clip=24, siglip=20, many=6)
# (tokens, numbers of the branch, parameters in millions) of the published files.
FACTS = {"xlabs-v1": (4, 19, 490.9), "xlabs-v2": (16, 19, 528.7), "instantx": (128, 57, 2645.6)}
XLABS = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj."


def shapes(kind: str, sizes: Sizes = PUBLISHED) -> dict[str, tuple[int, ...]]:
    """kind: of FACTS, or "diffusers" for XLabs' v1 as diffusers spells it."""
    text, width = sizes.text, sizes.width
    norm = {"norm.weight": (text,), "norm.bias": (text,)}
    if kind == "instantx":
        hidden = 2 * sizes.siglip
        proj = {"proj.0.weight": (hidden, sizes.siglip), "proj.0.bias": (hidden,)}
        proj |= {"proj.2.weight": (sizes.many * text, hidden), "proj.2.bias": (sizes.many * text,)}
        keys = {f"image_proj.{key}": shape for key, shape in (proj | norm).items()}
        blocks = range(sizes.doubles + sizes.singles)
        return keys | {f"ip_adapter.{i}.to_{side}_ip.weight": (width, text) for i in blocks for side in "kv"}
    rows = (16 if kind == "xlabs-v2" else 4) * text
    proj = {"proj.weight": (rows, sizes.clip), "proj.bias": (rows,)} | norm
    diffusers = kind == "diffusers"
    prefix = "image_proj." if diffusers else "ip_adapter_proj_model."
    keys = {prefix + key: shape for key, shape in proj.items()}
    for i in range(sizes.doubles):
        for side in "kv":
            name = f"ip_adapter.{i}.to_{side}_ip." if diffusers else XLABS.format(i, side)
            keys |= {name + "weight": (width, text), name + "bias": (width,)}
    return keys


def tensors(kind: str, sizes: Sizes = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """A file's weights, of a size that lets every part of it count."""
    generator = torch.Generator().manual_seed(seed)

    def random(key, shape):
        if len(shape) > 1:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return torch.randn(shape, generator=generator) * 0.3 + key.endswith("norm.weight")

    return {key: random(key, shape) for key, shape in shapes(kind, sizes).items()}


def write(folder, kind: str, sizes: Sizes = TINY, seed: int = 0):
    path = folder / f"{kind}.safetensors"
    save_file(tensors(kind, sizes, seed), path)
    return path
