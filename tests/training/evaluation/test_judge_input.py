"""Evaluation shows the judge pictures as it was trained on them: what it reads off known pictures is right."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefgen.atelier import models, users
from prefgen.atelier.judge import load_judge
from prefgen.atelier.renderer import random_scene, render
from training.common.atelier_clip import image_features
from training.data.atelier_users import users_of
from training.evaluation.evaluate.painter import Painter, stacked
from training.evaluation.evaluate.readings import LIKED_DRAWN, liked_pictures, read


@pytest.fixture(scope="module")
def painter():
    """What `read` asks of a painter: the shipped judge and CLIP."""
    reader = SimpleNamespace(judge=load_judge(), clip=models.load_clip())
    reader.embeds = lambda pictures: Painter.embeds(reader, pictures)
    return reader


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(8)
    return [random_scene(rng) for _ in range(40)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return stacked([torch.from_numpy(render(scene)).float() / 255 for scene in scenes])


def share_right(readings, scenes):
    """Share of all attributes and subjects that are read right."""
    right = [
        reading["subject"] == scene.subject
        and np.mean([reading["attributes"][family] == name for family, name in scene.attributes])
        for reading, scene in zip(readings, scenes, strict=True)
    ]
    return float(np.mean(right))


def test_known_pictures_are_read_right(painter, pictures, scenes):
    assert pictures.min() < -0.9 and pictures.max() > 0.9
    assert share_right(read(painter, pictures), scenes) > 0.9


def test_pictures_in_another_range_would_be_noticed(painter, pictures, scenes):
    for wrong in (pictures * 0.5 + 0.5, pictures - 1, pictures * 0.5 - 0.5, pictures * 2):
        assert share_right(read(painter, wrong), scenes) < 0.75


def test_the_embeddings_are_the_judges_and_clips_own(painter, pictures):
    rows = read(painter, pictures[:3])
    with torch.inference_mode():
        judged = painter.judge.features(pictures[:3] / 2 + 0.5)
        seen = torch.nn.functional.normalize(image_features(painter.clip, pictures[:3]), dim=1)
    np.testing.assert_allclose([r["judge"] for r in rows], judged.numpy(), atol=1e-4)
    np.testing.assert_allclose([r["clip"] for r in rows], seen.numpy(), atol=1e-5)
    assert [len(row) for reading in rows for row in (reading["clip"], reading["judge"])] == [128, 256] * 3


def test_pictures_that_a_user_would_like_align_with_that_user_and_not_with_the_next(painter):
    people = users_of("test", 4)
    own, other = [], []
    for person, neighbour in zip(people, people[1:] + people[:1], strict=True):
        readings = liked_pictures(painter, person, [("owl", "moon"), ("cat", "heart")])
        assert len(readings) == LIKED_DRAWN
        own.append(np.mean([users.alignment(r["attributes"], person) for r in readings]))
        other.append(np.mean([users.alignment(r["attributes"], neighbour) for r in readings]))
    assert min(own) > 0.55 and max(other) < 0.55 and np.mean(own) > np.mean(other) + 0.5
