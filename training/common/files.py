"""Weights, arrays and pictures, written so that a reader sees the old file or the new one, never a part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prefgen.files import atomic_file, write_atomic


def save_weights(
    state: dict[str, torch.Tensor],
    path: Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a safetensors file atomically; floating tensors are stored as `dtype`."""
    from safetensors.torch import save

    state = {k: (v.to(dtype) if v.dtype.is_floating_point else v).contiguous() for k, v in state.items()}
    write_atomic(path, save(state, metadata=metadata))


def save_array(array: np.ndarray, path: Path) -> None:
    """Write a .npy file atomically."""
    with atomic_file(path) as file:
        np.save(file, array)


def grid_of(pictures: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Pictures [B, 3, H, W] in -1..1 side by side: uint8 [3, H', W']."""
    from torchvision.utils import make_grid

    shown = pictures.detach().float().cpu().clamp(-1, 1) * 0.5 + 0.5
    return (make_grid(shown, nrow=columns, padding=2) * 255 + 0.5).to(torch.uint8)


def picture_grid(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Save pictures [B, 3, H, W] in -1..1 as one PNG, atomically."""
    save_image(Image.fromarray(grid_of(pictures, columns).movedim(0, -1).numpy()), path)


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Write a picture atomically, in the format that its name ends in. options: Pillow's, such as quality."""
    with atomic_file(path) as file:
        image.save(file, Image.registered_extensions()[path.suffix], **options)
