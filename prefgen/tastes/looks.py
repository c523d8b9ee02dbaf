"""How alike pictures look, by CLIP embeddings (arXiv 2103.00020): where a taste is least sure, and how settled it is.

No model runs here. The node Look at Pictures writes the embeddings, one file of safetensors an encoder, keyed by the
SHA-256 of a picture's file; without any, callers go by time and count.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..files import write_atomic

FOLDER = ".looks"
MOST = 10_000  # embeddings in a file: 20 MB at the width of CLIP ViT-H
# Fewer of a side leave nothing to compare with when one of them is left out.
LEAST = 2


def load(folder: Path) -> Mapping[str, np.ndarray]:
    """{sha256: embedding [I], of length 1} of a taste's folder, by the encoder that looked last; {} for none."""
    try:
        with os.scandir(folder / FOLDER) as entries:
            files = [(entry.stat().st_mtime_ns, entry.path) for entry in entries if entry.name.endswith(".safetensors")]
        return _loaded(*max(files)) if files else {}
    except OSError:
        return {}


@lru_cache(maxsize=4)
def _loaded(_changed: int, path: str) -> Mapping[str, np.ndarray]:
    """The same of one file, read again when it has changed: a panel asks after every verdict."""
    loaded = _embeddings(Path(path))
    return dict(zip(loaded, rows(np.array([*loaded.values()])), strict=True)) if loaded else {}


def _embeddings(path: Path) -> dict[str, np.ndarray]:
    """{sha256: embedding [I] in float32} of a file, as many of one width as there are; {} for one that can't be read:
    what is in it can be made again."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError):  # the last three: numpy has no such numbers
        return {}
    vectors = {name: tensor.astype(np.float32) for name, tensor in tensors.items() if tensor.ndim == 1 and tensor.size}
    vectors = {name: vector for name, vector in vectors.items() if np.isfinite(vector).all()}
    widths = Counter(len(vector) for vector in vectors.values())
    usual = widths.most_common(1)[0][0] if widths else 0
    return {name: vector for name, vector in vectors.items() if len(vector) == usual}


def keep(folder: Path, encoder: str, embeddings: Mapping[str, np.ndarray], needed: Iterable[str] = ()) -> None:
    """Write embeddings by an encoder beside those that are there. needed: checksums that stay where there are more than
    MOST. encoder: its digest, which names the file. OSError where there is no room; the old file then stays."""
    path = folder / FOLDER / f"{encoder}.safetensors"
    there = _embeddings(path) | dict(embeddings)
    if len(there) > MOST:
        staying = {*needed, *embeddings}
        there = {name: vector for name, vector in there.items() if name in staying}
    write_atomic(path, save({name: np.asarray(vector, np.float16) for name, vector in there.items()}))


def known_to(folder: Path, encoder: str) -> set[str]:
    """Checksums that an encoder has looked at."""
    return set(_embeddings(folder / FOLDER / f"{encoder}.safetensors"))


def differences(
    looks: Mapping[str, np.ndarray], verdicts: Mapping[str, str], candidates: Iterable[str]
) -> dict[str, float]:
    """{sha256: how much nearer a candidate is to what is liked than to what is disliked}: the difference of its cosines
    to both means, in -2..2. Near 0 the taste is least sure of it. {} where a side has no embedding.

    verdicts: {sha256: "liked" or "disliked"} of the taste.
    """
    liked, disliked = (_side(looks, verdicts, side) for side in ("liked", "disliked"))
    if not len(liked) or not len(disliked):
        return {}
    direction = unit(liked.mean(0)) - unit(disliked.mean(0))
    return {name: float(looks[name] @ direction) for name in candidates if name in looks}


def agreement(looks: Mapping[str, np.ndarray], verdicts: Mapping[str, str]) -> float | None:
    """How settled a taste is: the share of its pictures whose verdict comes out right when each is left out and judged
    by all others (leave-one-out), the two sides counting alike. None for fewer than LEAST pictures of a side."""
    liked, disliked = (_side(looks, verdicts, side) for side in ("liked", "disliked"))
    if min(len(liked), len(disliked)) < LEAST:
        return None
    # Judged by the others' mean: the sum without a picture points where their mean does.
    right = [
        _nearer(own, rows(own.sum(0) - own), np.broadcast_to(unit(other.mean(0)), own.shape)).mean()
        for own, other in ((liked, disliked), (disliked, liked))
    ]
    return float(np.mean(right))


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector [I] of length 1 in float32; zeros stay zeros."""
    return rows(np.asarray(vector, np.float32)[None])[0]


def rows(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, I], each of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _side(looks: Mapping[str, np.ndarray], verdicts: Mapping[str, str], side: str) -> np.ndarray:
    """Embeddings [n, I] of the pictures of a verdict that were looked at."""
    return np.array([looks[name] for name, verdict in verdicts.items() if verdict == side and name in looks])


def _nearer(vectors: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether each vector is nearer to its own mean than to the other: 1, 0, or ½ for a tie."""
    return (np.sign(((own - other) * vectors).sum(1)) + 1) / 2
