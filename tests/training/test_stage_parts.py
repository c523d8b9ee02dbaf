"""Parts of the stages by their definitions: the MLLM's measures and losses, ablations' folders, what is missing."""

import ast
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefgen.atelier import models
from tests.training.commands import ROOT
from training import train_mllm
from training.atelier import mllm_vision
from training.common.files import save_array
from training.common.stage_outputs import ExtractedUsers
from training.data.errors import DataError
from training.data.image_tokens import new_mllm
from training.data.picture_pool import PicturePool
from training.evaluation import ablations

LAYERS, WIDTH, USERS, ATTRIBUTES = 6, 10, 7, 5


class Planted:
    """A world and a reader in one: each history's states are planted. Users like attribute u % 5, and 0 and 1 dislike
    the next one."""

    attributes = [f"family/{n}" for n in range(ATTRIBUTES)]

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.own = torch.randn(USERS, LAYERS, WIDTH, generator=generator)
        self.noise = torch.randn(2, USERS, LAYERS, WIDTH, generator=generator) * 1.5
        self.read, self.mllm = [], SimpleNamespace(device="cpu")

    def users(self, split, count=0):
        assert split == "test"
        if count > USERS:
            raise DataError("fewer")
        return list(range(USERS))

    def history(self, user, rng, liked, disliked):
        assert (liked, disliked) == (4, 4)
        return user

    def tastes(self, user):
        return [[user % ATTRIBUTES], [(user + 2) % ATTRIBUTES]]

    def dislikes(self, user):
        return [(user + 1) % ATTRIBUTES] if user < 2 else []

    def states(self, histories):
        self.read.append(len(histories))
        done = sum(self.read) - len(histories)
        half = done // USERS
        return torch.stack([self.own[user] + self.noise[half, user] for user in histories])


def test_users_are_found_again_by_the_core_layer_of_another_history():
    world = Planted()
    figures = train_mllm.evaluate(world, world, None, SimpleNamespace(batch=3, pictures=4))
    assert world.read == [3, 3, 1] * 2
    layer = LAYERS * 2 // 3
    once, again = ((world.own + world.noise[half])[:, layer].double() for half in (0, 1))

    def standard(row):
        row = row - row.mean()
        return row / row.norm()

    right = 0
    for user in range(USERS):
        likeness = [float(standard(once[user]) @ standard(other)) for other in again]
        right += max(range(USERS), key=likeness.__getitem__) == user
    assert 0 < right < USERS
    assert figures == {"same_user_top1": pytest.approx(right / USERS), "users": USERS}


def test_precision_is_the_share_of_true_attributes_among_as_many_ranked_first():
    world = Planted()
    scores = torch.randn(2 * USERS, 2 * ATTRIBUTES, generator=torch.Generator().manual_seed(3))
    args = SimpleNamespace(batch=4, pictures=4)
    figures = train_mllm.evaluate(world, world, lambda states: scores[: len(states)], args)
    liked, disliked = [], []
    for row, user in enumerate([*range(USERS)] * 2):
        first = scores[row, :ATTRIBUTES].argsort(descending=True)[:2].tolist()
        liked.append(len(set(first) & {a for taste in world.tastes(user) for a in taste}) / 2)
        if world.dislikes(user):
            disliked.append(float(scores[row, ATTRIBUTES:].argmax()) == world.dislikes(user)[0])
    assert figures["liked_precision"] == pytest.approx(np.mean(liked))
    assert figures["disliked_precision"] == pytest.approx(np.mean(disliked))


def test_the_identity_loss_is_symmetric_infonce_by_hand():
    once, again = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).double()

    def standard(row):
        row = row - row.mean()
        return row / row.norm()

    a, b = ([standard(row) for row in rows] for rows in (once, again))
    total = 0.0
    for i in range(4):
        across = torch.stack([a[i] @ b[j] / 0.1 for j in range(4)])
        back = torch.stack([a[j] @ b[i] / 0.1 for j in range(4)])
        total += across.logsumexp(0) - across[i] + back.logsumexp(0) - back[i]
    assert float(train_mllm.identity_loss(once, again)) == pytest.approx(float(total / 8), rel=1e-4)


def test_taste_targets_name_what_any_taste_likes_then_what_is_disliked():
    targets = train_mllm.taste_targets(Planted(), [1, 4])
    expected = torch.zeros(2, 2 * ATTRIBUTES)
    expected[0, [1, 3, ATTRIBUTES + 2]] = 1
    expected[1, [4, 1]] = 1
    assert torch.equal(targets, expected)


def test_taste_heads_read_the_four_top_layers_each_normalised():
    heads = train_mllm.TasteHeads(WIDTH, ATTRIBUTES)
    states = torch.randn(3, LAYERS, WIDTH, generator=torch.Generator().manual_seed(2))
    logits = heads(states)
    assert logits.shape == (3, 2 * ATTRIBUTES)
    below, scaled = states.clone(), states.clone()
    below[:, :2] = 0
    scaled[:, 3] = scaled[:, 3] * 5 + 2
    torch.testing.assert_close(heads(below), logits)
    torch.testing.assert_close(heads(scaled), logits, rtol=1e-3, atol=1e-3)
    scaled[:, 2] = 0
    assert not torch.allclose(heads(scaled), logits, atol=1e-2)


