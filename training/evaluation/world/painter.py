"""Painting with the second edition's models: text, user branch, trait tokens, reference attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from prefgen.adapter import UserAdapter
from prefgen.adapter_file import load_adapter
from prefgen.atelier import models
from prefgen.atelier.world.render import render
from prefgen.atelier.world.users import Example
from prefgen.encoded import EncodedPreference
from prefgen.fusion import fuse_user_vector
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.traits import Traits

from ...common.atelier_clip import text_features, tokenize
from ...common.sampling import atelier_scheduler, decode, guided_sample, seeded_noise
from ...common.user_branch import KeysValues, connect, install
from ...data.image_encoders import embedded_embeds
from ...data.trait_tokens import TraitLabels, load_trait_tokens
from .. import reference

GUIDANCE = 3.0
STEPS = 20
BATCH = 16
# How far trait tokens push away from what is disliked: as the branch's teacher does.
AWAY = 0.25


class ArmModels:
    """What reads a history and speaks of it: an arm's adapter and MLLM, from its weights folder."""

    def __init__(self, weights: Path, clip):
        self.clip = clip
        self.adapter: UserAdapter = load_adapter(weights / "adapter.safetensors")
        self.mllm = PreferenceMLLM.load(weights / "mllm")

    @torch.inference_mode()
    def user_vector(self, history: Sequence[Example]) -> torch.Tensor:
        """e_u [C + D + I] of a history, as the nodes make it."""
        read = as_history(history)
        sides = [[item.image for item in side] for side in (read.liked, read.disliked)]
        embeds = [embedded_embeds(self.clip, side) if side else None for side in sides]
        encoded = EncodedPreference(
            hidden=self._states(read, embeds),
            image_embed_liked=embeds[0],
            image_embed_disliked=embeds[1],
            digest=read.digest,
        )
        return fuse_user_vector(self.adapter, encoded)

    def _states(self, history: PreferenceHistory, embeds: list[torch.Tensor | None]) -> torch.Tensor:
        """H, or what takes its place in an arm without a decoder (training/data/pooled.py)."""
        states = (self.adapter.header.mllm or {}).get("states", "mllm")
        if states == "mllm":
            return self.mllm.encode(history)
        if states == "embeddings":
            means = [None if side is None else side.mean(0) for side in embeds]
        else:
            sides = (history.liked, history.disliked)
            means = [torch.cat(self.mllm.image_features(side)).mean(0) if side else None for side in sides]
        width = next(mean for mean in means if mean is not None)
        return torch.stack([torch.zeros_like(width) if mean is None else mean for mean in means]).float()

    @torch.inference_mode()
    def traits(self, history: Sequence[Example]) -> Traits:
        """What the MLLM says that is liked and disliked; of two tastes the first, since one prompt can't hold both."""
        # It answers "likes a, b or c ; avoids d": "or" parts several tastes.
        said, _, avoided = self.mllm.answer(as_history(history)).partition(";")
        return Traits.of_answers(said.partition(" or ")[0], avoided)


