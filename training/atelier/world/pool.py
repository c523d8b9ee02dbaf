"""Stage 1: draw the pool of pictures that every later stage learns from.

    python -m training.atelier.world.pool --runs runs/world

Out: `pictures.npy` (uint8 [count, 128, 128, 3], averaged from 256 px), `large.npy` (uint8 [large, 256, 256, 3], the
first of them whole), `classes.npy` (int8 [count, 12]), `values.npy` (float32 [count, 13]) and `seen.npy` (bool
[count, 13]). Only prompts of training are drawn; picture i is a pure function of (seed, i), so a stopped run goes on
and a picture can be made again alone.
"""

from __future__ import annotations

from functools import partial
from multiprocessing import Pool as Processes

import numpy as np
from PIL import Image

from prefgen.atelier.editions import READ_SIZE
from prefgen.atelier.world.labels import CLASSES, class_labels, value_labels, visible_traits
from prefgen.atelier.world.render import SIZE, render
from prefgen.atelier.world.traits import CONTINUOUS

from ...common.cache import cached
from ...common.config.command import arguments
from ...common.config.world import WorldPool
from ...common.run import Run
from ...data.world_pool import pool_scene

# Pictures that the processes draw before what is there is written.
AT_ONCE = 512


def main() -> None:
    args = arguments(WorldPool, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    columns = {
        "pictures": ((READ_SIZE, READ_SIZE, 3), np.uint8),
        "classes": ((len(CLASSES),), np.int8),
        "values": ((len(CONTINUOUS),), np.float32),
        "seen": ((len(CONTINUOUS),), np.bool_),
    }
    with Processes(section.processes) as processes:

        def fill_large(start: int, stop: int) -> dict[str, np.ndarray]:
            return {"large": np.stack(processes.map(partial(draw, section.seed), range(start, stop)))}

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            scenes = [pool_scene(section.seed, i) for i in range(start, stop)]
            return {
                "pictures": np.stack(processes.map(partial(draw_small, section.seed), range(start, stop))),
                "classes": np.array([class_labels(scene) for scene in scenes]),
                "values": np.array([value_labels(scene) for scene in scenes]),
                "seen": np.array([visible_traits(scene) for scene in scenes]),
            }

        large = {"large": ((SIZE, SIZE, 3), np.uint8)}
        cached(run.folder, "large", min(section.large, section.count), large, args.fingerprint, fill_large, AT_ONCE)
        cached(run.folder, "pool", section.count, columns, args.fingerprint, fill, AT_ONCE)
    run.finish(pictures=section.count)


def draw(seed: int, index: int) -> np.ndarray:
    """Picture `index` of the pool: uint8 [256, 256, 3]."""
    return render(pool_scene(seed, index))


def draw_small(seed: int, index: int) -> np.ndarray:
    """The same, averaged to uint8 [128, 128, 3]."""
    return np.asarray(Image.fromarray(draw(seed, index)).resize((READ_SIZE, READ_SIZE), Image.Resampling.BOX))


if __name__ == "__main__":
    main()
