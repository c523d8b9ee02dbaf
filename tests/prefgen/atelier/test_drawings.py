"""The world's drawings are those that the shipped models have learnt, to the last pixel.

Weights and renderer belong together: a picture that is drawn otherwise is one that the judge, CLIP, the MLLM and the
UNet have never seen. When the weights are trained anew,
`python -m tests.prefgen.atelier.test_drawings` writes drawings.npz.
"""

from pathlib import Path

import numpy as np

from prefgen.atelier.attributes import FAMILIES, PROPS, SUBJECTS
from prefgen.atelier.renderer import Scene, render

FILE = Path(__file__).with_name("drawings.npz")
COUNT, CELL = 128, 8  # pictures; px of a cell's side
# A corner may fall on the other side of a pixel's middle where a CPU rounds otherwise: three channels of one cell.
OTHERS = 3


def scenes():
    """Every subject eight times, every prop and attribute at least as often, in a fixed mixture."""
    rng = np.random.default_rng(20)
    look = {f: rng.permutation(np.resize([a.name for a in values], COUNT)) for f, values in FAMILIES.items()}
    subjects, props = np.resize(list(SUBJECTS), COUNT), rng.permutation(np.resize(list(PROPS), COUNT))
    for i in range(COUNT):
        yield Scene.of(str(subjects[i]), str(props[i]), {family: str(names[i]) for family, names in look.items()}, i)


def drawn():
    """Sums over cells of every picture, uint16 [COUNT, 16, 16, 3]."""
    pictures = np.stack([render(scene) for scene in scenes()])
    side = pictures.shape[1] // CELL
    return pictures.reshape(COUNT, side, CELL, side, CELL, 3).sum((2, 4)).astype(np.uint16)


def test_every_subject_and_attribute_is_drawn_as_the_shipped_models_know_it():
    with np.load(FILE, allow_pickle=False) as file:
        expected = file["cells"]
    changed = drawn() != expected
    which = [f"{s.subject}, {dict(s.attributes)}" for s, here in zip(scenes(), changed, strict=True) if here.any()]
    assert changed.sum() <= OTHERS, f"{len(which)} pictures are drawn otherwise, such as {which[:1]}"


if __name__ == "__main__":
    np.savez_compressed(FILE, cells=drawn())