class Painter:
    """The second edition's models, loaded once for all rows."""

    def __init__(self) -> None:
        self.clip = models.load_clip()
        self.tokenizer = models.clip_tokenizer()
        self.unet = models.load_unet_diffusers()
        self.vae = models.load_vae_diffusers()
        self.tokens = load_trait_tokens()
        self.branch = install(self.unet)
        self.references = reference.install(self.unet)

    @torch.inference_mode()
    def states(self, texts: list[str]) -> torch.Tensor:
        """Text states [B, T, X]."""
        return text_features(self.clip, tokenize(self.tokenizer, texts))[0]

    @cached_property
    def empty(self) -> torch.Tensor:
        """Of the empty prompt, [1, T, X]."""
        return self.states([""])

    @torch.inference_mode()
    def emphasised(self, text: str, phrases: Sequence[str], weight: float) -> torch.Tensor:
        """States [1, T, X] of "text, phrase, phrase" with the phrases weighed as ComfyUI weighs `(phrase:1.3)`: their
        tokens' states go on along the line from the empty prompt's."""
        pieces = [text, *(piece for phrase in phrases for piece in (",", phrase))]
        states = self.states([", ".join([text, *phrases])])
        places = []
        start = 1  # after the sign that begins a text
        for number, piece in enumerate(pieces):
            length = len(self.tokenizer(piece, add_special_tokens=False).input_ids)
            if number and number % 2 == 0:
                places += range(start, min(start + length, states.shape[1]))
            start += length
        places = [place for place in places if place < states.shape[1]]
        states[:, places] = self.empty[:, places] + weight * (states[:, places] - self.empty[:, places])
        return states

    @torch.inference_mode()
    def paint(
        self,
        states: torch.Tensor,
        numbers: Sequence[int],
        unconditional: torch.Tensor | None = None,
        keys_values: KeysValues | None = None,
        references: tuple[list[Example], float] | None = None,
    ) -> torch.Tensor:
        """Pictures [B, 3, 256, 256] in -1..1 for text states [B, T, X]. numbers: of the pictures, which seed their
        noise; unconditional [B, T, X]: of negative prompts; keys_values: of users, for the half with the prompt;
        references: (a history, weight) of reference attention."""
        none = self.empty.expand_as(states) if unconditional is None else unconditional
        # Values of zero add nothing to the unconditional half.
        both = keys_values and [(torch.cat([k, k]), torch.cat([torch.zeros_like(v), v])) for k, v in keys_values]
        connect(self.branch, both)
        condition = torch.cat([none, states])
        unet: Callable = self.unet
        if references is not None:
            unet = self._referenced(*references)

        def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return unet(noisy, timestep, condition).sample.float()

        return self._sampled(predict, numbers)

    @torch.inference_mode()
    def paint_traits(self, texts: list[str], liked: TraitLabels, disliked: TraitLabels, numbers: Sequence[int]):
        """The same with trait tokens: what is liked, pushed away from what is disliked."""
        states = self.states(texts)
        nothing = TraitLabels(liked.classes, liked.values, torch.zeros_like(liked.said))
        conditions = [
            torch.cat([text, self.tokens.of(labels)], 1)
            for text, labels in ((self.empty.expand_as(states), nothing), (states, liked), (states, disliked))
        ]
        connect(self.branch, None)

        def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            thrice = torch.cat([noisy[: len(texts)]] * 3)
            none, likes, dislikes = self.unet(thrice, timestep, torch.cat(conditions)).sample.float().chunk(3)
            return torch.cat([none, likes + AWAY * (likes - dislikes)])

        return self._sampled(predict, numbers)

    def _sampled(self, predict: Callable, numbers: Sequence[int]) -> torch.Tensor:
        side = self.unet.config.sample_size
        noise = seeded_noise((self.unet.config.in_channels, side, side), numbers)
        with torch.autocast("cpu", torch.bfloat16):
            latents = guided_sample(predict, noise, atelier_scheduler(), STEPS, GUIDANCE)
        return decode(self.vae, latents, batch=8)

    def _referenced(self, history: list[Example], weight: float) -> reference.Referenced:
        sides = [[example for example in history if example.liked == verdict] for verdict in (False, True)]
        count = min(map(len, sides))
        latents = [self.vae.encode(as_pictures(side[:count])).latent_dist.mean for side in sides]
        return reference.Referenced(self.unet, self.references, *latents, self.empty, weight)


def as_history(examples: Sequence[Example]) -> PreferenceHistory:
    """A history of renders with their prompts, as the graph hands it on."""
    sides = [[example for example in examples if example.liked == verdict] for verdict in (True, False)]
    images = [[torch.from_numpy(render(example.scene)).float() / 255 for example in side] for side in sides]
    return PreferenceHistory.from_images(*images, *([example.prompt.text for example in side] for side in sides))


def as_pictures(examples: Sequence[Example]) -> torch.Tensor:
    """Renders [B, 3, 256, 256] in -1..1."""
    drawn = np.stack([render(example.scene) for example in examples])
    return torch.from_numpy(drawn).movedim(-1, 1).float() / 127.5 - 1
