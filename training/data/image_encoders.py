"""The image encoder of e_img over a world's pictures, as the nodes read with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from prefgen.atelier.models import CLIP_VISION_CONFIG, load_clip
from prefgen.clip import ClipVision
from prefgen.image_encoder import described, fixed_picture, rounded
from prefgen.lru import LeastRecentlyUsed

from ..common.atelier_clip import image_features
from ..common.cache import cached, digest_of
from ..common.devices import default_device
from .worlds import AtelierWorld, World

# Pictures of the pool that are read together.
POOL_AT_ONCE = 128


class ImageEncoder(ABC):
    """CLIP image embeddings of a world's pictures.

    about: name, width, preprocessing and what `described` tells, for the adapter's header. digest: of the encoder's
    weights, for the key of what it computed.
    """

    about: dict
    digest: str

    @abstractmethod
    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        """Unit embeddings [B, I] of pictures by their numbers [B]."""


class AtelierImageEncoder(ImageEncoder):
    """The embedded CLIP; the whole pool is read once and cached beside the runs. rank, world_size: as of `cached`.

    SystemExit where the cache was read by another CLIP, or off another pool.
    """

    def __init__(self, world: AtelierWorld, runs: Path, rank: int = 0, world_size: int = 1):
        clip = load_clip()
        width = CLIP_VISION_CONFIG["projection_dim"]
        preprocessing = "bicubic 128, mean 0.5, std 0.5"
        self.digest = digest_of(clip.vision_model, clip.visual_projection)
        self.about = {"name": "atelier", "width": width, "preprocessing": preprocessing} | described(clip.state_dict())
        self.about["fixed_picture"] = _of_fixed_picture(clip)

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                features = image_features(clip, world.pool.batch(slice(start, stop)))
                return {"clip_images": F.normalize(features, dim=1).half().numpy()}

        columns = {"clip_images": ((width,), np.float16)}
        key = {"clip": self.digest, "pool": world.pool.digest}
        count = len(world.pool)
        arrays = cached(runs, "clip_images", count, columns, key, fill, POOL_AT_ONCE, rank, world_size)
        self.embeds = arrays["clip_images"]

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.embeds[pictures]).float()


class ClipImageEncoder(ImageEncoder):
    """A CLIP of transformers or open_clip. A user's pictures stand in several histories: the last ones are cached."""

    CACHED_PICTURES = 4096

    def __init__(self, world: World, folder: Path, device: str, architecture: str | None = None):
        self.world = world
        self.vision = ClipVision(folder, device, architecture)
        preprocessing = f"bicubic {self.vision.side}, CLIP's mean and std"
        self.about = {"name": Path(folder).name, "width": self.vision.width, "preprocessing": preprocessing}
        self.about |= self.vision.about
        self.digest = digest_of(self.vision.model)
        self.embeds = LeastRecentlyUsed(self.CACHED_PICTURES)

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        # In ascending order, in which a data set reads every row group once.
        new = sorted({int(number) for number in pictures} - set(self.embeds))
        if new:
            images = [Image.fromarray(picture) for picture in self.world.pictures(new)]
            for number, embed in zip(new, F.normalize(self.vision(images), dim=1), strict=True):
                self.embeds[number] = embed
        return torch.stack([self.embeds[int(number)] for number in pictures])


def load_image_encoder(args, world: World, device=None, rank: int = 0, world_size: int = 1) -> ImageEncoder:
    """The image encoder of a configuration, for one of so many processes."""
    folder = args.config.clip_vision.path
    if folder is None:
        return AtelierImageEncoder(world, args.runs, rank, world_size)
    return ClipImageEncoder(world, folder, str(device or default_device()), args.config.clip_vision.architecture)


@torch.inference_mode()
def _of_fixed_picture(clip) -> list[float]:
    """The embedded CLIP's embedding of the picture that tells encoders apart."""
    pixels = fixed_picture(CLIP_VISION_CONFIG["image_size"]).movedim(-1, 0)[None] * 2 - 1
    return rounded(image_features(clip, pixels)[0])
