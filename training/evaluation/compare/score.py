"""What the judges say of the painted rows: one value a picture, means over users, intervals by resampling users."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from prefgen.pictures import read_picture

from ..metrics import cmmd, diversity, interval
from ..scores import Clip, Csd, ViperProxy
from .painter import Job
from .people import HistoryReadings, Person


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
    "leak": ("cosine to the nearest liked picture that the method saw, x 100", False),
    "cmmd": ("CMMD to unseen liked pictures", False),
    "clip_t": ("CLIP-T: cosine to the prompt, x 100", True),
    "pickscore": ("PickScore", True),
    "diversity": ("1 - cosine between seeds", True),
}


def score_row(
    folder: Path, jobs: list[Job], people: list[Person], readings: HistoryReadings, judges: Judges
) -> dict[str, list[float]]:
    """{measure: [people]} of one row, NaN where a user has nothing to compare with; one user in memory at a time."""
    values = defaultdict(list)
    for number, person in enumerate(tqdm(people, desc=folder.name, leave=False)):
        own = [job for job in jobs if job.person == number]
        for name, value in score_person(folder, own, person, readings, judges).items():
            values[name].append(value)
    return {name: values[name] for name in MEASURES if name in values}


def score_person(
    folder: Path, jobs: list[Job], person: Person, readings: HistoryReadings, judges: Judges
) -> dict[str, float]:
    """{measure: mean over one user's pictures} by every judge that is there."""
    pictures = [Image.fromarray(read_picture(folder / job.name, long_side=None)) for job in jobs]
    prompts = [person.prompts[job.prompt] for job in jobs]
    liked = readings.pictures(person.unseen)
    embeds = judges.clip.images(pictures)
    values = {
        "clip_t": float(100 * (embeds * judges.clip.texts(prompts)).sum(1).mean()),
        "clip_i": float(100 * cosine_to_mean(embeds, judges.clip.images, liked)),
        "leak": float(100 * nearest(embeds, judges.clip.images, readings.pictures(person.liked))),
        "cmmd": float("nan"),
        "diversity": float(diversity(embeds.view(len(person.prompts), -1, embeds.shape[1]).numpy()).mean()),
    }
    # An unbiased distance needs two pictures on each side.
    if min(len(liked), len(pictures)) >= 2:
        values["cmmd"] = cmmd(embeds.numpy(), judges.clip.images(liked).numpy())
    if judges.pickscore:
        values["pickscore"] = float(judges.pickscore.pickscore(pictures, prompts).mean())
    if judges.csd:
        values["csd"] = float(cosine_to_mean(judges.csd(pictures), judges.csd, liked))
    if judges.viper:
        sides = [readings.pictures(numbers) for numbers in (person.liked, person.disliked)]
        values["viper"] = float(judges.viper.score(*sides, pictures).mean()) if all(sides) else float("nan")
    return values


def cosine_to_mean(
    embeds: torch.Tensor, embed: Callable[[list[Image.Image]], torch.Tensor], liked: list[Image.Image]
) -> torch.Tensor:
    """Mean cosine of unit embeddings [n, d] with the direction of the liked pictures' mean; NaN without any."""
    if not liked:
        return torch.tensor(float("nan"))
    mean = torch.nn.functional.normalize(embed(liked).mean(0), dim=0)
    return (embeds @ mean).mean()


def nearest(
    embeds: torch.Tensor, embed: Callable[[list[Image.Image]], torch.Tensor], seen: list[Image.Image]
) -> torch.Tensor:
    """Mean over unit embeddings [n, d] of the largest cosine with a picture; NaN without any. What was taken of one
    picture, its subject above all, shows here more than in a mean."""
    if not seen:
        return torch.tensor(float("nan"))
    return (embeds @ embed(seen).T).amax(1).mean()


def summary(values: dict[str, list[float]], reference: dict[str, list[float]], null: dict[str, list[float]]) -> dict:
    """{measure: {"mean", "ci95", "users", "minus_prefgen", "minus_null"}}; measures that no user has are left out.
    null: of no preference, without which unrelated pictures look alike already."""
    return {
        name: interval(np.array(column))
        | {
            "minus_prefgen": interval(np.array(column) - np.array(reference[name])),
            "minus_null": interval(np.array(column) - np.array(null[name])),
        }
        for name, column in values.items()
        if not np.isnan(column).all()
    }
