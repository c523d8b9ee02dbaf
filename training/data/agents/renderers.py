"""Who makes the pictures: one small interface, the atelier's drawings and any text-to-image pipeline of diffusers."""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from PIL import Image

from prefgen.atelier.attributes import FAMILIES
from prefgen.atelier.renderer import Scene, render
from prefgen.errors import MendableError

from ..errors import DataError
from .people import Item
from .vocabulary import Vocabulary


class Renderer(Protocol):
    """Turns items of one user into encoded pictures (PNG, JPEG or WebP), each a pure function of the user's items."""

    def identity(self) -> dict:
        """What the pictures depend on, as JSON values: recorded in the set, and refused when it changes."""

    def versions(self) -> dict[str, str]:
        """Packages besides those of every set that the bytes depend on."""

    def render(self, vocabulary: Vocabulary, items: list[Item]) -> list[bytes]:
        """The encoded pictures in the order of the items."""


class Atelier:
    """The atelier's own drawings, size x size pixels (a multiple of 16 up to 512), as PNG."""

    def __init__(self, size: int = 128):
        if not 16 <= size <= 512 or size % 16:
            raise DataError(f"--size {size}: the atelier draws multiples of 16 from 16 to 512 pixels.")
        self.size = size

    def identity(self) -> dict:
        return {"renderer": "atelier", "size": self.size}

    def versions(self) -> dict[str, str]:
        return {}

    def render(self, vocabulary: Vocabulary, items: list[Item]) -> list[bytes]:
        return [encode(Image.fromarray(render(scene(vocabulary, item), self.size))) for item in items]


def scene(vocabulary: Vocabulary, item: Item) -> Scene:
    """The atelier's scene of an item."""
    subject, prop = item.key.split("/")
    return Scene.of(subject, prop, dict(vocabulary.keys[i].split("/") for i in item.attributes), item.seed)


def check_atelier(vocabulary: Vocabulary) -> None:
    """DataError unless the atelier can draw the vocabulary."""
    if {key.split("/")[0] for key in vocabulary.keys} != set(FAMILIES):
        raise DataError(
            "The atelier draws its own vocabulary only: leave --vocabulary out, or use --renderer diffusers."
        )


@dataclass
class Diffusers:
    """A text-to-image pipeline. Loaded on first use, from safetensors only.

    pipeline: a local folder, or with `download` the name of a model on the hub. jpeg: a quality (1..100), None for PNG.
    Batches never mix users, so that one user made again alone has the same batches and, on the same device and
    software, the same bytes.
    """

    pipeline: str
    size: int = 512
    steps: int = 28
    guidance: float = 5.0
    batch: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    jpeg: int | None = None
    download: bool = False

    def __post_init__(self):
        if not self.download and not (Path(self.pipeline) / "model_index.json").exists():
            raise DataError(
                f"--pipeline {self.pipeline} is not a folder with a model_index.json. Name a local pipeline, "
                "or add --allow-download to fetch it from the hub."
            )
        if self.size < 8 or self.size % 8 or not 1 <= (self.jpeg or 1) <= 100:
            raise DataError("--size must be a multiple of 8, --jpeg a quality from 1 to 100.")
        self._pipeline = None

    def identity(self) -> dict:
        # Neither the device nor where the pipeline lies: another machine may go on with the set.
        settings = {name: getattr(self, name) for name in ("size", "steps", "guidance", "batch", "dtype", "jpeg")}
        return {"renderer": "diffusers", "pipeline": Path(self.pipeline).name} | settings

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("diffusers", "torch", "transformers")}

    def render(self, vocabulary: Vocabulary, items: list[Item]) -> list[bytes]:
        pictures = []
        for start in range(0, len(items), self.batch):
            pictures += self._paint(vocabulary, items[start : start + self.batch])
        return [encode(picture, self.jpeg) for picture in pictures]

    def _paint(self, vocabulary: Vocabulary, items: list[Item]) -> list[Image.Image]:
        import torch

        pipeline = self._load()
        # Noise comes from the CPU's generator: the same on every device.
        generators = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
        output = pipeline(
            [enriched_prompt(vocabulary, item) for item in items],
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            height=self.size,
            width=self.size,
            generator=generators,
        )
        return [picture.convert("RGB") for picture in output.images]

    def _load(self):
        """The pipeline itself."""
        if self._pipeline is None:
            import torch
            from diffusers import DiffusionPipeline

            from ...common.base_files import CANT_LOAD, load_models

            dtype = getattr(torch, self.dtype)
            try:
                folder = Path(self.pipeline)
                if self.download and not folder.is_dir():
                    folder = Path(DiffusionPipeline.download(self.pipeline, use_safetensors=True))
                # Each model by itself: a pipeline would draw at random what a file lacks.
                models = load_models(folder, dtype)
                loaded = DiffusionPipeline.from_pretrained(
                    str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True, **models
                )
                self._pipeline = loaded.to(self.device)
            except (*CANT_LOAD, MendableError) as error:
                raise DataError(f"Can't load the pipeline {self.pipeline}: {error}") from error
            self._pipeline.set_progress_bar_config(disable=True)
        return self._pipeline

    def __getstate__(self):
        return self.__dict__ | {"_pipeline": None}  # each worker loads its own


def enriched_prompt(vocabulary: Vocabulary, item: Item) -> str:
    """The prompt with the picture's attributes written into it, as `captions.enriched` does."""
    return ", ".join([item.prompt, *(vocabulary.phrases[i] for i in item.attributes)])


def encode(picture: Image.Image, jpeg: int | None = None) -> bytes:
    """JPEG of a quality (1..100); without one PNG, quickly: drawings shrink little more at higher levels."""
    file = io.BytesIO()
    if jpeg is None:
        picture.save(file, "PNG", compress_level=1)
    else:
        picture.save(file, "JPEG", quality=jpeg)
    return file.getvalue()
