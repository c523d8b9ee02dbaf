"""What judges and encoders see on a row's pictures, as JSON values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefgen.atelier.world.judge import Judge, Reading
from prefgen.atelier.world.labels import class_labels, scene_of, value_labels, visible_traits
from prefgen.atelier.world.models import as_read
from prefgen.atelier.world.render import render
from prefgen.atelier.world.scenes import Scene, random_scene
from prefgen.atelier.world.traits import CONTINUOUS

from ...common.sharpness import laplacian
from ...data.image_encoders import embedded_embeds

# Fresh renders that a judge's own errors are measured on; no stage and no other measure draws them.
RENDERS = 512
RENDERS_SEED = 900_005


@torch.inference_mode()
def read(judges: dict[str, Judge], clip, pictures: torch.Tensor, reporting: str = "b") -> list[dict]:
    """One dict a picture [B, 3, 256, 256] in -1..1.

    classes, shares: of the scene that the reporting judge sees (see `scene_seen`); subjects: what every judge calls the
    subject; features: of the reporting judge; sharpness: mean absolute Laplacian; render_back: 1 - cosine of CLIP's
    embeddings of the picture and of a render of the scene that was seen. CLIP is no judge.
    """
    seen = {which: judge.read(pictures) for which, judge in judges.items()}
    features = judges[reporting].features(as_read(pictures) * 0.5 + 0.5)
    again = [torch.from_numpy(render(reading.scene)).float() / 255 for reading in seen[reporting]]
    own = embedded_embeds(clip, list((pictures * 0.5 + 0.5).movedim(1, -1)))
    likeness = (own * embedded_embeds(clip, again)).sum(1)
    rows = zip(seen[reporting], features, laplacian(pictures), likeness, strict=True)
    return [
        {
            "classes": class_labels(reading.scene),
            "shares": [round(share, 4) for share in value_labels(reading.scene)],
            "subjects": {which: seen[which][i].scene.subject for which in judges},
            "features": [round(number, 4) for number in feature.tolist()],
            "sharpness": round(float(sharp), 5),
            "render_back": round(1 - float(alike), 5),
        }
        for i, (reading, feature, sharp, alike) in enumerate(rows)
    ]


def scene_seen(reading: dict) -> Scene:
    """The scene of a reading."""
    return scene_of(reading["classes"], reading["shares"])


def judge_errors(judge: Judge, count: int) -> dict[str, float]:
    """{continuous trait: mean distance of what a judge reads off fresh renders from the truth, where it is visible}."""
    distances: dict[str, list[float]] = {name: [] for name in CONTINUOUS}
    for start in range(0, count, 64):
        some = range(start, min(start + 64, count))
        scenes = [random_scene(np.random.default_rng([RENDERS_SEED, i])) for i in some]
        pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes])).movedim(-1, 1).float() / 127.5 - 1
        for scene, reading in zip(scenes, judge.read(pictures), strict=True):
            _add_distances(distances, scene, reading)
    return {name: round(float(np.mean(own)), 5) if own else 0.0 for name, own in distances.items()}


def _add_distances(distances: dict[str, list[float]], scene: Scene, reading: Reading) -> None:
    for (name, trait), visible in zip(CONTINUOUS.items(), visible_traits(scene), strict=True):
        if visible:
            distances[name].append(trait.distance(reading.scene.numbers[name], scene.numbers[name]))


def features_of(readings: Sequence[dict]) -> np.ndarray:
    """The reporting judge's features of a row, [n, d]."""
    return np.array([reading["features"] for reading in readings])
