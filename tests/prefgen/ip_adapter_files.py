"""Public IP-Adapter files with random weights: the published keys and shapes, the branch narrowed to a tiny UNet.

Keys and shapes of `image_proj`, numbers and order of the branch are those of h94/IP-Adapter; only the width of the
attentions (320, 640, 1280) is a tenth, unless a benchmark asks for more.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import save_file

# Cross-attentions in file order: down, up, mid.
WIDTHS = {
    "sd15": [32] * 2 + [64] * 2 + [128] * 2 + [128] * 3 + [64] * 3 + [32] * 3 + [128],
    "sdxl": [64] * 4 + [128] * 20 + [128] * 30 + [64] * 6 + [128] * 10,
}
TEXT = {"sd15": 768, "sdxl": 2048}


@dataclass(frozen=True)
class Layout:
    family: str
    kind: str  # base, plus, full
    width: int  # of the embedding, or of the states
    encoder: str


LAYOUTS = {
    "ip-adapter_sd15": Layout("sd15", "base", 1024, "CLIP ViT-H"),
    "ip-adapter_sd15_vit-G": Layout("sd15", "base", 1280, "CLIP ViT-bigG"),
    "ip-adapter-plus_sd15": Layout("sd15", "plus", 1280, "CLIP ViT-H"),
    "ip-adapter-full-face_sd15": Layout("sd15", "full", 1280, "CLIP ViT-H"),
    "ip-adapter_sdxl": Layout("sdxl", "base", 1280, "CLIP ViT-bigG"),
    "ip-adapter_sdxl_vit-h": Layout("sdxl", "base", 1024, "CLIP ViT-H"),
    "ip-adapter-plus_sdxl_vit-h": Layout("sdxl", "plus", 1280, "CLIP ViT-H"),
}


def image_proj_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    text, width = TEXT[layout.family], layout.width
    if layout.kind == "base":
        norm = {"norm.weight": (text,), "norm.bias": (text,)}
        return {"proj.weight": (4 * text, width), "proj.bias": (4 * text,)} | norm
    if layout.kind == "full":
        return {
            "proj.0.weight": (width, width),
            "proj.0.bias": (width,),
            "proj.2.weight": (text, width),
            "proj.2.bias": (text,),
            "proj.3.weight": (text,),
            "proj.3.bias": (text,),
        }
    hidden = {"sd15": 768, "sdxl": 1280}[layout.family]
    shapes = {
        "latents": (1, 16, hidden),
        "proj_in.weight": (hidden, width),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (text, hidden),
        "proj_out.bias": (text,),
        "norm_out.weight": (text,),
        "norm_out.bias": (text,),
    }
    for i in range(4):
        norms = ("0.norm1", "0.norm2", "1.0")
        shapes |= {f"layers.{i}.{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (hidden, hidden),
            f"layers.{i}.0.to_kv.weight": (2 * hidden, hidden),
            f"layers.{i}.0.to_out.weight": (hidden, hidden),
            f"layers.{i}.1.1.weight": (4 * hidden, hidden),
            f"layers.{i}.1.3.weight": (hidden, 4 * hidden),
        }
    return shapes


def tensors(name: str, seed: int = 0, times: int = 1) -> dict[str, torch.Tensor]:
    """A whole file of one layout, weights of a size that lets every part of it count."""
    layout, generator = LAYOUTS[name], torch.Generator().manual_seed(seed)

    def random(shape):
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        return torch.randn(shape, generator=generator) * scale

    shapes = {f"image_proj.{key}": shape for key, shape in image_proj_shapes(layout).items()}
    for i, width in enumerate(WIDTHS[layout.family]):
        for side in "kv":
            shapes[f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight"] = (times * width, TEXT[layout.family])
    return {key: random(shape) + (len(shape) == 1 and key.endswith("weight")) for key, shape in shapes.items()}


def write(folder, name: str, seed: int = 0, times: int = 1, dtype: torch.dtype = torch.float32):
    """times: 10 for the published widths."""
    path = folder / f"{name}.safetensors"
    save_file({key: value.to(dtype) for key, value in tensors(name, seed, times).items()}, path)
    return path
