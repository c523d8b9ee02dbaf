"""What a frozen encoder says of every picture or prompt, computed once: memory-mapped arrays, written in pieces.

A finished piece is noted, so a killed run goes on after it. The arrays belong to the base and the data they were made
from; others are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prefgen.files import write_atomic

PIECE = 64


class Cache:
    """Arrays of one row a key, in a folder. of: what the rows depend on; piece: how many rows are made at once."""

    def __init__(self, folder: Path, of: dict, keys: Sequence, piece: int = PIECE):
        self.folder, self.keys, self.piece = folder, list(keys), piece
        digest = hashlib.sha256(json.dumps([of, self.keys]).encode()).hexdigest()
        self.index = folder / "index.json"
        folder.mkdir(parents=True, exist_ok=True)
        if self.index.exists() and json.loads(self.index.read_text())["of"] != digest:
            raise SystemExit(f"{folder} was made from another base or other data: delete it, or use another --runs.")
        self.of = digest
        self.row = {key: i for i, key in enumerate(self.keys)}

    @property
    def done(self) -> int:
        """Rows that are finished."""
        return json.loads(self.index.read_text())["done"] if self.index.exists() else 0

    def fill(self, make: Callable[[list], dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
        """Complete the arrays: make(keys) gives each array's rows. Returns {name: array, memory-mapped}."""
        arrays: dict[str, np.ndarray] = {}
        done = self.done
        with tqdm(total=len(self.keys), initial=done, desc=self.folder.name, mininterval=2) as bar:
            for start in range(done, len(self.keys), self.piece):
                rows = make(self.keys[start : start + self.piece])
                for name, values in rows.items():
                    values = values.cpu().numpy()
                    if name not in arrays:
                        arrays[name] = self._open(name, values)
                    arrays[name][start : start + len(values)] = values
                    arrays[name].flush()
                done = min(start + self.piece, len(self.keys))
                note = {"of": self.of, "done": done, "arrays": sorted(rows)}
                write_atomic(self.index, json.dumps(note).encode())
                bar.update(done - start)
        names = json.loads(self.index.read_text())["arrays"]
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names}

    def _open(self, name: str, like: np.ndarray) -> np.ndarray:
        path, shape = self.folder / f"{name}.npy", (len(self.keys), *like.shape[1:])
        if self.done:
            return np.lib.format.open_memmap(path, "r+")
        return np.lib.format.open_memmap(path, "w+", like.dtype, shape)


def latents_of(encoder, world, numbers: Sequence[int], runs: Path) -> tuple[Cache, dict[str, np.ndarray]]:
    """Latents float16 [n, c, h, w] and geometry int64 [n, 4] of these pictures of a world, each once. encoder: a Base,
    or what has its `latents`."""
    of = {"world": world.name, "base": encoder.identity, "pixels": encoder.pixels}
    cache = Cache(runs / "latents", of, numbers)

    def make(keys: list[int]) -> dict[str, torch.Tensor]:
        latents, geometry = encoder.latents(world.pictures(keys))
        return {"latents": latents.half(), "geometry": geometry}

    return cache, cache.fill(make)


def texts_of(base, texts: Sequence[str], runs: Path) -> tuple[Cache, dict[str, np.ndarray]]:
    """Text states float16 [n, T, X] (and pooled [n, P]) of prompts, each once."""
    cache = Cache(runs / "texts", {"base": base.identity}, texts)

    def make(keys: list[str]) -> dict[str, torch.Tensor]:
        text = base.text(keys)
        return {"states": text.states.half()} | ({} if text.pooled is None else {"pooled": text.pooled.half()})

    return cache, cache.fill(make)
