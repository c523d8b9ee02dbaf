"""What one stage leaves in the runs folder and others read: the extracted users and the chosen layers.

So no stage has to import another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prefgen.files import read_text


class ExtractedUsers:
    """What `extract` wrote, memory-mapped, one row a history.

    hidden: H, float16 [n, layers, D], None where no MLLM read them. images: e_img, float16 [n, I], None without an
    image encoder. owners: user ids [n], ascending. index: the world that the users live in, and which MLLM and image
    encoder read them. SystemExit where the stage hasn't finished.
    """

    def __init__(self, runs: Path):
        folder = runs / "extract"
        if not (folder / "done").exists():
            raise SystemExit("No extracted users yet: run `python -m training.extract` first.")
        self.hidden: Any = _mapped(folder / "hidden.npy")
        self.images: Any = _mapped(folder / "images.npy")
        self.owners = np.load(folder / "owners.npy")
        self.index = json.loads(read_text(folder / "index.json"))

    def check_world(self, name: str) -> None:
        """SystemExit if the users live in another world than the one of this name."""
        if self.index["world"] != name:
            raise SystemExit(
                f"The extracted users are those of {self.index['world']}, data.path says {name}: use another --runs "
                "folder, or run `python -m training.extract` again."
            )


def _mapped(path: Path) -> np.ndarray | None:
    return np.load(path, mmap_mode="r") if path.exists() else None


def first_heldout(users: int) -> int:
    """Of the extracted users in order, the number of the first that only measures: the last twentieth, two at least;
    of fewer than four nobody, who are all needed to learn from."""
    return users if users < 4 else min(users * 95 // 100, users - 2)


def chosen_layers(runs: Path, count: int | None = None) -> dict:
    """{"sem_layers": [...], "core_layer": n} as `probe_layers` wrote them. count: layers of the MLLM, where known.

    SystemExit without them, and for layers that such an MLLM hasn't.
    """
    path = runs / "probe_layers" / "layers.json"
    if not path.exists():
        raise SystemExit(f"There is no {path}: run `python -m training.probe_layers` first.")
    layers = json.loads(read_text(path))
    if count is not None and not all(layer in range(count) for layer in (*layers["sem_layers"], layers["core_layer"])):
        raise SystemExit(
            f"{path} names layers that an MLLM of {count} layers doesn't have: run `training.probe_layers` again."
        )
    return {key: layers[key] for key in ("sem_layers", "core_layer")}
