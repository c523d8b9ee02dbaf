"""The rows, painted once and measured: every figure of methods.json."""

from __future__ import annotations

import hashlib
import json
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prefgen.atelier import users
from prefgen.atelier.attributes import FAMILIES
from prefgen.files import file_sha256, visible_files

from .. import metrics
from ..rows import METHODS, ROWS
from ..store import Store
from . import page, readings
from .painter import Painter, Request, paint_row

SEED_USERS = 12  # for the diversity across seeds
SEEDS = 6  # pictures of one prompt for each of them


class PaintedRows:
    """The rows of one setting, each painted and read once.

    ablations: {row: weights folder} of the rows that have weights of their own.
    """

    def __init__(self, store: Store, people: list[users.User], ablations: dict[str, Path]):
        self.store = store
        self.people = people
        self.ablations = ablations

    @cached_property
    def painter(self) -> Painter:
        return Painter()

    def row(self, name: str, requests: list[Request], bar: tqdm, tag: str = "") -> dict:
        """{"readings", "cpu_seconds"} of a row; its pictures are saved beside it."""
        bar.set_postfix_str(name, refresh=False)
        before = bar.n

        def paint() -> dict:
            painter = self.painter.of(self.ablations[name]) if name in self.ablations else self.painter
            start = time.process_time()
            pictures = []
            for batch in paint_row(painter, ROWS[name], self.people, requests):
                pictures.append(((batch * 0.5 + 0.5) * 255).round().byte())
                bar.update(len(batch))
            spent = time.process_time() - start
            page.save_pictures(torch.cat(pictures), self.store.folder / f"{self.file_name(name)}{tag}.png")
            # Read as they are saved, in steps of 1/255, and a batch at a time.
            seen = [reading for batch in pictures for reading in readings.read(painter, batch.float() / 127.5 - 1)]
            return {"readings": seen, "cpu_seconds": round(spent, 2)}

        row = self.store.json(f"{self.file_name(name)}{tag}", paint)
        bar.update(before + len(requests) - bar.n)
        return row

    def picture_file(self, name: str) -> Path:
        return self.store.folder / f"{self.file_name(name)}.png"

    def file_name(self, name: str) -> str:
        """What a row is stored as: other weights are another name."""
        if name not in self.ablations:
            return name
        return f"{name}-{hashlib.sha256(json.dumps(checksums(self.ablations[name])).encode()).hexdigest()[:12]}"

    def liked(self, requests: list[Request]) -> list[list[dict]]:
        """Readings of renders that each user would like, on the prompts that were asked for them."""

        def read() -> list[list[dict]]:
            prompts = [[each[1:] for each in requests if each.user == user] for user in range(len(self.people))]
            pairs = zip(self.people, prompts, strict=True)
            return [readings.liked_pictures(self.painter, person, asked) for person, asked in pairs]

        return self.store.json("liked", read)

    def prompt_embeds(self, requests: list[Request]) -> np.ndarray:
        """Unit CLIP embeddings [n, 128] of the prompts without taste."""
        return np.array(self.store.json("prompts", lambda: readings.prompt_embeds(self.painter, requests).tolist()))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file, by its name in the folder."""
    files = visible_files(folder, "**/*.safetensors")
    return {str(f.relative_to(folder)): file_sha256(f) for f in files}


def measure(painted: PaintedRows, names: list[str], requests: list[Request]) -> dict:
    """Everything the page says: {"rows": {name: figures}, "groups": {users or families: {method: alignment}}}."""
    compared = [name for name in METHODS if name in names]
    each = len(requests) // len(painted.people)
    of_seeds = [request for request in requests[::each][:SEED_USERS] for _ in range(SEEDS)]
    with tqdm(total=len(names) * len(requests) + len(compared) * len(of_seeds), unit="picture") as bar:
        rows = {name: painted.row(name, requests, bar) for name in names}
        seeds = {name: painted.row(name, of_seeds, bar, "+seeds") for name in compared}
    seen = {name: row["readings"] for name, row in rows.items()}
    aligned = {name: readings.alignment(row, painted.people, requests) for name, row in seen.items()}
    liked = painted.liked(requests)
    prompts = painted.prompt_embeds(requests)
    figures = {}
    for name in names:
        figures[name] = {
            "label": ROWS[name].label,
            **alignment_figures(aligned[name], aligned),
            **picture_figures(seen[name], requests, liked, prompts),
            "cpu_seconds_a_picture": round(rows[name]["cpu_seconds"] / len(requests), 3),
        }
        if f"{name}_other" in aligned:
            figures[name]["minus_other"] = metrics.interval(aligned[name] - aligned[f"{name}_other"])
        if "described_both" in aligned:
            figures[name]["minus_words"] = metrics.interval(aligned[name] - aligned["described_both"])
        if name in seeds:
            figures[name]["fid"] = {"mean": round(distance_to_all(seen[name], liked), 4), "ci95": None}
            embeds = np.array([reading["clip"] for reading in seeds[name]["readings"]])
            figures[name]["diversity"] = metrics.interval(metrics.diversity(embeds.reshape(-1, SEEDS, embeds.shape[1])))
    return {"rows": figures, "groups": groups(seen, aligned, painted.people, requests)}


def alignment_figures(own: np.ndarray, aligned: dict[str, np.ndarray]) -> dict:
    """A row's alignment [users], by itself and beside PrefGen and the ends of the scale."""
    return {
        "alignment": metrics.interval(own),
        "minus_prefgen": metrics.interval(own - aligned["prefgen"]),
        "gain_share": metrics.gain_share(own, aligned["none"], aligned["oracle"]),
    }


