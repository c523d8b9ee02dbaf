"""Painting a row: the shipped models, sampled as the training stages do."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from prefgen.adapter import UserAdapter
from prefgen.adapter_file import load_adapter
from prefgen.atelier import captions, models, users
from prefgen.atelier.judge import load_judge
from prefgen.atelier.renderer import render
from prefgen.encoded import EncodedPreference
from prefgen.fusion import fuse_user_vector
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.traits import Traits

from ...common.atelier_clip import image_features, text_features, tokenize
from ...common.sampling import decode, sample
from ...common.user_branch import install
from .. import reference
from ..rows import Pictures, Row

GUIDANCE = 3.0
STEPS = 20
# The noise of a picture is seeded by where its batch starts and its place there: another BATCH is other noise.
BATCH = 48
HISTORY_SEED = 1


class Request(NamedTuple):
    """One picture: for which user (an index) and of what."""

    user: int
    subject: str
    prop: str


class Painter:
    """The atelier's models. adapter: the shipped one unless given."""

    def __init__(self, adapter: UserAdapter | None = None):
        self.adapter = adapter or load_adapter(models.WEIGHTS / "adapter.safetensors")
        self.mllm = PreferenceMLLM.load(models.MLLM_FOLDER)
        self.clip = models.load_clip()
        self.tokenizer = models.clip_tokenizer()
        self.unet = models.load_unet_diffusers()
        self.vae = models.load_vae_diffusers()
        self.judge = load_judge()
        self.branch = install(self.unet)
        self.references = reference.install(self.unet)
        self.empty = self.states([""])

    def of(self, weights: Path) -> Painter:
        """The same with another adapter and MLLM: adapter.safetensors and mllm/ of a weights folder."""
        other = copy.copy(self)
        other.adapter = load_adapter(weights / "adapter.safetensors")
        other.mllm = PreferenceMLLM.load(weights / "mllm")
        return other

    @torch.inference_mode()
    def states(self, texts: list[str]) -> torch.Tensor:
        """Text states [B, T, X]."""
        return text_features(self.clip, tokenize(self.tokenizer, texts))[0]

    @torch.inference_mode()
    def user_vector(self, liked: Pictures, disliked: Pictures, parts=(1.0, 1.0, 1.0)) -> torch.Tensor:
        """e_u [C + D + I] of a history, as the nodes make it."""
        history = PreferenceHistory.from_images(liked, disliked)
        embeds = [self.embeds(stacked(pictures)) if pictures else None for pictures in (liked, disliked)]
        encoded = EncodedPreference(
            hidden=self.mllm.encode(history),
            image_embed_liked=embeds[0],
            image_embed_disliked=embeds[1],
            mllm=self.mllm.fingerprint,
            clip_vision={"width": embeds[0].shape[1]},
            digest=history.digest,
        )
        return fuse_user_vector(self.adapter, encoded, *parts)

    @torch.inference_mode()
    def traits(self, liked: Pictures, disliked: Pictures) -> Traits:
        """What the MLLM says that is liked and disliked; of two tastes the first, since one prompt can't hold both."""
        # The atelier's MLLM answers "likes a, b or c ; avoids d": "or" parts several tastes.
        said, _, avoided = self.mllm.answer(PreferenceHistory.from_images(liked, disliked)).partition(";")
        return Traits.of_answers(said.partition(" or ")[0], avoided)

    @torch.inference_mode()
    def embeds(self, pictures: torch.Tensor) -> torch.Tensor:
        """Unit CLIP image embeddings [B, I] of pictures [B, 3, 128, 128] in -1..1."""
        return F.normalize(image_features(self.clip, pictures), dim=1)

    @torch.inference_mode()
    def latents(self, pictures: Pictures) -> torch.Tensor:
        """Unit-variance latents [B, c, h, w]."""
        return self.vae.encode(stacked(pictures)).latent_dist.mean * self.vae.config.scaling_factor

    @torch.inference_mode()
    def paint(
        self,
        texts: list[str],
        vectors: torch.Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        negative: list[str] | None = None,
        history: tuple[Pictures, Pictures] | None = None,
        weight: float = 1.0,
    ) -> torch.Tensor:
        """Pictures [B, 3, 128, 128] in -1..1; vectors [B, C + D + I], or None for no user.

        history: (liked, disliked), for reference attention. weight: of the user attention, or of that. seed, first: see
        `sample`.
        """
        keys_values = [None] * len(self.branch) if vectors is None else self.adapter.keys_values(vectors)
        for processor, pair in zip(self.branch, keys_values, strict=True):
            # The unconditional half has no branch: zero values add nothing to it.
            processor.keys_values = pair and (
                torch.cat([pair[0]] * 2),
                torch.cat([torch.zeros_like(pair[1]), weight * pair[1]]),
            )
        unet = self.unet
        if history is not None:
            liked, disliked = map(self.latents, history)
            unet = reference.Referenced(unet, self.references, disliked, liked, self.empty, weight)
        unconditional = self.empty if negative is None else self.states(negative)
        with torch.autocast("cpu", torch.bfloat16):
            latents = sample(unet, self.states(texts), unconditional, GUIDANCE, STEPS, seed, first)
        return decode(self.vae, latents)


