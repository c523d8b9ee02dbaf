"""What a measuring command has finished, in a folder that belongs to one setting: computed once, then read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from prefgen.files import read_text, write_atomic


class Store:
    """Results by name. Each is written whole as soon as it is computed, so that a stopped command goes on from there;
    what they depend on must be in the folder's name or in theirs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def json(self, name: str, compute: Callable[[], dict | list]) -> dict | list:
        """`name`.json, from `compute()` if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_atomic(path, json.dumps(compute()).encode())
        return json.loads(read_text(path))

    def tensors(
        self, name: str, compute: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """(tensors, metadata) of `name`.safetensors, from `compute()` if it is not there."""
        # Their encoders, as JSON, are in the metadata: a tensor by itself doesn't say what it was read with.
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            write_atomic(path, save(*compute()))
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        return load_file(path), metadata
