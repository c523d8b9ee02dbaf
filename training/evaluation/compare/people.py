"""Who is painted for: test users of a data set, what the encoders make of their histories, and what they are asked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from prefgen.adapter import UserAdapter
from prefgen.adapter_checks import check_encoded
from prefgen.clip import ClipVision
from prefgen.dtypes import DTYPES
from prefgen.encoded import EncodedPreference
from prefgen.fusion import fuse_user_vector
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.traits import Traits

from ...data.errors import DataError
from ...data.schema import TEST
from ...data.worlds import DataSetWorld
from ..store import Store


@dataclass(frozen=True)
class Person:
    """A test user. history: liked and disliked pictures (their numbers in the data set) that the methods may see;
    unseen: liked ones that they don't; prompts: held-out prompts; taste: the true taste in words, "" if unknown."""

    user: int
    liked: tuple[int, ...]
    disliked: tuple[int, ...]
    unseen: tuple[int, ...]
    prompts: tuple[str, ...]
    taste: str


def people_of(world: DataSetWorld, count: int, prompts: int, size: int, seed: int) -> list[Person]:
    """The first `count` test users with `size` liked and disliked pictures at most and `prompts` held-out prompts."""
    heldout = world.heldout_prompts()
    if len(heldout) < prompts:
        raise DataError(f"{world.name} has {len(heldout)} held-out prompts, {prompts} are needed: ask for fewer.")
    people = []
    for user in world.users(TEST, count):
        # A generator of each user's own: more users, or fewer, leave the others' histories and prompts as they are.
        rng = np.random.default_rng([seed, user])
        history = world.history(user, rng, size, size)
        texts = world.texts(user)
        people.append(
            Person(
                user=user,
                liked=tuple(history.pictures[history.liked].tolist()),
                disliked=tuple(history.pictures[~history.liked].tolist()),
                unseen=tuple(world.unseen_liked(user, history.pictures).tolist()),
                prompts=tuple(heldout[i] for i in rng.choice(len(heldout), prompts, replace=False)),
                taste=texts[0] if texts else "",
            )
        )
    return people


class HistoryReadings:
    """What MLLM and CLIP vision read off every person's history, stored as soon as it is read."""

    def __init__(self, store: Store, world: DataSetWorld, config, lora: Path | None, device: str):
        self.store = store
        self.world = world
        self.config = config
        self.lora = lora
        self.device = device

    @cached_property
    def mllm(self) -> PreferenceMLLM:
        return PreferenceMLLM.load(self.config.mllm.path, DTYPES[self.config.mllm.precision], self.device, self.lora)

    @cached_property
    def vision(self) -> ClipVision:
        config = self.config.clip_vision
        return ClipVision(config.path, self.device, config.architecture)

    def pictures(self, numbers) -> list[Image.Image]:
        return [Image.fromarray(picture) for picture in self.world.pictures(numbers)]

    def history(self, person: Person) -> PreferenceHistory:
        sides = [
            [torch.from_numpy(picture).float() / 255 for picture in self.world.pictures(numbers)]
            for numbers in (person.liked, person.disliked)
        ]
        prompts = [[self.world.prompt(i) for i in numbers] for numbers in (person.liked, person.disliked)]
        return PreferenceHistory.from_images(*sides, *prompts)

    def encoded(self, person: Person) -> EncodedPreference:
        """The history as the nodes encode it."""

        def read() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
            history = self.history(person)
            tensors = {"hidden": self.mllm.encode(history)}
            for name, numbers in (("liked", person.liked), ("disliked", person.disliked)):
                if numbers:
                    tensors[name] = self.vision(self.pictures(numbers))
            encoders = {"mllm": json.dumps(self.mllm.fingerprint), "clip_vision": json.dumps(self.vision.about)}
            return tensors, encoders | {"digest": history.digest}

        tensors, about = self.store.tensors(str(person.user), read)
        return EncodedPreference(
            hidden=tensors["hidden"],
            image_embed_liked=tensors["liked"],
            image_embed_disliked=tensors.get("disliked"),
            mllm=json.loads(about["mllm"]),
            # What an earlier version stored doesn't say which encoder it was.
            clip_vision=json.loads(about.get("clip_vision", "{}")) | {"width": tensors["liked"].shape[1]},
            digest=about["digest"],
        )

    def traits(self, person: Person) -> Traits:
        """The taste in the MLLM's words."""

        def ask() -> dict:
            history = self.history(person)
            traits = Traits.asked(lambda question: self.mllm.answer(history, question), bool(person.disliked))
            return asdict(traits)

        words = self.store.json(str(person.user), ask)
        return Traits(tuple(words["liked"]), tuple(words["disliked"]))

    def all(self, people: list[Person]) -> None:
        """Read everything that isn't stored yet, then let the encoders go."""
        for person in tqdm(people, desc="histories"):
            self.encoded(person)
            self.traits(person)
        # The base's pipeline needs their memory next.
        for name in ("mllm", "vision"):
            self.__dict__.pop(name, None)

    def vector(self, adapter: UserAdapter, person: Person) -> torch.Tensor:
        """e_u [C + D + I], as the nodes make it. AdapterError when the adapter was made for other encoders."""
        encoded = self.encoded(person)
        check_encoded(adapter.header, encoded)
        return fuse_user_vector(adapter, encoded)
