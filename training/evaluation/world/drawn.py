"""Rows that the renderer draws: the true taste, the ceiling of world and judge, and a copy of a liked picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefgen.atelier.world import users
from prefgen.atelier.world.prompts import OPEN, Prompt
from prefgen.atelier.world.scenes import Scene
from prefgen.atelier.world.subjects import CLASS_OF
from prefgen.atelier.world.traits import CONTINUOUS, NAMED
from prefgen.atelier.world.users import Example, User


def render_oracle(person: User, prompt: Prompt, rng: np.random.Generator) -> Scene:
    """The true taste, drawn exactly; nothing that is disliked."""
    scene = users.asked_scene(person, prompt, rng)
    taste = person.tastes[rng.integers(len(person.tastes))]
    return without_dislikes(users.follow(scene, taste, rng, width=0.0), person, rng, band=True)


def without_dislikes(scene: Scene, person: User, rng: np.random.Generator, band: bool) -> Scene:
    """The scene with what is disliked drawn again, and nothing else. band: whether the band is known as well."""
    kinds = {}
    for trait, kind in person.avoided.items():
        if scene.kinds[trait] == kind:
            others = [each for each in NAMED[trait] if each != kind]
            kinds[trait] = others[rng.integers(len(others))]
    name, low, high = person.band
    value = scene.numbers[name]
    while band and low <= value <= high:
        value = float(rng.uniform(CONTINUOUS[name].low, CONTINUOUS[name].high))
    return scene.with_traits(kinds, {name: value})


def cloner(history: Sequence[Example], prompt: Prompt, rng: np.random.Generator) -> Scene:
    """One liked picture's whole look, with the asked subject."""
    liked = [example.scene for example in history if example.liked]
    model = liked[rng.integers(len(liked))]
    asked = users.asked_scene(None, prompt, rng)
    fields = {field: getattr(asked, field) for field in ("subject", "number", "setting", "companion")}
    if prompt.subject == OPEN and CLASS_OF[model.subject] == prompt.kind:
        fields["subject"] = model.subject
    return model.with_traits(**fields)
