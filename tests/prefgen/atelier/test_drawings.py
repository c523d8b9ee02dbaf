"""The world's drawings are those that the shipped models have learnt, to the last pixel.

Weights and renderer belong together: a picture that is drawn otherwise is one that the judge, CLIP, the MLLM and the
UNet have never seen. When the weights are trained anew,
`python -m tests.prefgen.atelier.test_drawings` writes drawings.npz and second_drawings.npz, the second world's.
"""

from pathlib import Path

import numpy as np

from prefgen.atelier.attributes import FAMILIES, PROPS, SUBJECTS
from prefgen.atelier.renderer import Scene, render
from prefgen.atelier.world import render as second
from prefgen.atelier.world.labels import CLASSES, scene_of
from prefgen.atelier.world.traits import CONTINUOUS

FILE = Path(__file__).with_name("drawings.npz")
SECOND_FILE = Path(__file__).with_name("second_drawings.npz")
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


def second_scenes():
    """Every kind of everything in a fixed mixture: each subject five times, each other kind at least as often."""
    rng = np.random.default_rng(21)
    count = 5 * len(CLASSES["subject"])
    kinds = np.stack([rng.permutation(np.resize(range(len(names)), count)) for names in CLASSES.values()], 1)
    shares = rng.random((count, len(CONTINUOUS)))
    return [
        scene_of(row, numbers).with_traits(seed=i) for i, (row, numbers) in enumerate(zip(kinds, shares, strict=True))
    ]


def cells(pictures):
    """Sums over cells of every picture, uint16 [n, side / 8, side / 8, 3]."""
    side = pictures.shape[1] // CELL
    return pictures.reshape(len(pictures), side, CELL, side, CELL, 3).sum((2, 4)).astype(np.uint16)


def drawn():
    return cells(np.stack([render(scene) for scene in scenes()]))


def second_drawn():
    return cells(np.stack([second.render(scene, 128) for scene in second_scenes()]))


def test_every_subject_and_attribute_is_drawn_as_the_shipped_models_know_it():
    with np.load(FILE, allow_pickle=False) as file:
        expected = file["cells"]
    changed = drawn() != expected
    which = [f"{s.subject}, {dict(s.attributes)}" for s, here in zip(scenes(), changed, strict=True) if here.any()]
    assert changed.sum() <= OTHERS, f"{len(which)} pictures are drawn otherwise, such as {which[:1]}"


def test_the_second_world_is_drawn_as_its_models_know_it():
    with np.load(SECOND_FILE, allow_pickle=False) as file:
        expected = file["cells"]
    changed = second_drawn() != expected
    which = [str(scene) for scene, here in zip(second_scenes(), changed, strict=True) if here.any()]
    assert changed.sum() <= OTHERS, f"{len(which)} pictures are drawn otherwise, such as {which[:1]}"


if __name__ == "__main__":
    np.savez_compressed(FILE, cells=drawn())
    np.savez_compressed(SECOND_FILE, cells=second_drawn())
