"""Stage 1: draw the pool of pictures that every later stage learns from.

    python -m training.atelier.pool --runs runs/atelier

Out: `pictures.npy` (uint8 [count, 128, 128, 3], memory-mapped by the readers) and `labels.npy` (int8 [count, 12]:
subject, prop, then the families). Only training prompts are drawn; picture i is a pure function of (seed, i), so a
stopped run goes on and a picture can be made again alone.
"""

from __future__ import annotations

from multiprocessing import Pool as Processes

import numpy as np

from prefgen.atelier.captions import train_prompts
from prefgen.atelier.editions import FIRST
from prefgen.atelier.renderer import Scene, random_scene, render

from ..common.cache import cached
from ..common.config.atelier import Pool
from ..common.config.command import arguments
from ..common.run import Run
from ..data.picture_pool import CLASS_COUNTS, scene_labels

# Pictures that the processes draw before what is there is written.
AT_ONCE = 512


def main() -> None:
    args = arguments(Pool, __doc__)
    section = args.section
    run = Run(args)
    if run.finished:
        return
    columns = {
        "pictures": ((FIRST.image_size, FIRST.image_size, 3), np.uint8),
        "labels": ((len(CLASS_COUNTS),), np.int8),
    }
    with Processes(section.processes) as processes:

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            drawn = processes.map(draw, [(section.seed, i) for i in range(start, stop)])
            pictures, labels = zip(*drawn, strict=True)
            return {"pictures": np.stack(pictures), "labels": np.array(labels)}

        cached(run.folder, "pool", section.count, columns, args.fingerprint, fill, AT_ONCE)
    run.finish(pictures=section.count)


def draw(numbers: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """(uint8 [128, 128, 3], labels [12]) of (seed, number of the picture)."""
    drawn = scene(*numbers)
    return render(drawn, FIRST.image_size), scene_labels(drawn)


def scene(seed: int, index: int) -> Scene:
    """Scene number `index` of the pool: every training prompt equally often, attributes uniform."""
    rng = np.random.default_rng([seed, index])
    subject, prop = train_prompts()[rng.integers(len(train_prompts()))]
    return random_scene(rng, subject=subject, prop=prop)


if __name__ == "__main__":
    main()