def test_the_mllms_eyes_start_as_the_shipped_clips():
    vision = new_mllm().model.vision_model
    model = models.load_clip()
    clip, before = model.vision_model.state_dict(), vision.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    copied = mllm_vision.start_from_clip(vision, model)
    after = vision.state_dict()
    place = "embeddings.position_embedding.weight"
    same = [key for key in after if key != place and key in clip and clip[key].shape == after[key].shape]
    assert all(torch.equal(after[key], clip[key]) for key in same)
    assert torch.equal(after[place], clip[place][1:]), "all places but the class token's"
    assert copied == len(same) + 1 > 40
    assert any(not torch.equal(before[key], after[key]) for key in same)
    assert all(torch.equal(before[key], after[key]) for key in after if key not in (*same, place))


CACHED = [f"{name}.{suffix}" for name in ablations.CACHES for suffix in ("npy", "json")]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Runs and weights with everything that an ablation shares."""
    runs, weights = tmp_path / "runs", tmp_path / "weights"
    for part in ablations.UPSTREAM:
        (runs / part).mkdir(parents=True)
    (runs / "probe_layers/layers.json").write_text("{}")
    for part in CACHED:
        (runs / part).write_text("")
    (weights / "mllm").mkdir(parents=True)
    for name in (*ablations.WEIGHT_FILES, "mllm/tokenizer.json", "mllm/model.safetensors", "adapter.safetensors"):
        (weights / name).write_text(name)
    monkeypatch.setattr(ablations, "WEIGHTS", weights)
    return SimpleNamespace(runs=runs, weights=weights, out=tmp_path / "out")


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_an_ablation_links_what_it_does_not_run_anew(shipped, name):
    ablation = ablations.ABLATIONS[name]
    for _ in range(2):  # the same command goes on
        folder = ablations.prepare(name, shipped.runs, shipped.out)
    assert folder == shipped.out / name
    links = {p.relative_to(folder).as_posix(): p.resolve() for p in folder.rglob("*") if p.is_symlink()}
    # The probe's run is of the shipped MLLM; what is written beside another is its choice alone.
    has_own_layers = bool(ablation.layers) or name == "untuned"
    anew = set(ablation.stages) | ({"probe_layers"} if has_own_layers else set())
    shared = [part for part in (*ablations.UPSTREAM, *CACHED) if part not in anew]
    expected = {f"runs/{part}": shipped.runs / part for part in shared}
    expected |= {f"weights/{part}": shipped.weights / part for part in ablations.WEIGHT_FILES}
    own = "mllm/tokenizer.json" if "train_mllm" in ablation.stages else "mllm"
    expected[f"weights/{own}"] = shipped.weights / own
    assert links == {name: path.resolve() for name, path in expected.items()}
    assert not (folder / "weights/adapter.safetensors").exists()
    if has_own_layers:
        assert json.loads((folder / "runs/probe_layers/layers.json").read_text()) == (ablation.layers or {})
        assert (shipped.runs / "probe_layers/layers.json").read_text() == "{}"


def test_an_ablation_of_runs_that_are_not_there_names_what_is_missing(shipped):
    (shipped.runs / "atelier.pool").rmdir()
    with pytest.raises(SystemExit, match="atelier.pool is missing"):
        ablations.prepare("image_only", shipped.runs, shipped.out)


@pytest.mark.parametrize(
    ("opened", "words"),
    [(ExtractedUsers, "run `python -m training.extract` first"), (PicturePool, "atelier.pool` first")],
)
def test_what_an_earlier_stage_did_not_finish_is_named(tmp_path, opened, words):
    for folder in ("extract", "atelier.pool"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "pictures.npy", np.zeros(1))
    with pytest.raises(SystemExit, match=words):
        opened(tmp_path)


def test_an_array_is_there_whole_or_as_it_was(tmp_path):
    save_array(np.arange(6).reshape(2, 3), tmp_path / "rows.npy")
    assert np.array_equal(np.load(tmp_path / "rows.npy"), [[0, 1, 2], [3, 4, 5]])
    assert (tmp_path / "rows.npy").stat().st_mode & 0o777 == 0o644
    (tmp_path / "taken/inside").mkdir(parents=True)
    with pytest.raises(OSError):
        save_array(np.zeros(1), tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npy", "taken"]


def calls_of(file):
    """{method of `run`: its keyword arguments} of a stage's source."""
    calls = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "run"]
    return {call.func.attr: {keyword.arg for keyword in call.keywords} for call in named}


STAGES = [file for file in sorted((ROOT / "training").rglob("*.py")) if "steps" in calls_of(file)]


@pytest.mark.parametrize("file", STAGES, ids=[file.relative_to(ROOT).as_posix() for file in STAGES])
def test_a_stage_goes_on_with_all_that_its_steps_change(file):
    """Its model, its optimiser, and averages where it keeps some."""
    parts = calls_of(file)["resume"]
    assert {"model", "optimiser"} <= parts and ("ema" in parts) == ("Ema(" in file.read_text())


def test_the_stages_with_steps_are_found():
    assert len(STAGES) > 12
