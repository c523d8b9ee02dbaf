"""What the atelier's judge and CLIP see on pictures, and how far that is to a user's taste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from prefgen.atelier import captions, users
from prefgen.atelier.renderer import render

from ...common.atelier_clip import text_features, tokenize
from ..metrics import by_user
from .painter import Painter, Request, stacked

LIKED_DRAWN = 32  # of each user, for the distribution that pictures are held against
LIKED_SEED = 2


@torch.inference_mode()
def read(painter: Painter, pictures: torch.Tensor) -> list[dict]:
    """What the judge sees, and the embeddings, of every picture [B, 3, H, W] in -1..1: {"subject", "attributes",
    "clip" [128], "judge" [256]}."""
    unit = pictures * 0.5 + 0.5
    embeds = painter.embeds(pictures)
    features = painter.judge.features(unit)
    return [
        {
            "subject": seen["subject"],
            "attributes": dict(seen["attributes"]),
            "clip": [round(x, 5) for x in embed.tolist()],
            "judge": [round(x, 4) for x in feature.tolist()],
        }
        for seen, embed, feature in zip(painter.judge.read(unit.movedim(1, -1)), embeds, features, strict=True)
    ]


def liked_pictures(painter: Painter, person: users.User, prompts: list[tuple[str, str]]) -> list[dict]:
    """Readings of renders that the user would like, on these prompts: none of them is in any history."""
    drawn = users.history(person, LIKED_DRAWN, 0, LIKED_SEED, prompts)
    return read(painter, stacked([torch.from_numpy(render(e.scene)).float() / 255 for e in drawn]))


@torch.inference_mode()
def prompt_embeds(painter: Painter, requests: Sequence[Request]) -> np.ndarray:
    """Unit CLIP text embeddings [n, 128] of the neutral prompts."""
    ids = tokenize(painter.tokenizer, [captions.neutral(subject, prop) for _, subject, prop in requests])
    return F.normalize(text_features(painter.clip, ids)[1], dim=1).numpy()


def only(person: users.User, families: set[str]) -> users.User | None:
    """The user with opinions on these families only; None when a taste or the dislikes have none there."""
    tastes = tuple(users.Taste(tuple(p for p in t.liked if p[0] in families)) for t in person.tastes)
    disliked = tuple(p for p in person.disliked if p[0] in families)
    return replace(person, tastes=tastes, disliked=disliked) if disliked and all(t.liked for t in tastes) else None


def alignment(readings: list[dict], people: list[users.User | None], requests: Sequence[Request]) -> np.ndarray:
    """Mean alignment of every user's pictures, [users]; NaN for a user that is None."""
    values = [
        np.nan if people[user] is None else users.alignment(reading["attributes"], people[user])
        for reading, (user, _, _) in zip(readings, requests, strict=True)
    ]
    return by_user(np.array(values), [user for user, _, _ in requests])
