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
from prefgen.pictures import resize

from ..common.atelier_clip import image_features
from ..common.cache import cached, digest_of
from ..common.devices import default_device
from .worlds import AtelierWorld, World

# Pictures of the pool that are read together.
POOL_AT_ONCE = 128
# A user's pictures stand in several histories.
CACHED_PICTURES = 4096


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
        self.digest = digest_of(clip.vision_model, clip.visual_projection)
        self.about = embedded_about(clip)

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                features = image_features(clip, world.pool.batch(slice(start, stop)))
                return {"clip_images": F.normalize(features, dim=1).half().numpy()}

        columns = {"clip_images": ((self.about["width"],), np.float16)}
        key = {"clip": self.digest, "pool": world.pool.digest}
        count = len(world.pool)
        arrays = cached(runs, "clip_images", count, columns, key, fill, POOL_AT_ONCE, rank, world_size)
        self.embeds = arrays["clip_images"]

    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.embeds[pictures]).float()


class EmbeddedImageEncoder(ImageEncoder):
    """The embedded CLIP over a data set's pictures, read as ComfyUI's CLIP vision reads: bicubic, in 8 bits."""

    def __init__(self, world: World):
        self.world = world
        self.clip = load_clip()
        self.digest = digest_of(self.clip.vision_model, self.clip.visual_projection)
        self.about = embedded_about(self.clip)
        self.embeds = LeastRecentlyUsed(CACHED_PICTURES)

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray) -> torch.Tensor:
        numbers = [int(number) for number in pictures]
        unread = [number for number in dict.fromkeys(numbers) if number not in self.embeds]
        for start in range(0, len(unread), POOL_AT_ONCE):
            some = unread[start : start + POOL_AT_ONCE]
            images = [torch.from_numpy(image).float() / 255 for image in self.world.pictures(some)]
            for number, embed in zip(some, embedded_embeds(self.clip, images), strict=True):
                self.embeds[number] = embed
        return torch.stack([self.embeds[number] for number in numbers])


def embedded_embeds(clip, images: list[torch.Tensor]) -> torch.Tensor:
    """Unit embeddings [B, I] of pictures [H, W, 3] in 0..1 by the embedded CLIP."""
    side = CLIP_VISION_CONFIG["image_size"]
    pixels = torch.stack([(resize(image, side, side) * 255).round() / 255 for image in images])
    return F.normalize(image_features(clip, pixels.movedim(-1, 1) * 2 - 1), dim=1)


def embedded_about(clip) -> dict:
    """What an adapter's header says of the embedded CLIP."""
    width = CLIP_VISION_CONFIG["projection_dim"]
    about = {"name": "atelier", "width": width, "preprocessing": "bicubic 128, mean 0.5, std 0.5"}
    return about | described(clip.state_dict()) | {"fixed_picture": _of_fixed_picture(clip)}


class ClipImageEncoder(ImageEncoder):
    """A CLIP of transformers or open_clip. A user's pictures stand in several histories: the last ones are cached."""

    def __init__(self, world: World, folder: Path, device: str, architecture: str | None = None):
        self.world = world
        self.vision = ClipVision(folder, device, architecture)
        preprocessing = f"bicubic {self.vision.side}, CLIP's mean and std"
        self.about = {"name": Path(folder).name, "width": self.vision.width, "preprocessing": preprocessing}
        self.about |= self.vision.about
        self.digest = digest_of(self.vision.model)
        self.embeds = LeastRecentlyUsed(CACHED_PICTURES)

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
        if not isinstance(world, AtelierWorld):
            return EmbeddedImageEncoder(world)
        return AtelierImageEncoder(world, args.runs, rank, world_size)
    return ClipImageEncoder(world, folder, str(device or default_device()), args.config.clip_vision.architecture)


@torch.inference_mode()
def _of_fixed_picture(clip) -> list[float]:
    """The embedded CLIP's embedding of the picture that tells encoders apart."""
    pixels = fixed_picture(CLIP_VISION_CONFIG["image_size"]).movedim(-1, 0)[None] * 2 - 1
    return rounded(image_features(clip, pixels)[0])
