"""Stage 9: read many users' histories with the finished MLLM and CLIP, once.

    python -m training.extract --config sdxl_24gb

For every training user several histories of different lengths: H (last token of every decoder layer) and the liked
pictures' CLIP image embedding. Fixed-shape float16 arrays, memory-mapped by the next stages, and an index that says
which models read them. Finished pieces are kept: a killed run goes on after them.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.files import write_atomic

from .common.cache import cached
from .common.config.command import arguments
from .common.config.schema import Extract
from .common.errors import exit_with_message
from .common.files import save_array
from .common.run import Run
from .data.image_encoders import ImageEncoder, load_image_encoder
from .data.readers import Reader, load_reader
from .data.schema import TRAIN
from .data.worlds import World, open_world


def jobs_of(world: World, section: Extract) -> list[tuple[int, int]]:
    """(user, number of the history) of everything that is read."""
    return [(user, k) for user in world.users(TRAIN, section.users) for k in range(section.histories)]


def history_of(world: World, section: Extract, user: int, k: int):
    """History k of a user, a pure function: the first has as many pictures as there may be, the others fewer."""
    rng = np.random.default_rng([section.seed, user, k])
    most = section.pictures
    liked, disliked = (
        (most, most) if k == 0 else (int(rng.integers(min(3, most), most + 1)), int(rng.integers(most + 1)))
    )
    return world.history(user, rng, liked, disliked)


def read(
    world: World, reader: Reader, image_encoder: ImageEncoder, section: Extract, jobs: list
) -> dict[str, np.ndarray]:
    """{"hidden": [B, layers, D], "images": [B, I]} of some jobs, float16."""
    histories = [history_of(world, section, user, k) for user, k in jobs]
    images = [F.normalize(image_encoder(h.pictures[h.liked]).mean(0), dim=0) for h in histories]
    return {"hidden": reader.states(histories).half().numpy(), "images": torch.stack(images).half().numpy()}


def main() -> None:
    args = arguments(Extract, __doc__)
    run = Run(args)
    if run.finished:
        return
    world = open_world(args.config, args.runs)
    jobs = jobs_of(world, args.section)
    reader = load_reader(args, world, run.accelerator.device)
    image_encoder = load_image_encoder(args, world, run.accelerator.device, run.rank, run.world_size)
    mllm = reader.fingerprint
    columns = {
        "hidden": ((mllm["num_layers"], mllm["hidden_size"]), np.float16),
        "images": ((image_encoder.about["width"],), np.float16),
    }
    key = {"mllm": mllm, "clip_vision": image_encoder.about, "world": world.name, "jobs": args.fingerprint}
    key |= {"clip_vision_weights": image_encoder.digest, "pictures": world.digest}

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        return read(world, reader, image_encoder, args.section, jobs[start:stop])

    cached(run.folder, "arrays", len(jobs), columns, key, fill, args.section.batch, run.rank, run.world_size)
    if run.rank == 0:
        save_array(np.array([user for user, _ in jobs]), run.folder / "owners.npy")
        index = {"world": world.name, "mllm": mllm, "clip_vision": image_encoder.about}
        write_atomic(run.folder / "index.json", json.dumps(index, indent=1).encode())
    run.finish(histories=len(jobs), users=len({user for user, _ in jobs}))


if __name__ == "__main__":
    with exit_with_message():
        main()
