"""Painting by stock diffusers: the exported adapter goes in as an IP-Adapter, nothing of ours is on the UNet."""

from __future__ import annotations

import io
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
from prefgen.files import write_atomic

from ...data.errors import DataError
from .people import Person, Read


@dataclass(frozen=True)
class Row:
    """One way of painting. adapter: "main" or "image_only", "" for the plain base; of_other: the next user's
    preference; words: "mllm" or "taste" in the prompt; negative: what is avoided as the negative prompt."""

    label: str
    adapter: str = ""
    of_other: bool = False
    words: str = ""
    negative: bool = False


ROWS = {
    "none": Row("no preference"),
    "described": Row("taste in the MLLM's words, in the prompt", words="mllm"),
    "described_both": Row("the same, what is avoided as negative prompt", words="mllm", negative=True),
    "oracle": Row("true taste in the prompt", words="taste"),
    "mismatched": Row("another user's preference", "main", of_other=True),
    "prefgen": Row("PrefGen", "main"),
    "image_only": Row("image-only adapter, trained as long", "image_only"),
}


@dataclass(frozen=True)
class Job:
    """One picture: whose, of which prompt, with which noise."""

    person: int
    prompt: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.person:04d}-{self.prompt:02d}-{self.seed}.png"


def jobs(people: list[Person], seeds: int) -> list[Job]:
    return [Job(i, p, s) for i, person in enumerate(people) for p in range(len(person.prompts)) for s in range(seeds)]


class Painter:
    """A base's pipeline on a device; `batch` pictures at once."""

    def __init__(self, config, device: str, guidance: float, steps: int, batch: int):
        import diffusers

        kind = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.base.precision]
        options = {} if config.base.family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
        try:
            self.pipeline = kind[config.base.family].from_pretrained(
                str(config.base.path), torch_dtype=dtype, local_files_only=True, use_safetensors=True, **options
            )
        except Exception as error:  # diffusers raises many kinds for a folder that isn't one
            raise DataError(
                f"{config.base.path} is no diffusers folder of {config.base.family} with safetensors weights "
                f"({str(error).splitlines()[0][:120]})."
            ) from error
        self.pipeline.to(device).set_progress_bar_config(disable=True)
        self.guidance, self.steps, self.pixels, self.batch = guidance, steps, config.base.pixels, batch

    def paint(
        self, prompts: list[str], negatives: list[str], seeds: list[tuple[int, ...]], vectors: torch.Tensor | None
    ) -> list[Image.Image]:
        """vectors [B, C + D + I] for the adapter that is on, None when none is. The noise is the seeds' alone."""
        noise = [torch.Generator().manual_seed(mixed(seed)) for seed in seeds]
        options = {}
        if vectors is not None:
            both = torch.stack([torch.zeros_like(vectors), vectors]).flatten(0, 1)[:, None]  # unconditional half first
            options["ip_adapter_image_embeds"] = [both.to(self.pipeline.device, self.pipeline.dtype)]
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

    def put_on(self, adapter: Path | None) -> None:
        """This adapter file on the UNet, or none."""
        if getattr(self.pipeline.unet, "encoder_hid_proj", None) is not None:
            self.pipeline.unload_ip_adapter()
        if adapter is not None:
            self.pipeline.load_ip_adapter(
                str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
            )


def mixed(seed: tuple[int, ...]) -> int:
    """One generator seed from several numbers."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


def paint_rows(
    painter: Painter, read: Read, people: list[Person], wanted: list[Job], names: list[str], adapters: dict, out: Path
) -> None:
    """Paint what isn't there yet of every row into `out`/ROW; `time.jsonl` there says how long each batch took."""
    left = {name: [job for job in wanted if not (out / name / job.name).exists()] for name in names}
    with tqdm(total=len(names) * len(wanted), unit="picture") as bar:
        bar.update(bar.total - sum(map(len, left.values())))
        for name in sorted(names, key=lambda name: ROWS[name].adapter):
            row, folder = ROWS[name], out / name
            if not left[name]:
                continue
            bar.set_postfix_str(name, refresh=False)
            folder.mkdir(parents=True, exist_ok=True)
            painter.put_on(adapters[row.adapter] if row.adapter else None)
            adapter = load_adapter(adapters[row.adapter]) if row.adapter else None
            for batch in batches(left[name], painter.batch):
                start = time.monotonic()
                vectors = vectors_of(row, adapter, batch, people, read)
                pictures = painter.paint(*asked(row, batch, people, read), vectors)
                spent = time.monotonic() - start
                for job, picture in zip(batch, pictures, strict=True):
                    save(picture, folder / job.name)
                with open(folder / "time.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"pictures": len(batch), "seconds": round(spent, 3)}) + "\n")
                bar.update(len(batch))
    painter.put_on(None)


def asked(row: Row, batch: list[Job], people: list[Person], read: Read) -> tuple[list[str], list[str], list[tuple]]:
    """(prompts, negative prompts, seeds) of a batch."""
    prompts, negatives = [], []
    for job in batch:
        person = people[job.person]
        traits = read.traits(person) if row.words == "mllm" else None
        words = traits.positive if traits else person.taste if row.words == "taste" else ""
        prompts.append(", ".join(filter(None, (person.prompts[job.prompt], words))))
        negatives.append(traits.negative if traits and row.negative else "")
    return prompts, negatives, [(people[job.person].user, job.prompt, job.seed) for job in batch]


def vectors_of(row: Row, adapter, batch: list[Job], people: list[Person], read: Read) -> torch.Tensor | None:
    if adapter is None:
        return None
    shift = int(row.of_other)
    return torch.stack([read.vector(adapter, people[(job.person + shift) % len(people)]) for job in batch])


def batches(items: list[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def save(picture: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_atomic(path, data.getvalue())
