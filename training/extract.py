"""Stage 9: read many users' histories with the finished MLLM and CLIP, once.

    python -m training.extract --config sdxl_24gb

In: for every training user several histories of different lengths. Out, one row a history, memory-mapped by the next
stages (`common.stage_outputs.ExtractedUsers`): `hidden.npy`, float16 [n, layers, D], the last token of every decoder
layer; `images.npy`, float16 [n, I], the CLIP embedding of the liked pictures; `owners.npy` [n], the user; and
`index.json`, which models read them. What no part of the user vector is made of (`train_user_attention.parts`) isn't
read: an image-only adapter needs no MLLM.

e_sem and e_core of the paper (arXiv 2512.06020) are layers of the first. Its e_img is the embedding of one liked
example; here it is the mean of all liked ones, or with `extract.image=last` the last one's (docs/departures.md). Rows
that are read stay: a killed run goes on after them.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.files import write_atomic

from .common.ahead import Ahead, Spans
from .common.cache import Columns, cached
from .common.chain import made_of
from .common.config.command import StageArgs, arguments
from .common.config.schema import Extract
from .common.errors import exit_with_message
from .common.files import save_array
from .common.fitting import Pieces
from .common.run import Run
from .data.history_shapes import drawn_length, without_prompts
from .data.image_encoders import ImageEncoder, load_image_encoder
from .data.open_world import open_world
from .data.pooled import PooledEmbeddings, PooledTokens, StatesReader
from .data.readers import load_reader
from .data.schema import TRAIN
from .data.worlds import History, World

# Of the histories after the first: liked pictures at least, where the configuration allows as many.
FEWEST_LIKED = 3


def main() -> None:
    args = arguments(Extract, __doc__)
    section = args.section
    world = open_world(args.config, args.runs)
    sources = made_of(args.config, args.runs, args.stage, world.digest)
    run = Run(args, made_of=sources)
    if run.finished:
        return
    jobs = [(user, number) for user in world.users(TRAIN, section.users) for number in range(section.histories)]
    reader, image_encoder = load_readers(args, world, run)
    index, columns = described(reader, image_encoder)
    if section.image == "last" and image_encoder is not None:
        index["clip_vision"] = index["clip_vision"] | {"examples": 1}
    index = {"world": world.name, "settings": args.fingerprint, "made_of": sources} | index
    key = index | {"jobs": args.fingerprint, "pictures": world.digest}
    if image_encoder is not None:
        # Its embedding of the fixed picture has other last digits on another device.
        key["clip_vision"] = {name: value for name, value in index["clip_vision"].items() if name != "fixed_picture"}
        key["clip_vision_weights"] = image_encoder.digest

    spans = Spans(len(jobs), section.batch, run.world_size)
    pieces = Pieces(section.batch)

    def histories(start: int) -> tuple[list[History], dict[int, np.ndarray]]:
        some = [history_of(world, section, *job) for job in jobs[spans.rows(start)]]
        return some, world.decoded(np.unique(np.concatenate([history.pictures for history in some])))

    # Drawn and decoded while those before them are read by the models.
    prepared = Ahead(histories, spans.following)

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        some, world.prefetched = prepared(start)
        parts = pieces(lambda piece: read(reader, image_encoder, piece, section.image), some)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    run.claim()
    cached(run.folder, "arrays", len(jobs), columns, key, fill, section.batch, run.rank, run.world_size)
    if run.rank == 0:
        save_array(np.array([user for user, _ in jobs]), run.folder / "owners.npy")
        write_atomic(run.folder / "index.json", json.dumps(index, indent=1).encode())
    run.finish(histories=len(jobs), users=len({user for user, _ in jobs}))


def load_readers(args: StageArgs[Extract], world: World, run: Run) -> tuple[StatesReader | None, ImageEncoder | None]:
    """(what reads H, the image encoder of e_img), each where a part of the user vector needs it."""
    config = args.config
    where = (run.accelerator.device, run.rank, run.world_size)
    states = args.section.states
    needs_encoder = "image" in config.train_user_attention.parts or (config.reads_mllm and states == "embeddings")
    image_encoder = load_image_encoder(args, world, *where) if needs_encoder else None
    if not config.reads_mllm:
        return None, image_encoder
    if states == "embeddings":
        assert image_encoder is not None
        return PooledEmbeddings(image_encoder), image_encoder
    reader = load_reader(args, world, *where)
    return PooledTokens(reader) if states == "tokens" else reader, image_encoder


def described(reader: StatesReader | None, image_encoder: ImageEncoder | None) -> tuple[dict, Columns]:
    """(which models read the histories, the arrays that they give)."""
    index = {}
    columns: Columns = {}
    if reader is not None:
        index["mllm"] = reader.fingerprint
        columns["hidden"] = ((reader.fingerprint["num_layers"], reader.fingerprint["hidden_size"]), np.float16)
    if image_encoder is not None:
        index["clip_vision"] = image_encoder.about
        columns["images"] = ((image_encoder.about["width"],), np.float16)
    return index, columns


def history_of(world: World, section: Extract, user: int, number: int) -> History:
    """One history of a user, a pure function: the first has as many pictures as there may be, the others fewer."""
    rng = np.random.default_rng([section.seed, user, number])
    most = section.pictures
    if section.short:
        liked, disliked = (drawn_length(rng, most, section.short) for _ in range(2))
    elif number == 0:
        liked, disliked = most, most
    else:
        liked = int(rng.integers(min(FEWEST_LIKED, most), most + 1))
        disliked = int(rng.integers(most + 1))
    history = world.history(user, rng, liked, disliked if section.disliked else 0)
    if world.drop_prompts and rng.random() < world.drop_prompts:
        return without_prompts(history)
    return history


def read(
    reader: StatesReader | None, image_encoder: ImageEncoder | None, histories: list[History], image: str = "pooled"
) -> dict[str, np.ndarray]:
    """{"hidden": [B, layers, D], "images": [B, I]} of some histories, float16, as far as there is what reads them."""
    rows = {}
    if image_encoder is not None:
        # The last liked picture has the newest verdict; in training any of them is the last.
        first = -1 if image == "last" else None
        images = [F.normalize(image_encoder(h.pictures[h.liked][first:]).mean(0), dim=0) for h in histories]
        rows["images"] = torch.stack(images).half().numpy()
    if reader is not None:
        rows["hidden"] = reader.states(histories).half().numpy()
    return rows


if __name__ == "__main__":
    with exit_with_message():
        main()
