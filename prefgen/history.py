"""The preference history: pictures with verdicts, cleaned of everything that graphs and folders may hold."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import torch

from .history_folder import VERDICTS, HistoryFolder, left_out
from .pictures import LONG_SIDE, as_tensor, clean_picture, resize

MAX_ITEMS = 64
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
    """Items in the order in which the MLLM reads them. left_out: what to tell of pictures that a folder holds and that
    can't be read, "" for none."""

    items: tuple[HistoryItem, ...]
    left_out: str = ""

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
            keep = shares(*map(len, sides))
            sides = [items[len(items) - count :] for items, count in zip(sides, keep, strict=True)]
        turns = (item for pair in zip_longest(*sides) for item in pair if item is not None)
        return cls(tuple(turns))

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        limit: int = 40,
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
    ) -> PreferenceHistory:
        """Read the newest `limit` pictures of `path`/liked and `path`/disliked (optional), oldest first.

        See `HistoryFolder` for what counts and in which order; a text file of the same name holds a picture's prompt. A
        picture that can't be read is named in the log and in `left_out`; the rest is read. progress(done, total) is
        called as pictures are read; interrupt() is called before each and may raise. Raises ValueError or
        FileNotFoundError with one sentence.
        """
        folder = HistoryFolder(path)
        counts = shares(*(min(limit, len(folder.files[verdict])) for verdict in VERDICTS))
        pictures, broken = folder.read(dict(zip(VERDICTS, counts, strict=True)), progress, interrupt)
        message = left_out(broken, folder.name)
        if message:
            logging.warning("PrefGen: %s", message)
        tensors = ([as_tensor(picture.pixels) for picture in pictures[verdict]] for verdict in VERDICTS)
        prompts = ([picture.prompt for picture in pictures[verdict]] for verdict in VERDICTS)
        return replace(cls.from_images(*tensors, *prompts), left_out=message)


def shares(liked: int, disliked: int) -> tuple[int, int]:
    """How many liked and disliked pictures are read of so many: all, or MAX_ITEMS together, half and half where both
    sides have that many."""
    disliked = min(disliked, max(MAX_ITEMS // 2, MAX_ITEMS - liked))
    return min(liked, MAX_ITEMS - disliked), disliked


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


__all__ = ["LONG_SIDE", "MAX_ITEMS", "HistoryItem", "PreferenceHistory", "clean_picture", "montage", "resize", "shares"]
