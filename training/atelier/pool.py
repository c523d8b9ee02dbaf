"""Stage 1: draw the pool of pictures that every later stage learns from.

    python -m training.atelier.pool --runs runs/atelier

Writes `pool/pictures.npy` (uint8 [count, 128, 128, 3], memory-mapped by the readers), `pool/labels.npy` (int8
[count, 12]: subject, prop, then the families) and the scenes as JSON. Only training prompts are drawn; picture i is a
pure function of (seed, i), so a stopped run goes on and a picture can be made again alone.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from multiprocessing import Pool as Processes
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prefgen.atelier.attributes import FAMILIES, PROPS
from prefgen.atelier.captions import train_prompts
from prefgen.atelier.models import IMAGE_SIZE
from prefgen.atelier.renderer import Scene, attribute_labels, random_scene, render, subject_index
from prefgen.files import read_text, write_atomic

from ..common.config.command import arguments
from ..common.run import Run

SHARD = 512


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the pool: every training prompt equally often, attributes uniform."""
    rng = np.random.default_rng([seed, index])
    subject, prop = train_prompts()[rng.integers(len(train_prompts()))]
    return random_scene(rng, subject=subject, prop=prop)


def labels(item: Scene) -> list[int]:
    """[12] class numbers: subject, prop, then every family in FAMILIES order."""
    return [subject_index(item), list(PROPS).index(item.prop), *attribute_labels(item).tolist()]


def _draw_shard(job: tuple[int, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    seed, start, stop = job
    scenes = [scene(seed, i) for i in range(start, stop)]
    return start, np.stack([render(s, IMAGE_SIZE) for s in scenes]), np.array([labels(s) for s in scenes], np.int8)


class PicturePool:
    """Read access to a drawn pool: `pictures` uint8 [n, 128, 128, 3], `labels` int64 [n, 12]."""

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

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pictures and labels, for the key of what was computed from them."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        for start in range(0, len(self), SHARD):
            digest.update(np.ascontiguousarray(self.pictures[start : start + SHARD]))
        return digest.hexdigest()

    @property
    def train_count(self) -> int:
        """How many pictures the encoders learn from; the rest shows how well they read unseen ones."""
        return len(self) - min(1024, len(self) // 4)


def main() -> None:
    args = arguments("atelier.pool", __doc__)
    run = Run(args)
    if run.finished:
        return
    progress = run.folder / "shards.json"
    finished = set(json.loads(read_text(progress))) if progress.exists() else set()
    mode = "r+" if finished else "w+"
    shape = (args.count, IMAGE_SIZE, IMAGE_SIZE, 3)
    pictures = np.lib.format.open_memmap(run.folder / "pictures.npy", mode, np.uint8, None if finished else shape)
    classes = np.lib.format.open_memmap(
        run.folder / "labels.npy", mode, np.int8, None if finished else (args.count, len(FAMILIES) + 2)
    )
    jobs = [(args.seed, s, min(s + SHARD, args.count)) for s in range(0, args.count, SHARD) if s not in finished]
    with Processes(args.processes) as processes:
        for start, shard, shard_labels in tqdm(processes.imap(_draw_shard, jobs), total=len(jobs), desc="pool"):
            pictures[start : start + len(shard)] = shard
            classes[start : start + len(shard)] = shard_labels
            finished.add(start)
            pictures.flush()
            classes.flush()
            write_atomic(progress, json.dumps(sorted(finished)).encode())
    run.finish(pictures=args.count)


if __name__ == "__main__":
    main()
