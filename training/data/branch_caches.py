"""What the frozen models of a base compute once for the branch's training: latents of pictures, states of texts.

Both are mapped from the runs folder, and refused where they are another world's or another base's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from ..common.ahead import Ahead, Spans
from ..common.base import PICTURES_AT_ONCE, Base, Text
from ..common.cache import cached, digest_of
from ..common.config.command import StageArgs
from ..common.config.schema import TrainUserAttention
from ..common.fitting import Pieces
from .picture_pool import PicturePool, pool_latents
from .worlds import Target, World

TEXTS_AT_ONCE = 64


class LatentCache:
    """Latents [n, c, h, w] and sizes [n, 4] (see `Base.added_conditions`) of a world's pictures.

    numbers: of the pictures in the world, ascending. sizes: None where the UNet doesn't read them.
    """

    def __init__(self, numbers: np.ndarray, latents, sizes: np.ndarray | None):
        self.numbers = numbers
        self.latents = latents
        self.sizes = sizes

    @classmethod
    def of_pool(cls, runs: Path, pool: PicturePool, run) -> LatentCache:
        """Of the atelier's whole pool, whose targets have no end; `atelier.unet` may have cached them."""
        return cls(np.arange(len(pool)), pool_latents(runs, pool, run.rank, run.world_size), None)

    @classmethod
    def of_targets(
        cls,
        args: StageArgs[TrainUserAttention],
        base: Base,
        world: World,
        targets: list[Target],
        run,
        shape: tuple[int, int] | None = None,
    ) -> LatentCache:
        """Of all pictures that training may aim at. shape: height and width that they are cut to, the base's square by
        default."""
        config = args.config.base
        numbers = np.unique([target.picture for target in targets])
        height, width = shape or (config.pixels, config.pixels)
        latent_shape = (base.vae.config.latent_channels, height // base.factor, width // base.factor)
        suffix = "" if shape is None else f"_{height}x{width}"
        # All that the latents depend on: with another of these the cache is refused.
        key = {
            "world": world.name,
            "base": str(config.path),
            "pixels": config.pixels,
            "vae": digest_of(base.vae),
            "data": world.digest,
            "pictures": hashlib.sha256(numbers.tobytes()).hexdigest(),
        }

        spans = Spans(len(numbers), PICTURES_AT_ONCE, run.world_size)
        # Read and decoded while the pictures before them are encoded.
        pictures = Ahead(lambda start: world.pictures(numbers[spans.rows(start)], long_side=None), spans.following)

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            latents, sizes = base.latents(pictures(start), shape)
            return {f"latents{suffix}": latents.numpy(), f"sizes{suffix}": sizes}

        columns = {f"latents{suffix}": (latent_shape, np.float16), f"sizes{suffix}": ((4,), np.int32)}
        count = len(numbers)
        arrays = cached(
            args.runs, f"latents{suffix}", count, columns, key, fill, PICTURES_AT_ONCE, run.rank, run.world_size
        )
        return cls(numbers, arrays[f"latents{suffix}"], arrays[f"sizes{suffix}"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture's latents: (c, h, w)."""
        return tuple(self.latents.shape[1:])

    def __contains__(self, picture: int) -> bool:
        row = int(np.searchsorted(self.numbers, picture))
        return row < len(self.numbers) and int(self.numbers[row]) == picture

    def of(self, pictures: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(latents [B, c, h, w] fp32, sizes [B, 4] or None) of pictures by their numbers in the world."""
        rows = np.searchsorted(self.numbers, pictures)
        latents = torch.as_tensor(np.asarray(self.latents[rows])).float()
        return latents, None if self.sizes is None else torch.from_numpy(self.sizes[rows])


class TextCache:
    """Text states of every prompt that training may ask for; called as `Base.encode_text` is."""

    def __init__(self, args: StageArgs[TrainUserAttention], base: Base, world: World, targets: list[Target], run):
        asked = {"", *(target.prompt for target in targets)}
        if args.section.distil and args.section.teacher == "words":
            asked |= {target.enriched for target in targets if target.enriched}
            asked |= {target.against for target in targets if args.section.away and target.avoided}
        # In one order, so that every process and every resumed run means the same rows.
        texts = sorted(asked)
        self.rows = {text: i for i, text in enumerate(texts)}
        self.device = base.device
        key = {
            "world": world.name,
            "base": str(args.config.base.path),
            "precision": args.config.base.precision,
            "encoders": digest_of(*(model for _, model in base.encoders)),
            "texts": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        }
        first = base.encode_text([""])
        columns = {"text_states": (tuple(first.states.shape[1:]), np.float16)}
        if first.pooled is not None:
            columns["text_pooled"] = (tuple(first.pooled.shape[1:]), np.float16)

        pieces = Pieces(TEXTS_AT_ONCE)

        def encode(some: list[str]) -> dict[str, np.ndarray]:
            text = base.encode_text(some)
            tensors = {"text_states": text.states, "text_pooled": text.pooled}
            return {name: tensors[name].cpu().half().numpy() for name in columns}

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            parts = pieces(encode, texts[start:stop])
            return {name: np.concatenate([part[name] for part in parts]) for name in columns}

        self.arrays = cached(
            args.runs, "texts", len(texts), columns, key, fill, TEXTS_AT_ONCE, run.rank, run.world_size
        )

    def __call__(self, texts: list[str]) -> Text:
        rows = [self.rows[text] for text in texts]
        pooled = self._tensor("text_pooled", rows) if "text_pooled" in self.arrays else None
        return Text(self._tensor("text_states", rows), pooled)

    def _tensor(self, name: str, rows: list[int]) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name][rows]).float().to(self.device)
