"""Who is painted for: test users of a data set, what the encoders make of their histories, and what they are asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from tqdm import tqdm

from prefgen.adapter import UserAdapter
from prefgen.adapter_checks import check_encoded
from prefgen.encoded import EncodedPreference
from prefgen.files import read_text, write_atomic
from prefgen.fusion import fuse_user_vector
from prefgen.history import PreferenceHistory
from prefgen.mllm.model import PreferenceMLLM
from prefgen.mllm.traits import Traits

from ...common.clip_vision import ClipVision
from ...data.errors import DataError
from ...data.schema import TEST
from ...data.worlds import DataSetWorld


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
    asked = world.heldout_prompts()
    if len(asked) < prompts:
        raise DataError(f"{world.name} has {len(asked)} held-out prompts, {prompts} are needed: ask for fewer.")
    people = []
    for user in world.users(TEST, count):
        rng = np.random.default_rng([seed, user])
        history = world.history(user, rng, size, size)
        texts = world.texts(user)
        people.append(
            Person(
                user,
                tuple(history.pictures[history.liked].tolist()),
                tuple(history.pictures[~history.liked].tolist()),
                tuple(world.unseen_liked(user, history.pictures).tolist()),
                tuple(asked[i] for i in rng.choice(len(asked), prompts, replace=False)),
                texts[0] if texts else "",
            )
        )
    return people


class Read:
    """What MLLM and CLIP vision read off every person's history, kept in a folder as soon as it is read."""

    def __init__(self, folder: Path, world: DataSetWorld, config, lora: Path | None, device: str):
        self.folder, self.world, self.config, self.lora, self.device = folder, world, config, lora, device

    @cached_property
    def mllm(self) -> PreferenceMLLM:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.config.mllm.precision]
        return PreferenceMLLM.load(self.config.mllm.path, dtype, self.device, self.lora)

    @cached_property
    def vision(self) -> ClipVision:
        return ClipVision(self.config.clip_vision.path, self.device)

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
        path = self.folder / f"{person.user}.safetensors"
        if not path.exists():
            history = self.history(person)
            tensors = {"hidden": self.mllm.encode(history)}
            for name, numbers in (("liked", person.liked), ("disliked", person.disliked)):
                if numbers:
                    tensors[name] = self.vision(self.pictures(numbers))
            about = {"mllm": json.dumps(self.mllm.fingerprint), "clip_vision": json.dumps(self.vision.about)}
            write_atomic(path, save(tensors, about | {"digest": history.digest}))
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            about = file.metadata()
        tensors = load_file(path)
        return EncodedPreference(
            hidden=tensors["hidden"],
            image_embed_liked=tensors["liked"],
            image_embed_disliked=tensors.get("disliked"),
            mllm=json.loads(about["mllm"]),
            # What an earlier version kept doesn't say which encoder it was.
            clip_vision=json.loads(about.get("clip_vision", "{}")) | {"width": tensors["liked"].shape[1]},
            digest=about["digest"],
        )

    def traits(self, person: Person) -> Traits:
        path = self.folder / f"{person.user}.json"
        if not path.exists():
            history = self.history(person)
            traits = Traits.asked(lambda question: self.mllm.answer(history, question), bool(person.disliked))
            write_atomic(path, traits.to_json().encode())
        said = json.loads(read_text(path))
        return Traits(tuple(said["liked"]), tuple(said["disliked"]))

    def all(self, people: list[Person], words: bool) -> None:
        """Read everything that isn't kept yet, then let the encoders go."""
        for person in tqdm(people, desc="histories"):
            self.encoded(person)
            if words:
                self.traits(person)
        for name in ("mllm", "vision"):
            self.__dict__.pop(name, None)

    def vector(self, adapter: UserAdapter, person: Person) -> torch.Tensor:
        """e_u [C + D + I], as the nodes make it. AdapterError when the adapter was made for other encoders."""
        encoded = self.encoded(person)
        check_encoded(adapter.header, encoded)
        return fuse_user_vector(adapter, encoded)
