"""The rows of one setting, each painted and read once, whatever is measured of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from prefgen.atelier.world.judge import Judge, load_judge
from prefgen.atelier.world.prompts import Prompt
from prefgen.atelier.world.render import render
from prefgen.atelier.world.tastes import avoided_text, disliked_of, enriched_text, liked_of
from prefgen.atelier.world.users import User
from prefgen.files import file_sha256, visible_files
from prefgen.mllm.traits import Traits

from ...common.files import save_image
from ...data.people_world import labels_of
from ...data.trait_tokens import TraitLabels
from ..store import Store
from . import readings
from .drawn import cloner, render_oracle
from .painter import BATCH, ArmModels, Painter
from .requests import Request, history_of, negative_words, partners_of, with_words
from .rows import Row

DRAWN_SEED = 6
SHEET_COLUMNS = 16


class PaintedRows:
    """arms: {arm: the weights folder of every training seed}. size: pictures of a verdict in a history. reporting: the
    judge that is reported, "a" where something is chosen."""

    def __init__(
        self,
        store: Store,
        people: Sequence[User],
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        arms: Mapping[str, Sequence[Path]],
        size: int = 8,
        reporting: str = "b",
    ):
        self.store = store
        self.people = people
        self.prompts = prompts
        self.requests = requests
        self.arms = arms
        self.reporting = reporting
        self.histories = [history_of(person, size) for person in people]
        self.vectors: dict[tuple[Path, int], torch.Tensor] = {}
        self.traits: dict[tuple[Path, int], Traits] = {}

    @cached_property
    def painter(self) -> Painter:
        return Painter()

    @cached_property
    def judges(self) -> dict[str, Judge]:
        return {"a": load_judge("a"), "b": load_judge("b")}

    @cached_property
    def partners(self) -> list[list[int]]:
        """Of every user those whose histories mismatch."""
        return [partners_of(self.people, user) for user in range(len(self.people))]

    def errors(self) -> dict[str, float]:
        """The reporting judge's own errors."""
        name = f"errors_{self.reporting}"
        return self.store.json(name, lambda: readings.judge_errors(self.judges[self.reporting], readings.RENDERS))

    def row(self, name: str, row: Row, bar: tqdm) -> list[list[dict]]:
        """Readings of a row's pictures, one list for every training seed, or partner and seed."""
        versions = []
        for folder in self.arms[row.arm] if row.arm else [None]:
            for partner in range(row.partners):
                file = self.file_name(name, row, folder, partner)
                versions.append(self.store.json(file, lambda f=folder, p=partner, n=file: self._painted(row, f, p, n)))
                bar.update(len(self.requests))
        return versions

    def file_name(self, name: str, row: Row, folder: Path | None, partner: int) -> str:
        """What a version is stored as: other weights and another way of painting are another name."""
        key = json.dumps([asdict(row), partner, None if folder is None else checksums(folder)])
        return f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def _painted(self, row: Row, folder: Path | None, partner: int, file: str) -> list[dict]:
        models = None if folder is None else ArmModels(folder, self.painter.clip)
        owners = [self.partners[user][partner] if row.of_others else user for user in range(len(self.people))]
        seen = []
        shown = []
        for pictures in self._batches(row, models, folder, owners):
            # Read as they are saved, in steps of 1/255.
            steps = ((pictures * 0.5 + 0.5) * 255).round()
            seen += readings.read(self.judges, self.painter.clip, steps / 127.5 - 1, self.reporting)
            shown.append(steps.byte())
        self._save(torch.cat(shown), file)
        return seen

    def _batches(
        self, row: Row, models: ArmModels | None, folder: Path | None, owners: list[int]
    ) -> Iterator[torch.Tensor]:
        # The references of a call are one user's.
        for _, group in groupby(self.requests, lambda r: r.user if row.reference else r.number // BATCH):
            some = list(group)
            if row.drawn:
                yield self._drawn(row, some)
            elif row.traits:
                yield self._by_traits(some)
            else:
                yield self._by_branch(row, models, folder, owners, some)

    def _drawn(self, row: Row, some: list[Request]) -> torch.Tensor:
        pictures = []
        for request in some:
            rng = np.random.default_rng([DRAWN_SEED, request.number])
            prompt = self.prompts[request.prompt]
            if row.drawn == "cloner":
                scene = cloner(self.histories[request.user], prompt, rng)
            else:
                scene = render_oracle(self.people[request.user], prompt, rng)
            pictures.append(torch.from_numpy(render(scene)))
        return torch.stack(pictures).movedim(-1, 1).float() / 127.5 - 1

    def _by_traits(self, some: list[Request]) -> torch.Tensor:
        pairs = [(self.people[request.user], self.prompts[request.prompt]) for request in some]
        liked = [
            labels_of(liked_of(person, self._taste(person, r), p)) for (person, p), r in zip(pairs, some, strict=True)
        ]
        disliked = [labels_of(disliked_of(person, prompt)) for person, prompt in pairs]
        texts = [prompt.text for _, prompt in pairs]
        numbers = [request.number for request in some]
        return self.painter.paint_traits(texts, TraitLabels.stacked(liked), TraitLabels.stacked(disliked), numbers)

    def _by_branch(
        self, row: Row, models: ArmModels | None, folder: Path | None, owners: list[int], some: list[Request]
    ) -> torch.Tensor:
        texts = [self._text(row, models, folder, request) for request in some]
        states = torch.cat([self.painter.emphasised(text, look, row.emphasis) for text, look, _ in texts])
        negative = self.painter.states([avoided for *_, avoided in texts]) if row.negative else None
        keys_values = None
        if row.user:
            assert models is not None
            vectors = [self._vector(models, folder, owners[request.user]) for request in some]
            with torch.inference_mode():
                keys_values = models.adapter.keys_values(torch.stack(vectors))
        references = (self.histories[some[0].user], row.reference) if row.reference else None
        return self.painter.paint(states, [request.number for request in some], negative, keys_values, references)

    def _text(
        self, row: Row, models: ArmModels | None, folder: Path | None, request: Request
    ) -> tuple[str, list[str], str]:
        """(prompt, phrases behind it, negative prompt) of a picture."""
        prompt = self.prompts[request.prompt]
        person = self.people[request.user]
        if row.words == "true":
            text = enriched_text(person, self._taste(person, request), prompt)
            return text, [], avoided_text(person, prompt)
        if row.words == "mllm":
            assert models is not None and folder is not None
            key = (folder, request.user)
            if key not in self.traits:
                self.traits[key] = models.traits(self.histories[request.user])
            text, look = with_words(prompt, self.traits[key].liked)
            return text, look, negative_words(prompt, self.traits[key].disliked)
        return prompt.text, [], ""

    def _taste(self, person: User, request: Request):
        """The taste that an oracle paints: of two by turns."""
        return person.tastes[request.number % len(person.tastes)]

    def _vector(self, models: ArmModels, folder: Path | None, user: int) -> torch.Tensor:
        assert folder is not None
        if (folder, user) not in self.vectors:
            self.vectors[folder, user] = models.user_vector(self.histories[user])
        return self.vectors[folder, user]

    def _save(self, pictures: torch.Tensor, file: str) -> None:
        """All pictures of a version on one sheet, uint8 [n, 3, H, W]."""
        sheet = make_grid(pictures, nrow=SHEET_COLUMNS, padding=0)
        save_image(Image.fromarray(sheet.movedim(0, -1).numpy()), self.store.folder / f"{file}.png")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file, by its name in the folder."""
    return {str(f.relative_to(folder)): file_sha256(f) for f in visible_files(folder, "**/*.safetensors")}
