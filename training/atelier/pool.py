"""Stage 1: draw the pool of pictures that every later stage learns from.

    python -m training.atelier.pool --runs runs/atelier

Out: `pictures.npy` (uint8 [count, 128, 128, 3], memory-mapped by the readers) and `labels.npy` (int8 [count, 12]:
subject, prop, then the families). Only training prompts are drawn; picture i is a pure function of (seed, i), so a
stopped run goes on and a picture can be made again alone.
"""

from __future__ import annotations

import json
from multiprocessing import Pool as Processes

import numpy as np
from tqdm import tqdm

from prefgen.atelier.captions import train_prompts
from prefgen.atelier.models import IMAGE_SIZE
from prefgen.atelier.renderer import Scene, random_scene, render
from prefgen.files import read_text, write_atomic

from ..common.config.command import arguments
from ..common.config.schema import Pool
from ..common.run import Run
from ..data.picture_pool import CLASS_COUNTS, scene_labels

SHARD = 512  # pictures that a process draws in turn


def main() -> None:
    args = arguments(Pool, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    progress = run.folder / "shards.json"
    finished = set(json.loads(read_text(progress))) if progress.exists() else set()

    def array(name: str, shape: tuple[int, ...], dtype: type) -> np.memmap:
        path = run.folder / f"{name}.npy"
        if finished:
            return np.lib.format.open_memmap(path, "r+")
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    pictures = array("pictures", (section.count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    labels = array("labels", (section.count, len(CLASS_COUNTS)), np.int8)
    shards = [
        (section.seed, s, min(s + SHARD, section.count)) for s in range(0, section.count, SHARD) if s not in finished
    ]
    with Processes(section.processes) as processes:
        drawn = processes.imap(draw_shard, shards)
        for start, shard, shard_labels in tqdm(drawn, total=len(shards), desc="pool"):
            pictures[start : start + len(shard)] = shard
            labels[start : start + len(shard)] = shard_labels
            # On the disk before the note that says so.
            pictures.flush()
            labels.flush()
            finished.add(start)
            write_atomic(progress, json.dumps(sorted(finished)).encode())
    run.finish(pictures=section.count)


def draw_shard(shard: tuple[int, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    """(start, pictures [n, 128, 128, 3], labels [n, 12]) of (seed, start, stop)."""
    seed, start, stop = shard
    scenes = [scene(seed, i) for i in range(start, stop)]
    pictures = np.stack([render(s, IMAGE_SIZE) for s in scenes])
    return start, pictures, np.array([scene_labels(s) for s in scenes], np.int8)


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the pool: every training prompt equally often, attributes uniform."""
    rng = np.random.default_rng([seed, index])
    subject, prop = train_prompts()[rng.integers(len(train_prompts()))]
    return random_scene(rng, subject=subject, prop=prop)


if __name__ == "__main__":
    main()
