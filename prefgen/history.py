"""The preference history: pictures with verdicts, cleaned of everything that graphs and folders may hold."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_ITEMS = 64
LONG_SIDE = 1024
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LIKED_BORDER, DISLIKED_BORDER = (0.25, 0.72, 0.35), (0.86, 0.27, 0.27)


@dataclass(frozen=True, eq=False)
class HistoryItem:
    """One picture and what the user said of it. image: float32 [H, W, 3] in 0..1 on the CPU."""

    image: torch.Tensor
    liked: bool
    prompt: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 of the picture's size and 8-bit values; neither verdict nor prompt."""
        pixels = (self.image * 255).round().to(torch.uint8).contiguous()
        return hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class PreferenceHistory:
    """Items in the order in which the MLLM reads them."""

    items: tuple[HistoryItem, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def liked(self) -> tuple[HistoryItem, ...]:
        return tuple(item for item in self.items if item.liked)

    @property
    def disliked(self) -> tuple[HistoryItem, ...]:
        return tuple(item for item in self.items if not item.liked)

    @cached_property
    def digest(self) -> str:
        """sha256 of pictures, verdicts and prompts in order."""
        lines = [f"{item.digest} {int(item.liked)} {item.prompt}" for item in self.items]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @classmethod
    def from_images(
        cls,
        liked: Sequence[torch.Tensor],
        disliked: Sequence[torch.Tensor] = (),
        liked_prompts: Sequence[str] = (),
        disliked_prompts: Sequence[str] = (),
    ) -> PreferenceHistory:
        """A history with liked and disliked pictures by turns.

        Pictures: tensors [H, W, C] or batches [B, H, W, C], C of 1 to 4, values 0..1, any size. Raises ValueError with
        one sentence for no liked picture, or for values that are not numbers.
        """
        sides = []
        for images, prompts, verdict in ((liked, liked_prompts, True), (disliked, disliked_prompts, False)):
            pictures = [p for image in images for p in (image if image.ndim == 4 else image[None])]
            texts = list(prompts) + [""] * (len(pictures) - len(prompts))
            word = "liked" if verdict else "disliked"
            sides.append(
                [
                    HistoryItem(clean_picture(p, f"{word} picture {i + 1}"), verdict, t)
                    for i, (p, t) in enumerate(zip(pictures, texts, strict=False))
                ]
            )
        if not sides[0]:
            raise ValueError("The history has no liked pictures: connect at least one picture to `liked`.")
        if sum(map(len, sides)) > MAX_ITEMS:
            logging.warning("PrefGen reads the newest %d pictures of a history of %d.", MAX_ITEMS, sum(map(len, sides)))
            keep_disliked = min(len(sides[1]), max(MAX_ITEMS // 2, MAX_ITEMS - len(sides[0])))
            sides = [sides[0][-(MAX_ITEMS - keep_disliked) :], sides[1][len(sides[1]) - keep_disliked :]]
        turns = (item for pair in zip_longest(*sides) for item in pair if item is not None)
        return cls(tuple(turns))

    @classmethod
    def from_folder(cls, path: str | Path, limit: int = 40) -> PreferenceHistory:
        """Read `path`/liked and `path`/disliked (optional): PNG, JPEG or WebP in order of name, the newest `limit` of
        each; a text file of the same name holds the prompt. Raises ValueError or FileNotFoundError with one sentence.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(
                f"The history folder {path.name} is not there: choose another, or create it with a "
                "`liked` sub folder of pictures."
            )
        sides = [picture_files(path / side)[-limit:] for side in ("liked", "disliked")]
        if not sides[0]:
            raise ValueError(
                f"The history folder {path.name} has no pictures in its `liked` sub folder: put at least one "
                "PNG, JPEG or WebP there."
            )
        pictures = [[read_picture(file) for file in files] for files in sides]
        prompts = [[prompt_of(file) for file in files] for files in sides]
        return cls.from_images(*pictures, *prompts)


def picture_files(folder: Path) -> list[Path]:
    """Pictures directly in a folder, by name; none if there is no such folder."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def read_picture(file: Path) -> torch.Tensor:
    """A picture file as float32 [H, W, C] in 0..1. Raises ValueError that names a file which can't be read."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion would cut at 255
                return torch.from_numpy(np.array(image, dtype=np.float32) / 65535)[..., None].clamp(0, 1)
            transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
            pixels = np.array(image.convert("RGBA" if transparent else "RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(
            f"The picture {file.name} in {file.parent.parent.name}/{file.parent.name} can't be read: replace "
            "or remove it."
        ) from error
    return torch.from_numpy(pixels).float() / 255


def prompt_of(file: Path) -> str:
    text = file.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8", errors="replace").split()) if text.is_file() else ""


def clean_picture(image: torch.Tensor, name: str = "picture") -> torch.Tensor:
    """Any picture [H, W, C] -> float32 [H, W, 3] in 0..1 on the CPU.

    Grey is repeated, alpha is laid on white, the long side is brought to at most 1024. Raises ValueError that names the
    picture for NaN, infinity, a missing side or another number of channels.
    """
    image = image.detach().cpu().float()
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or 0 in image.shape or image.shape[-1] > 4:
        raise ValueError(f"The {name} has the shape {[*image.shape]}, which is no picture [height, width, 1 to 4].")
    if not torch.isfinite(image).all():
        raise ValueError(
            f"The {name} holds values that are not numbers (NaN or infinity): check the node that makes it."
        )
    image = image.clamp(0, 1)
    channels = image.shape[-1]
    if channels in (2, 4):
        image = image[..., :-1] * image[..., -1:] + (1 - image[..., -1:])
    if image.shape[-1] == 1:
        image = image.expand(-1, -1, 3)
    height, width = image.shape[:2]
    if max(height, width) > LONG_SIDE:
        scale = LONG_SIDE / max(height, width)
        image = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    return image.contiguous()


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic with antialiasing, [H, W, 3] in 0..1; the same size is returned as it is."""
    if image.shape[:2] == (height, width):
        return image
    moved = image.movedim(-1, 0)[None]
    return F.interpolate(moved, (height, width), mode="bicubic", antialias=True)[0].movedim(0, -1).clamp(0, 1)


def montage(history: PreferenceHistory, columns: int = 8, cell: int = 96) -> torch.Tensor:
    """What was read, as one picture [1, H, W, 3]: liked pictures framed green, then disliked ones framed red."""
    shown = (*history.liked, *history.disliked)
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = torch.full((rows * cell, columns * cell, 3), 0.13)
    border, inner = 4, cell - 12
    for i, item in enumerate(shown):
        height, width = item.image.shape[:2]
        scale = inner / max(height, width)
        picture = resize(item.image, max(1, round(height * scale)), max(1, round(width * scale)))
        y, x = i // columns * cell + 2, i % columns * cell + 2
        sheet[y : y + cell - 4, x : x + cell - 4] = torch.tensor(LIKED_BORDER if item.liked else DISLIKED_BORDER)
        sheet[y + border : y + cell - 4 - border, x + border : x + cell - 4 - border] = 0.13
        top = y + border + (inner - picture.shape[0]) // 2
        left = x + border + (inner - picture.shape[1]) // 2
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet[None]
