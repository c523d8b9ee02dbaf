"""The pool of pictures that `training.atelier.pool` drew, its labels, and what is computed once from all of it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from prefgen.atelier.attributes import FAMILIES, PROPS, SUBJECTS
from prefgen.atelier.editions import FIRST
from prefgen.atelier.models import load_vae_diffusers
from prefgen.atelier.renderer import Scene, attribute_labels, subject_index

from ..common.cache import cached, digest_of

# How many classes each of a picture's labels has: subject, prop, then every family.
CLASS_COUNTS = [len(SUBJECTS), len(PROPS), *(len(values) for values in FAMILIES.values())]
# Pictures, so that the mapped pool is never in memory as a whole.
HASHED_AT_ONCE = 512


class PicturePool:
    """Read access to a drawn pool: `pictures` uint8 [n, 128, 128, 3], memory-mapped; `labels` int64 [n, 12].

    SystemExit where the stage hasn't finished.
    """

    def __init__(self, runs: Path):
        folder = runs / "atelier.pool"
        if not (folder / "done").exists():
            raise SystemExit("The pool is not drawn yet: run `python -m training.atelier.pool` first.")
        self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy").astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, where: slice | np.ndarray) -> torch.Tensor:
        """Pictures [B, 3, 128, 128] in -1..1; where: a slice or indices."""
        return torch.from_numpy(np.array(self.pictures[where])).movedim(-1, 1).float() / 127.5 - 1

    @property
    def train_count(self) -> int:
        """How many pictures the encoders learn from; the rest shows how well they read unseen ones."""
        return len(self) - min(1024, len(self) // 4)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pictures and labels, for the key of what was computed from them."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        for start in range(0, len(self), HASHED_AT_ONCE):
            digest.update(np.ascontiguousarray(self.pictures[start : start + HASHED_AT_ONCE]))
        return digest.hexdigest()


def scene_labels(scene: Scene) -> list[int]:
    """[12] class numbers: subject, prop, then every family in FAMILIES order."""
    return [subject_index(scene), list(PROPS).index(scene.prop), *attribute_labels(scene).tolist()]


def label_names(labels) -> tuple[str, str, dict[str, str]]:
    """Class numbers [12] -> (subject, prop, {family: name})."""
    subject, prop, *classes = map(int, labels)
    attributes = {family: values[c].name for (family, values), c in zip(FAMILIES.items(), classes, strict=True)}
    return list(SUBJECTS)[subject], list(PROPS)[prop], attributes


def pool_latents(runs: Path, pool: PicturePool, rank: int = 0, world_size: int = 1) -> torch.Tensor:
    """Unit-variance latents of the whole pool, float16 [n, 8, 16, 16], encoded once and stored in the runs folder.

    rank, world_size: as of `cached`. SystemExit where they were made by another VAE, or of another pool.
    """
    vae = load_vae_diffusers()
    shape = (FIRST.vae["latent_channels"], FIRST.unet["sample_size"], FIRST.unet["sample_size"])

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(pool.batch(slice(start, stop))).latent_dist.mean.float()
            return {"latents": (mean * vae.config.scaling_factor).half().numpy()}

    key = {"vae": digest_of(vae), "scaling_factor": vae.config.scaling_factor, "pool": pool.digest}
    columns = {"latents": (shape, np.float16)}
    arrays = cached(runs, "latents", len(pool), columns, key, fill, 64, rank, world_size)
    return torch.from_numpy(np.array(arrays["latents"]))
