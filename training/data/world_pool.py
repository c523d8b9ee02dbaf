"""The second world's pool of pictures (`training.atelier.world.pool`), its labels, and the latents of all of it."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from prefgen.atelier.editions import SECOND
from prefgen.atelier.models import load_vae_diffusers
from prefgen.atelier.world.prompts import Prompt
from prefgen.atelier.world.render import render
from prefgen.atelier.world.scenes import Scene, random_scene
from prefgen.atelier.world.subjects import CLASS_OF

from ..common.cache import cached, digest_of

# Pictures that encoders don't learn from: the last ones.
UNSEEN = 2000
# Pictures, so that the mapped pool is never in memory as a whole.
HASHED_AT_ONCE = 512


def pool_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the pool: everything uniform, but no pair of class and setting that is held out."""
    rng = np.random.default_rng([seed, index])
    while True:
        scene = random_scene(rng)
        if not prompt_of(scene).heldout:
            return scene


def prompt_of(scene: Scene) -> Prompt:
    """The closed prompt of a scene."""
    return Prompt(CLASS_OF[scene.subject], scene.subject, scene.number, scene.setting, scene.companion)


class WorldPool:
    """Read access to a drawn pool.

    pictures: uint8 [n, 128, 128, 3]; large: uint8 [m, 256, 256, 3], the first m of them; both memory-mapped. classes:
    int64 [n, 12]; values: float32 [n, 13], shares of the ranges; seen: bool [n, 13]. SystemExit where the stage hasn't
    finished.
    """

    def __init__(self, runs: Path):
        folder = runs / "atelier.world.pool"
        if not (folder / "done").exists():
            raise SystemExit("The pool is not drawn yet: run `python -m training.atelier.world.pool` first.")
        self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self.large = np.load(folder / "large.npy", mmap_mode="r")
        self.classes = torch.from_numpy(np.load(folder / "classes.npy").astype(np.int64))
        self.values = torch.from_numpy(np.load(folder / "values.npy"))
        self.seen = torch.from_numpy(np.load(folder / "seen.npy"))

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def train_count(self) -> int:
        """How many pictures the encoders learn from; the rest shows how well they read unseen ones."""
        return len(self) - min(UNSEEN, len(self) // 4)

    def batch(self, where: slice | np.ndarray) -> torch.Tensor:
        """Pictures [B, 3, 128, 128] in -1..1; where: a slice or indices."""
        return as_tensor(self.pictures[where])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all small pictures and labels, for the key of what was computed from them."""
        digest = hashlib.sha256(self.classes.numpy().tobytes() + self.values.numpy().tobytes())
        for start in range(0, len(self), HASHED_AT_ONCE):
            digest.update(np.ascontiguousarray(self.pictures[start : start + HASHED_AT_ONCE]))
        return digest.hexdigest()


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).movedim(-1, 1).float() / 127.5 - 1


def pool_latents(runs: Path, pool: WorldPool, seed: int, count: int) -> torch.Tensor:
    """Latents of the pool's first pictures, float16 [count, 8, 32, 32], at 256 px: encoded once, stored in the runs
    folder. seed: the pool's; where that has no large pictures, they are drawn again.

    SystemExit where they were made by another encoder, or of another pool.
    """
    vae = load_vae_diffusers()

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        stored = pool.large[start:stop]
        drawn = [render(pool_scene(seed, i)) for i in range(start + len(stored), stop)]
        pictures = as_tensor(np.concatenate([stored, np.stack(drawn)]) if drawn else stored)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return {"latents": vae.encode(pictures).latent_dist.mean.half().numpy()}

    # The decoder may learn on while the UNet trains on these.
    key = {"encoder": digest_of(vae.encoder, vae.quant_conv), "pool": pool.digest}
    columns = {
        "latents": ((SECOND.vae["latent_channels"], SECOND.unet["sample_size"], SECOND.unet["sample_size"]), np.float16)
    }
    return torch.from_numpy(np.array(cached(runs, "world_latents", count, columns, key, fill, 64)["latents"]))
