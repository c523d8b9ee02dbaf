"""Painting by stock diffusers: the exported adapter goes in as an IP-Adapter, nothing of ours is on the UNet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from prefgen.adapter_file import load_adapter
from prefgen.dtypes import DTYPES
from prefgen.pipeline import put_on, take_off, user_embeds

from ...common.bases import load_pipeline
from ...common.files import save_image
from ..rows import ROWS, Row
from .people import HistoryReadings, Person


@dataclass(frozen=True)
class Job:
    """One picture: whose, of which prompt, with which noise."""

    person: int
    prompt: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.person:04d}-{self.prompt:02d}-{self.seed}.png"


def jobs_of(people: list[Person], seeds: int) -> list[Job]:
    """Every prompt of every person, `seeds` times."""
    return [Job(i, p, s) for i, person in enumerate(people) for p in range(len(person.prompts)) for s in range(seeds)]


class PipelinePainter:
    """A base's pipeline on a device; `batch` pictures at once."""

    def __init__(self, config, device: str, guidance: float, steps: int, batch: int):
        self.guidance = guidance
        self.steps = steps
        self.batch = batch
        self.pixels = config.base.pixels
        self.pipeline = load_pipeline(config, DTYPES[config.base.precision]).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def paint(
        self, prompts: list[str], negatives: list[str], seeds: list[tuple[int, ...]], vectors: torch.Tensor | None
    ) -> list[Image.Image]:
        """vectors [B, C + D + I] for the adapter that is on, None when none is. The noise is the seeds' alone."""
        noise = [torch.Generator().manual_seed(mixed(seed)) for seed in seeds]
        options = {}
        if vectors is not None:
            options["ip_adapter_image_embeds"] = user_embeds(vectors, self.pipeline)
        return self.pipeline(
            prompt=prompts,
            negative_prompt=negatives,
            guidance_scale=self.guidance,
            num_inference_steps=self.steps,
            height=self.pixels,
            width=self.pixels,
            generator=noise,
            **options,
        ).images

    def put_on(self, adapter: Path | None, weight: float = 1.0) -> None:
        """This adapter file on the UNet at a weight, or none."""
        if adapter is None:
            take_off(self.pipeline)
        else:
            put_on(self.pipeline, adapter, weight)


def mixed(seed: tuple[int, ...]) -> int:
    """One generator seed from several numbers."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


def paint_rows(
    painter: PipelinePainter,
    readings: HistoryReadings,
    people: list[Person],
    jobs: list[Job],
    adapters: dict[str, Path | None],
    out: Path,
) -> None:
    """Paint what isn't there yet of every row into `out`/ROW. adapters: {row: its adapter's file, None for the plain
    base}."""
    missing = {name: [job for job in jobs if not (out / name / job.name).exists()] for name in adapters}
    with tqdm(total=len(adapters) * len(jobs), unit="picture") as bar:
        bar.update(bar.total - sum(map(len, missing.values())))
        # Rows of one adapter in a row: putting another one on takes a while.
        for name in sorted(adapters, key=lambda name: ROWS[name].adapter):
            if missing[name]:
                bar.set_postfix_str(name, refresh=False)
                for count in paint_row(
                    painter, readings, people, missing[name], ROWS[name], adapters[name], out / name
                ):
                    bar.update(count)
    painter.put_on(None)


def paint_row(
    painter: PipelinePainter,
    readings: HistoryReadings,
    people: list[Person],
    jobs: list[Job],
    row: Row,
    adapter_file: Path | None,
    folder: Path,
) -> Iterator[int]:
    """Paint into `folder`, yielding how many pictures each batch had; `time.jsonl` says how long each took."""
    folder.mkdir(parents=True, exist_ok=True)
    painter.put_on(adapter_file, row.weight)
    adapter = load_adapter(adapter_file) if adapter_file else None
    for first in range(0, len(jobs), painter.batch):
        batch = jobs[first : first + painter.batch]
        start = time.monotonic()
        vectors = None
        if adapter is not None:
            owners = [people[(job.person + row.of_other) % len(people)] for job in batch]
            vectors = torch.stack([readings.vector(adapter, owner) for owner in owners])
        texts = [texts_of(row, job, people[job.person], readings) for job in batch]
        prompts, negatives = map(list, zip(*texts, strict=True))
        seeds = [(people[job.person].user, job.prompt, job.seed) for job in batch]
        pictures = painter.paint(prompts, negatives, seeds, vectors)
        spent = time.monotonic() - start
        for job, picture in zip(batch, pictures, strict=True):
            save_image(picture, folder / job.name)
        with open(folder / "time.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"pictures": len(batch), "seconds": round(spent, 3)}) + "\n")
        yield len(batch)


def texts_of(row: Row, job: Job, person: Person, readings: HistoryReadings) -> tuple[str, str]:
    """(prompt, negative prompt) of a picture."""
    words = person.taste if row.words == "taste" else ""
    negative = ""
    if row.words == "mllm":
        traits = readings.traits(person)
        words = traits.positive
        negative = traits.negative if row.negative else ""
    return ", ".join(filter(None, (person.prompts[job.prompt], words))), negative
