"""The preference history: pictures with verdicts, cleaned of everything that graphs and folders may hold.

A user is known to PrefGen by nothing else than these few liked and disliked pictures (arXiv 2512.06020).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import torch

from .files import whole_letters
from .history_folder import VERDICTS, left_out
from .pictures import as_tensor, clean_picture, resize
from .tastes.reading import history_folder

MAX_ITEMS = 64
# Of the montage: RGB in 0..1, and pixels.
LIKED_BORDER = (0.25, 0.72, 0.35)
DISLIKED_BORDER = (0.86, 0.27, 0.27)
GROUND = 0.13
GAP = 2
BORDER = 4


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
    can't be read, "" for none. revision: of a taste with a journal, 8 hexadecimal digits."""

    items: tuple[HistoryItem, ...]
    left_out: str = ""
    revision: str = ""

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
        return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()

    @cached_property
    def pictures_digest(self) -> str:
        """sha256 of pictures and verdicts in order, whatever their prompts."""
        lines = [f"{item.digest} {int(item.liked)}" for item in self.items]
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
        liked_items = _items(liked, liked_prompts, True)
        disliked_items = _items(disliked, disliked_prompts, False)
        if not liked_items:
            raise ValueError("The history has no liked pictures: connect at least one picture to `liked`.")
        total = len(liked_items) + len(disliked_items)
        if total > MAX_ITEMS:
            logging.warning("PrefGen reads the newest %d pictures of a history of %d.", MAX_ITEMS, total)
            liked_count, disliked_count = shares(len(liked_items), len(disliked_items))
            liked_items = liked_items[len(liked_items) - liked_count :]
            disliked_items = disliked_items[len(disliked_items) - disliked_count :]
        # By turns, as in training (training/data/atelier_users.py: `interleaved`).
        turns = (item for pair in zip_longest(liked_items, disliked_items) for item in pair if item is not None)
        return cls(tuple(turns))

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        limit: int = 40,
        progress: Callable[[int, int], None] | None = None,
        interrupt: Callable[[], None] | None = None,
        revision: str = "",
    ) -> PreferenceHistory:
        """Read the newest `limit` pictures of `path`/liked and `path`/disliked (optional), oldest first.

        See `HistoryFolder` for what counts and in which order; where verdicts were given in the browser, the order is
        theirs. revision: 8 digits of an earlier state of the taste (`Taste.frozen`). A text file of the same name holds
        a picture's prompt. A picture that can't be read is named in the log and in `left_out`; the rest is read.
        progress(done, total) is called as pictures are read; interrupt() is called before each and may raise. Raises
        ValueError or FileNotFoundError with one sentence.
        """
        folder = history_folder(path, revision)
        liked_count, disliked_count = shares(*(min(limit, len(folder.files[verdict])) for verdict in VERDICTS))
        counts = {"liked": liked_count, "disliked": disliked_count}
        pictures, broken = folder.read(counts, progress, interrupt)
        message = left_out(broken, folder.name)
        if message:
            logging.warning("PrefGen: %s", message)
        history = cls.from_images(
            [as_tensor(picture.pixels) for picture in pictures["liked"]],
            [as_tensor(picture.pixels) for picture in pictures["disliked"]],
            [picture.prompt for picture in pictures["liked"]],
            [picture.prompt for picture in pictures["disliked"]],
        )
        return replace(history, left_out=message, revision=folder.revision)


def _items(images: Sequence[torch.Tensor], prompts: Sequence[str], liked: bool) -> list[HistoryItem]:
    """The items of one verdict. Prompts may be fewer than pictures; those beyond the pictures are left out.

    Half a letter in a prompt, which JSON may hold and no tokenizer takes, is "?"."""
    pictures = [picture for image in images for picture in (image if image.ndim == 4 else image[None])]
    verdict = "liked" if liked else "disliked"
    texts = [whole_letters(prompt) for prompt in prompts[: len(pictures)]]
    texts += [""] * (len(pictures) - len(texts))
    return [
        HistoryItem(clean_picture(picture, f"{verdict} picture {number}"), liked, prompt)
        for number, (picture, prompt) in enumerate(zip(pictures, texts, strict=True), 1)
    ]


def shares(liked: int, disliked: int) -> tuple[int, int]:
    """How many liked and disliked pictures are read of so many: all, or MAX_ITEMS together, half and half where both
    sides have that many."""
    disliked = min(disliked, max(MAX_ITEMS // 2, MAX_ITEMS - liked))
    return min(liked, MAX_ITEMS - disliked), disliked


def montage(history: PreferenceHistory, columns: int = 8, cell: int = 96) -> torch.Tensor:
    """What was read, as one picture [1, H, W, 3]: liked pictures framed green, then disliked ones framed red."""
    items = (*history.liked, *history.disliked)
    columns = min(columns, len(items))
    rows = math.ceil(len(items) / columns)
    sheet = torch.full((rows * cell, columns * cell, 3), GROUND)
    margin = GAP + BORDER
    for i, item in enumerate(items):
        row, column = divmod(i, columns)
        square = sheet[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        square[GAP:-GAP, GAP:-GAP] = torch.tensor(LIKED_BORDER if item.liked else DISLIKED_BORDER)
        square[margin:-margin, margin:-margin] = GROUND
        height, width = item.image.shape[:2]
        scale = (cell - 2 * margin) / max(height, width)
        picture = resize(item.image, max(1, round(height * scale)), max(1, round(width * scale)))
        height, width = picture.shape[:2]
        top = (cell - height) // 2
        left = (cell - width) // 2
        square[top : top + height, left : left + width] = picture
    return sheet[None]
