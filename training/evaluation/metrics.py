"""What is measured on the pictures of a row, and the intervals, which resample whole users."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F

from prefgen.atelier import captions, users
from prefgen.atelier.renderer import render
from training.common.mmd import mmd2

from ..common.atelier_clip import text_features, tokenize
from ..common.statistics import bootstrap, ci95, resampled
from .evaluate.painter import Asked, Painter, stacked

LIKED_DRAWN, LIKED_SEED = 32, 2  # of each user, for the distribution that pictures are held against
CMMD_BANDWIDTH = torch.tensor([100.0])  # squared: sigma 10, as published for CLIP embeddings (arXiv 2401.09603)


@torch.inference_mode()
def read(painter: Painter, pictures: torch.Tensor) -> list[dict]:
    """What the judge sees, and the embeddings, of every picture [B, 3, H, W] in -1..1: {"subject", "attributes",
    "clip" [128], "judge" [256]}."""
    unit = pictures * 0.5 + 0.5
    embeds, features = painter.embeds(pictures), painter.judge.features(unit)
    return [
        {
            "subject": r["subject"],
            "attributes": dict(r["attributes"]),
            "clip": [round(x, 5) for x in embed.tolist()],
            "judge": [round(x, 4) for x in feature.tolist()],
        }
        for r, embed, feature in zip(painter.judge.read(unit.movedim(1, -1)), embeds, features, strict=True)
    ]


def liked_pictures(painter: Painter, person: users.User, prompts: list[tuple[str, str]]) -> list[dict]:
    """Readings of renders that the user would like, on these prompts: none of them is in any history."""
    drawn = users.history(person, LIKED_DRAWN, 0, LIKED_SEED, prompts)
    return read(painter, stacked([torch.from_numpy(render(e.scene)).float() / 255 for e in drawn]))


@torch.inference_mode()
def prompt_embeds(painter: Painter, asked: Asked) -> np.ndarray:
    """Unit CLIP text embeddings [n, 128] of the neutral prompts."""
    ids = tokenize(painter.tokenizer, [captions.neutral(subject, prop) for _, subject, prop in asked])
    return F.normalize(text_features(painter.clip, ids)[1], dim=1).numpy()


def only(person: users.User, families: set[str]) -> users.User | None:
    """The user with opinions on these families only; None when a taste or the dislikes have none there."""
    tastes = tuple(users.Taste(tuple(p for p in t.liked if p[0] in families)) for t in person.tastes)
    disliked = tuple(p for p in person.disliked if p[0] in families)
    return replace(person, tastes=tastes, disliked=disliked) if disliked and all(t.liked for t in tastes) else None


def by_user(values: np.ndarray, asked: Asked) -> np.ndarray:
    """Means [users] of one value a picture [n]."""
    owners = np.array([user for user, _, _ in asked])
    return np.array([values[owners == user].mean() for user in range(owners.max() + 1)])


def alignment(readings: list[dict], people: list[users.User | None], asked: Asked) -> np.ndarray:
    """Mean alignment of every user's pictures, [users]; NaN for a user that is None."""
    found = [
        np.nan if people[user] is None else users.alignment(reading["attributes"], people[user])
        for reading, (user, _, _) in zip(readings, asked, strict=True)
    ]
    return by_user(np.array(found), asked)


def cmmd(pictures: np.ndarray, liked: np.ndarray) -> float:
    """1000 times the squared MMD of unit CLIP embeddings [n, d] and [m, d] (unbiased, so it can be negative)."""
    return 1000 * mmd2(torch.from_numpy(pictures), torch.from_numpy(liked), CMMD_BANDWIDTH).item()


def kid(pictures: np.ndarray, liked: np.ndarray) -> float:
    """Squared MMD of features [n, d] and [m, d] under the kernel (x y / d + 1)^3, unbiased (arXiv 1801.01401)."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(pictures) + within(liked) - 2 * kernel(pictures, liked).mean())


def frechet(pictures: list[np.ndarray], liked: list[np.ndarray]) -> float:
    """Frechet distance (arXiv 1706.08500) between all users' features [n, d] and [m, d] together.

    Biased upwards where n is small, by the same n in every row; resampled users hold fewer different ones and would be
    biased more, so there is no interval.
    """

    a = np.concatenate(pictures)
    b = np.concatenate(liked)
    spread = np.cov(a, rowvar=False)
    liked_spread = np.cov(b, rowvar=False)
    between_means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    # The root of a product of covariances has an imaginary part by rounding alone.
    shared = np.trace(scipy.linalg.sqrtm(spread @ liked_spread).real)
    return float(between_means + np.trace(spread) + np.trace(liked_spread) - 2 * shared)


def features_of(name: str, readings: list[dict], asked: Asked) -> list[np.ndarray]:
    """Each user's features [n, d] in the space `name`."""
    owners, space = np.array([user for user, _, _ in asked]), np.array([r[name] for r in readings])
    return [space[owners == user] for user in range(owners.max() + 1)]


def to_liked(distance, name: str, readings: list[dict], liked: list[list[dict]], asked: Asked) -> np.ndarray:
    """A distance between each user's pictures and what that user likes, [users], in the space `name`."""
    own = features_of(name, readings, asked)
    return np.array([distance(own[u], np.array([r[name] for r in liked[u]])) for u in range(len(liked))])


def diversity(readings: list[dict], each: int) -> np.ndarray:
    """Mean 1 - cosine of CLIP embeddings between pictures that differ in the seed alone: `each` in a row, [groups]."""
    groups = np.array([r["clip"] for r in readings]).reshape(-1, each, len(readings[0]["clip"]))
    cosine = groups @ groups.transpose(0, 2, 1)
    return 1 - (cosine.sum((1, 2)) - np.trace(cosine, axis1=1, axis2=2)) / (each * (each - 1))


def interval(values: np.ndarray) -> dict:
    """{"mean", "ci95", "users"} of `values` [users], NaNs left out."""
    known = values[~np.isnan(values)]
    return {"mean": round(float(known.mean()), 4), "ci95": bootstrap(known), "users": len(known)}


def gain_share(row: np.ndarray, none: np.ndarray, oracle: np.ndarray) -> dict:
    """(row - none) / (oracle - none), of the means; the interval resamples the users of all three together.

    {"mean", "ci95"}; None where the oracle gains nothing, in the mean or in any draw: there is no share of that.
    """
    a, b, c = resampled(np.stack([row, none, oracle]))
    ceiling = oracle.mean() - none.mean()
    share = round(float((row.mean() - none.mean()) / ceiling), 4) if ceiling > 0 else None
    return {"mean": share, "ci95": ci95((a - b) / (c - b)) if (c > b).all() else None}
