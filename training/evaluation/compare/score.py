"""What the judges say of the painted rows: one value a picture, means over users, intervals by resampling users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from prefgen.pictures import read_picture

from ..metrics import cmmd, interval
from ..scores import Clip, Csd, ViperProxy
from .painter import Job
from .people import Person, Read


@dataclass(frozen=True)
class Judges:
    """The judges whose weights were given; clip always, the others or None."""

    clip: Clip
    pickscore: Clip | None = None
    csd: Csd | None = None
    viper: ViperProxy | None = None


# name -> (what it says, whether more is better)
MEASURES = {
    "viper": ("ViPer proxy: would the user like it, 0..1", True),
    "csd": ("CSD: cosine to the style of unseen liked pictures", True),
    "clip_i": ("CLIP-I: cosine to unseen liked pictures, x 100", True),
    "cmmd": ("CMMD to unseen liked pictures", False),
    "clip_t": ("CLIP-T: cosine to the prompt, x 100", True),
    "pickscore": ("PickScore", True),
    "diversity": ("1 - cosine between seeds", True),
}


def opened(folder: Path, wanted: list[Job]) -> list[Image.Image]:
    return [Image.fromarray(read_picture(folder / job.name, long_side=None)) for job in wanted]


def score_row(folder: Path, wanted: list[Job], people: list[Person], read: Read, judges: Judges) -> dict[str, list]:
    """{measure: [people]} of one row, NaN where a user has nothing to compare with; one user in memory at a time."""
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for number, person in enumerate(tqdm(people, desc=folder.name, leave=False)):
        mine = [job for job in wanted if job.person == number]
        pictures, prompts = opened(folder, mine), [person.prompts[job.prompt] for job in mine]
        liked, seen = read.pictures(person.unseen), judges.clip.images(pictures)
        values["clip_t"].append(float(100 * (seen * judges.clip.texts(prompts)).sum(1).mean()))
        values["clip_i"].append(near(judges.clip.images, seen, liked, 100))
        two = min(len(liked), len(pictures)) >= 2
        values["cmmd"].append(cmmd(seen.numpy(), judges.clip.images(liked).numpy()) if two else float("nan"))
        values["diversity"].append(spread(seen, mine))
        if judges.pickscore:
            values["pickscore"].append(float(judges.pickscore.pickscore(pictures, prompts).mean()))
        if judges.csd:
            values["csd"].append(near(judges.csd, judges.csd(pictures), liked, 1))
        if judges.viper:
            sides = [read.pictures(numbers) for numbers in (person.liked, person.disliked)]
            values["viper"].append(float(judges.viper.score(*sides, pictures).mean()) if all(sides) else float("nan"))
    return {name: found for name, found in values.items() if found}


def near(embed: Callable, seen: torch.Tensor, liked: list[Image.Image], scale: float) -> float:
    """Mean cosine of unit embeddings [n, d] with the direction of the liked pictures' mean."""
    if not liked:
        return float("nan")
    mean = torch.nn.functional.normalize(embed(liked).mean(0), dim=0)
    return float(scale * (seen @ mean).mean())


def spread(seen: torch.Tensor, mine: list[Job]) -> float:
    """Mean 1 - cosine between pictures that differ in the seed alone; NaN with one seed."""
    apart = []
    for prompt in {job.prompt for job in mine}:
        same = seen[[i for i, job in enumerate(mine) if job.prompt == prompt]]
        if len(same) > 1:
            cosine = same @ same.T
            apart.append(float(1 - (cosine.sum() - cosine.trace()) / (len(same) * (len(same) - 1))))
    return float(np.mean(apart)) if apart else float("nan")


def summary(values: dict[str, list], reference: dict[str, list]) -> dict:
    """{measure: {"mean", "ci95", "users", "minus_prefgen"}}; measures that no user has are left out."""
    found = {}
    for name, column in values.items():
        mine = np.array(column, float)
        if np.isnan(mine).all():
            continue
        found[name] = interval(mine) | {"minus_prefgen": interval(mine - np.array(reference[name], float))}
    return found
