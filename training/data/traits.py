"""What every user likes and avoids, in an MLLM's words, for sets that know no attributes.

    python -m training.data.traits data/pickapic --mllm models/mllm/SmolVLM2-2.2B-Instruct

The MLLM sees liked and disliked pictures of a user, each with its prompt, and answers the questions of Describe
Preference. Its answers go to DATA/traits/, which `train_alignment` aims e_sem at (`train_alignment.target`) and the
words teacher of `train_user_attention` writes into prompts. The set itself stays as it is. Users of the training split;
pieces of some users are written as they are ready, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from prefgen.dtypes import DTYPES
from prefgen.files import file_sha256, read_text, write_atomic
from prefgen.history import HistoryItem, PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.traits import Traits

from ..common.arguments import natural, positive
from ..common.devices import checked_device, default_device
from ..common.errors import exit_with_message
from .errors import DataError
from .schema import TRAIN
from .store import TRAITS, write_parquet
from .worlds import DataSetWorld

ROWS = pa.schema([("user", pa.int64()), ("liked", pa.list_(pa.string())), ("disliked", pa.list_(pa.string()))])
USERS_AT_ONCE = 16


def main() -> None:
    args = arguments()
    with exit_with_message():
        world = DataSetWorld(args.data)
        mllm = PreferenceMLLM.load(args.mllm, DTYPES[args.dtype], checked_device(args.device), args.lora)
        report = make(world, mllm, args.pictures, args.users, not args.without_prompts)
    print(json.dumps({key: report[key] for key in ("users", "told", "disliked")}, indent=1))


def make(world: DataSetWorld, mllm: PreferenceMLLM, pictures: int, users: int = 0, prompts: bool = True) -> dict:
    """Write DATA/traits/traits.parquet and its report; returns the report. pictures: of either verdict, at most; users:
    the first ones of the training split, 0 for all; prompts: whether the MLLM reads those of the pictures. DataError
    for a folder that holds other traits."""
    folder = world.folder / TRAITS
    config = {
        "source_sha256": world.digest,
        "mllm": mllm.fingerprint,
        "pictures": pictures,
        "users": users,
        "prompts": prompts,
    }
    path = folder / "report.json"
    parts = folder / ".parts"
    for earlier in (path, parts / "config.json"):
        _refuse_other(earlier, config)
    if path.exists():
        print(f"{folder} is finished already.")
        return json.loads(read_text(path))
    parts.mkdir(parents=True, exist_ok=True)
    write_atomic(parts / "config.json", json.dumps({"config": config}).encode())
    people = world.users(TRAIN, users)
    spans = range(0, len(people), USERS_AT_ONCE)
    for start in tqdm(spans, desc="traits", unit=f"{USERS_AT_ONCE} users"):
        piece = parts / f"{start:08d}.parquet"
        if not piece.exists():
            rows = [row_of(world, mllm, user, pictures, prompts) for user in people[start : start + USERS_AT_ONCE]]
            write_parquet(piece, ROWS, [pa.Table.from_pylist(rows, ROWS)])
    write_parquet(folder / "traits.parquet", ROWS, _pieces(parts, spans))
    table = pq.read_table(folder / "traits.parquet", partitioning=None)
    counts = {name: sum(bool(words) for words in table[name].to_pylist()) for name in ("liked", "disliked")}
    report = {
        "config": config,
        "sha256": file_sha256(folder / "traits.parquet"),
        "users": len(table),
        "told": counts["liked"],
        "disliked": counts["disliked"],
    }
    write_atomic(path, (json.dumps(report, indent=1) + "\n").encode())
    shutil.rmtree(parts)
    return report


def row_of(world: DataSetWorld, mllm: PreferenceMLLM, user: int, pictures: int, prompts: bool = True) -> dict:
    """One row of ROWS: what the MLLM says of so many liked and disliked pictures, the same ones every time."""
    drawn = world.history(user, np.random.default_rng([user, pictures]), pictures, pictures)
    images = [torch.from_numpy(picture).float() / 255 for picture in world.pictures(drawn.pictures)]
    items = zip(images, drawn.liked.tolist(), drawn.prompts, strict=True)
    history = PreferenceHistory(
        tuple(HistoryItem(image, liked, prompt if prompts else "") for image, liked, prompt in items)
    )
    traits = Traits.asked(lambda question: mllm.answer(history, question), not drawn.liked.all())
    return {"user": user, "liked": list(traits.liked), "disliked": list(traits.disliked)}


def _pieces(parts: Path, spans: range) -> Iterator[pa.Table]:
    for start in spans:
        yield pq.read_table(parts / f"{start:08d}.parquet", partitioning=None)


def _refuse_other(path: Path, config: dict) -> None:
    """DataError where a file's `config` is another."""
    if path.exists() and json.loads(read_text(path))["config"] != json.loads(json.dumps(config)):
        raise DataError(
            f"{path.parent} holds other traits, of another set, MLLM or number of pictures: delete it and run the same "
            "command again."
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.data.traits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="folder of a finished data set")
    parser.add_argument("--mllm", type=Path, required=True, help="folder of the MLLM that is asked")
    parser.add_argument("--lora", type=Path, help="LoRA of that MLLM")
    parser.add_argument("--pictures", type=positive, default=8, help="liked and disliked ones a user, at most")
    parser.add_argument("--users", type=natural, default=0, help="the first ones, 0 for all")
    parser.add_argument(
        "--without-prompts", action="store_true", help="for an MLLM that was tuned without them, as the atelier's was"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", default=default_device())
    return parser.parse_args()


if __name__ == "__main__":
    main()
