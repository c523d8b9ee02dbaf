"""How much the targets of a set without attributes say of a taste that is known.

    python benchmarks/blind_targets.py --users 200

Simulated users of the atelier's world, whose true taste is the CLIP text embedding of their attributes. Every target of
`train_alignment` that doesn't use attributes is made of their histories alone, embedded by the same CLIP, and compared:
cosine with the user's own true taste and with other users', and how often the own one is the nearest of all. The
embedded MLLM that tells traits was trained to name attributes, which an MLLM off the shelf wasn't: it is the best case.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from records import machine

from prefgen.atelier.models import MLLM_FOLDER
from prefgen.mllm.model import PreferenceMLLM
from training.common.bases import load_base
from training.common.config.command import load
from training.data import targets, traits
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.schema import TRAIN
from training.data.worlds import DataSetWorld
from training.train_alignment import user_bank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200, help="of the training split")
    parser.add_argument("--pictures", type=int, default=8, help="liked and disliked ones that the MLLM sees")
    parser.add_argument("--threads", type=int, default=0, help="0 for all")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = {"machine": machine()} | measured(Path(folder) / "set", args.users, args.pictures)
        print(json.dumps(result, indent=1))


def measured(folder: Path, users: int, pictures: int) -> dict:
    """{target: its figures} of so many users of a set that is made in `folder`."""
    # A tenth are of the other split, and each has as many pictures as an agent of the paper's data.
    people = users * 10 // 8
    make(Population(people, people * 20, 3, 200, Atelier(128), None), folder, processes=1)
    # The embedded MLLM was tuned without prompts: with them it stutters.
    traits.make(DataSetWorld(folder), PreferenceMLLM.load(MLLM_FOLDER), pictures, users, prompts=False)
    world = DataSetWorld(folder)
    base = load_base(load("atelier"), "cpu", without=("unet", "vae"))
    chosen = world.users(TRAIN, users)
    truth = user_bank(base, world, chosen)
    figures = {}
    for target in (targets.ATTRIBUTES, targets.TRAITS, targets.PROMPTS):
        bank = user_bank(base, world, chosen, target)
        figures[target] = {"users": users, "told": int((bank.abs().sum(1) > 0).sum())} | compared(bank, truth)
    return figures


def compared(bank: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Cosine with the own taste and with others', and the share of users whose own is the nearest; rows of [users, C],
    centred first, since all texts have much in common."""
    bank, truth = (torch.nn.functional.normalize(rows - rows.mean(0), dim=1) for rows in (bank, truth))
    cosines = bank @ truth.T
    users = len(cosines)
    own = cosines.diagonal()
    return {
        "own": round(float(own.mean()), 4),
        "others": round(float((cosines.sum() - own.sum()) / (users * (users - 1))), 4),
        "nearest": round(float((cosines.argmax(1) == torch.arange(users)).float().mean()), 4),
        "chance": round(1 / users, 4),
    }


if __name__ == "__main__":
    main()
