"""A scene as numbers: what judges and encoders learn to read off a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .scenes import Scene
from .subjects import COMPANIONS, NUMBERS, SETTINGS, SUBJECTS
from .traits import CONTINUOUS, NAMED, visible

# What is one of several kinds: {name: the kinds}.
CLASSES: dict[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "number": NUMBERS,
    "setting": tuple(SETTINGS),
    "companion": tuple(COMPANIONS),
    **{trait: tuple(kinds) for trait, kinds in NAMED.items()},
}


def class_labels(scene: Scene) -> list[int]:
    """[12] number of the kind in each of CLASSES."""
    shown = {
        "subject": scene.subject,
        "number": scene.number,
        "setting": scene.setting,
        "companion": scene.companion,
        **scene.kinds,
    }
    return [kinds.index(shown[name]) for name, kinds in CLASSES.items()]


def value_labels(scene: Scene) -> list[float]:
    """[13] where each continuous trait lies in its range, 0..1, whether it can be seen or not."""
    return [CONTINUOUS[name].share(value) for name, value in scene.numbers.items()]


def visible_traits(scene: Scene) -> list[bool]:
    """[13] whether the picture shows each continuous trait."""
    kinds = scene.kinds
    numbers = scene.numbers
    return [visible(name, kinds, numbers) for name in CONTINUOUS]


def scene_of(classes: Sequence[int], shares: Sequence[float]) -> Scene:
    """The scene of labels [12] and shares [13], with seed 0: the reverse of the functions above."""
    names = {name: kinds[int(i)] for (name, kinds), i in zip(CLASSES.items(), classes, strict=True)}
    values = [
        trait.low + float(np.clip(share, 0, 1)) * (trait.high - trait.low)
        for trait, share in zip(CONTINUOUS.values(), shares, strict=True)
    ]
    return Scene(
        subject=names["subject"],
        number=names["number"],
        setting=names["setting"],
        companion=names["companion"],
        named=tuple(names[trait] for trait in NAMED),
        values=tuple(values),
    )