def stacked(pictures: Pictures) -> torch.Tensor:
    """[B, 3, H, W] in -1..1."""
    return torch.stack(pictures).movedim(-1, 1) * 2 - 1


def history_of(person: users.User, size: int) -> tuple[Pictures, Pictures]:
    """(liked, disliked) pictures of a user, `size` of each; a longer history begins with the shorter one."""
    examples = users.history(person, size, size, HISTORY_SEED)
    drawn = [(torch.from_numpy(render(e.scene)).float() / 255, e.liked) for e in examples]
    return [p for p, liked in drawn if liked], [p for p, liked in drawn if not liked]


def requests(people: list[users.User], prompts: int) -> list[Request]:
    """What every picture shows: each user gets `prompts` of the held-out ones, by turns all of them."""
    heldout = captions.heldout_prompts()
    return [
        Request(user, *heldout[(user * prompts + i) % len(heldout)])
        for user in range(len(people))
        for i in range(prompts)
    ]


@dataclass(frozen=True)
class Condition:
    """What a row paints one user's pictures with, all of a history: (liked, disliked), e_u, the MLLM's words."""

    history: tuple[Pictures, Pictures] | None = None
    vector: torch.Tensor | None = None
    traits: Traits | None = None


def condition_of(painter: Painter, row: Row, owner: users.User) -> Condition:
    """What the row takes of its owner's history."""
    if not row.reads_history:
        return Condition()
    history = history_of(owner, row.size)
    vector = painter.user_vector(*row.history(*history), row.parts) if row.adapter else None
    return Condition(history, vector, painter.traits(*history) if row.words == "mllm" else None)


def paint_row(
    painter: Painter, row: Row, people: list[users.User], requests: Sequence[Request]
) -> Iterator[torch.Tensor]:
    """Paint a row: batches of pictures [B, 3, 128, 128] in -1..1, in order. The noise of a picture is the same in every
    row with the same `requests`."""
    owners = people[1:] + people[:1] if row.of_other else people
    conditions = {user: condition_of(painter, row, owners[user]) for user in sorted({each.user for each in requests})}
    for start in range(0, len(requests), BATCH):
        first = 0
        for group in calls(requests[start : start + BATCH], row):
            own = [conditions[each.user] for each in group]
            yield painter.paint(
                [prompt_of(each, row, people, conditions[each.user].traits) for each in group],
                torch.stack([condition.vector for condition in own]) if row.adapter else None,
                seed=start,
                first=first,
                negative=[condition.traits.negative for condition in own] if row.negative else None,
                history=own[0].history if row.reference else None,
                weight=row.reference or row.weight,
            )
            first += len(group)


def calls(batch: Sequence[Request], row: Row) -> Iterator[list[Request]]:
    """The pictures of every call that paints a batch: all in one, but with reference attention one user's in each,
    since the references are one user's."""
    for _, group in groupby(batch, lambda each: each.user if row.reference else None):
        yield list(group)


def prompt_of(request: Request, row: Row, people: list[users.User], traits: Traits | None) -> str:
    """The prompt of a picture, with the taste in words where the row has it."""
    user, subject, prop = request
    if row.words == "taste":
        return captions.enriched(subject, prop, dict(people[user].tastes[0].liked))
    return ", ".join([captions.neutral(subject, prop), *(traits.liked if traits else ())])