def picture_figures(row: list[dict], requests: list[Request], liked: list[list[dict]], prompts: np.ndarray) -> dict:
    """Subject, distances to what the users like, and CLIP's cosines of a row's readings."""
    owners = [request.user for request in requests]
    right = [reading["subject"] == request.subject for reading, request in zip(row, requests, strict=True)]
    clip = np.array([reading["clip"] for reading in row])
    tastes = np.array([np.mean([reading["clip"] for reading in of_user], 0) for of_user in liked])
    tastes /= np.linalg.norm(tastes, axis=1, keepdims=True)
    return {
        "subject": metrics.interval(metrics.by_user(np.array(right, float), owners)),
        "cmmd": metrics.interval(metrics.to_liked(metrics.cmmd, "clip", row, liked, owners)),
        "kid": metrics.interval(metrics.to_liked(metrics.kid, "judge", row, liked, owners)),
        "clip_t": metrics.interval(metrics.by_user(100 * (clip * prompts).sum(1), owners)),
        "clip_i": metrics.interval(metrics.by_user(100 * (clip * tastes[owners]).sum(1), owners)),
    }


def distance_to_all(row: list[dict], liked: list[list[dict]]) -> float:
    """Frechet distance from a row's pictures to what all users like together, in the judge's features."""
    pictures = np.array([reading["judge"] for reading in row])
    return metrics.frechet(pictures, np.array([reading["judge"] for of_user in liked for reading in of_user]))


def groups(
    seen: dict[str, list[dict]], aligned: dict[str, np.ndarray], people: list[users.User], requests: list[Request]
) -> dict:
    """Alignment of the methods over some of the users, and over some of the families."""
    methods = [name for name in METHODS if name in seen]
    several = np.array([len(person.tastes) > 1 for person in people])
    split = {
        label: {name: metrics.interval(aligned[name][mask]) for name in methods}
        for label, mask in {"users with one taste": ~several, "users with two tastes": several}.items()
        if mask.any()
    }
    for label, chosen in {
        "palette alone": {"palette"},
        "all families but the palette": FAMILIES.keys() - {"palette"},
    }.items():
        narrowed = [readings.only(person, chosen) for person in people]
        if any(narrowed):
            split[label] = {
                name: metrics.interval(readings.alignment(seen[name], narrowed, requests)) for name in methods
            }
    return split
