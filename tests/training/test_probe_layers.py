"""Layer probes: planted signals are told apart, spoilt labels are at chance, no picture stands in two histories."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import warm
from training import probe_layers
from training.common.errors import exit_with_message
from training.data.errors import DataError
from training.data.worlds import DataSetWorld, History
from training.evaluation import probes
from training.evaluation.probe_page import page
from training.probe_layers import GROUPS, analyse, sample_histories

ROOT = Path(__file__).resolve().parents[2]
USERS, HISTORIES, WIDTH, ATTRIBUTES, COLOURS = 60, 3, 24, 12, 12
NOTHING, COLOUR, USER, TASTE = 0, 1, 2, 3  # what each of the planted layers knows; 4 to 6 know the taste as well
LAYERS = 7


def planted():
    """Readings of users with a colour, an identity and a taste, and layers that know one thing each."""
    draw = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=draw)

    mix = {name: noise(size, WIDTH) for name, size in (("colour", COLOURS), ("user", WIDTH), ("taste", ATTRIBUTES))}
    direction = noise(WIDTH)
    readings, truths = {}, {}
    for group in GROUPS:
        colour, user = noise(USERS, 1, COLOURS), noise(USERS, 1, WIDTH)
        truth = (torch.rand(USERS, ATTRIBUTES, generator=draw) < 0.3).float()
        truth[:, 0] = 1
        history = noise(USERS, HISTORIES, LAYERS, WIDTH)
        seen = colour + noise(USERS, HISTORIES, COLOURS)
        history[:, :, COLOUR] += 0.7 * seen @ mix["colour"]
        history[:, :, USER] += user @ mix["user"]
        asked = noise(USERS, HISTORIES, 2, LAYERS, WIDTH)
        stranger = noise(USERS, HISTORIES, 2, LAYERS, WIDTH)
        for layer in range(TASTE, LAYERS):
            history[:, :, layer] += 2 * truth[:, None] @ mix["taste"]
            asked[:, :, 0, layer] += direction
        parts = torch.cat([seen, -seen, noise(USERS, HISTORIES, 2 * COLOURS)], -1)
        readings[group] = {
            "history": history,
            "asked": asked,
            "stranger": stranger,
            "colour": parts.unflatten(-1, (4, COLOURS)),
            "embedding": noise(USERS, HISTORIES, 4, WIDTH),
        }
        truths[group] = truth
    return readings, truths


@pytest.fixture(scope="module")
def figures():
    analysed = analyse(*planted(), seed=5)
    return analysed | {"histories": HISTORIES, "users": dict.fromkeys(GROUPS, USERS)}


def mean(figures, row, measure):
    return figures["table"][str(row)][measure]["mean"]


def test_a_layer_that_knows_the_user_one_that_knows_colour_and_one_that_knows_nothing_are_told_apart(figures):
    for measure in ("same_user", "named"):
        knows = [mean(figures, layer, measure) for layer in (NOTHING, COLOUR, USER)]
        assert knows[0] < 0.1 < knows[1] < knows[2] - 0.3 and knows[2] > 0.8, measure
        control = mean(figures, "colour", measure)
        assert knows[1] <= control + 0.05 < knows[2] - 0.2, "a layer that knows colour has nothing over the control"
        assert mean(figures, "embedding", measure) < 0.1


def test_liked_is_told_from_disliked_only_where_it_was_planted(figures):
    for layer in (NOTHING, COLOUR, USER):
        low, high = figures["table"][str(layer)]["liked_first"]["ci95"]
        assert low < 0.5 < high
    assert mean(figures, TASTE, "liked_first") > 0.9
    low, high = figures["table"]["e_sem"]["liked_first_stranger"]["ci95"]
    assert low < 0.52 and high > 0.48, "after another's history nothing is left"
    assert mean(figures, TASTE, "traits") > mean(figures, USER, "traits") + 0.3


def test_spoilt_labels_leave_chance(figures):
    for row, values in figures["table"].items():
        assert values["same_user_shuffled"]["mean"] < 0.06, row
        assert values["named_shuffled"]["mean"] < 0.06, row
        assert 0.35 < values["liked_first_shuffled"]["mean"] < 0.65, row
    assert mean(figures, TASTE, "traits_shuffled") < mean(figures, TASTE, "traits") - 0.3


def test_the_rule_takes_the_best_core_of_the_upper_half_and_the_uppermost_four_that_are_as_good_as_the_best():
    def layer(share, liked):
        return {"same_user": np.full(40, share), "named": np.full(40, share), "liked_first": liked}

    rng = np.random.default_rng(0)
    good, chance = [rng.binomial(3, p, (8, 40)) / 3 for p in (0.9, 0.5)]
    rising = [layer(i / 8, good[i]) for i in range(8)]
    assert probe_layers.choose(rising) == {"sem_layers": [4, 5, 6, 7], "core_layer": 6}
    falling = [layer(1 - i / 8, good[i] if i < 5 else chance[i]) for i in range(8)]
    chosen = probe_layers.choose(falling)
    assert chosen["core_layer"] == 4 and chosen["sem_layers"][0] <= 1
    assert probe_layers.choose(rising[:2]) == {"sem_layers": [0, 1], "core_layer": 1}


def test_the_choice_does_not_see_the_figures_that_are_reported():
    readings, truths = planted()
    before = analyse(readings, truths, seed=5)
    readings["report"]["history"] = torch.zeros_like(readings["report"]["history"]) + torch.randn(WIDTH)
    readings["report"]["asked"] = readings["report"]["asked"].flip(2)
    after = analyse(readings, truths, seed=5)
    assert [before[k] for k in ("sem_layers", "core_layer")] == [after[k] for k in ("sem_layers", "core_layer")]
    assert before["table"] != after["table"]


def test_a_world_without_known_attributes_has_no_traits():
    readings, truths = planted()
    analysed = analyse(readings, {group: truth[:, :0] for group, truth in truths.items()}, seed=5)
    assert "traits" not in analysed["table"]["0"] and "liked_first" in analysed["table"]["0"]
    assert "precision" not in page(analysed | {"histories": 3, "users": dict.fromkeys(GROUPS, USERS)})


def test_the_page_has_every_layer_and_every_control(figures):
    text = page(figures)
    for words in ("layer 6", "colour alone", "embedding", "shuffled", "another user's history", "e_core"):
        assert words in text


def test_colour_sees_the_mean_and_the_histogram():
    picture = np.zeros((80, 100, 3), np.uint8)
    picture[:, 50:] = (255, 0, 0)
    seen = probes.colours(picture)
    # The seam between the halves is smeared when the picture is made small: a column of fifty.
    expected = torch.tensor([0.5, 0, 0, 0.5, 0.5])
    assert ((torch.as_tensor(seen[[0, 1, 2, 3, 3 + 3 * 16]]) - expected).abs() < 0.02).all()
    assert seen[3:].sum() == pytest.approx(1)


class Pairs:
    """A user with ten prompts, one liked and one disliked picture each."""

    def history(self, user, rng, liked, disliked):
        numbers = rng.permutation(20)
        return History(numbers, numbers % 2 == 0, [f"Prompt {n // 2}" for n in numbers])


def test_histories_of_one_user_share_no_picture_and_no_prompt_and_an_asked_prompt_stands_in_none():
    for seed in range(20):
        dealt = sample_histories(Pairs(), 1, 2, 8, seed)
        assert len(dealt) == 2
        prompts = [{n // 2 for n in (*d.liked, *d.disliked, *d.asked)} for d in dealt]
        assert not prompts[0] & prompts[1]
        for d in dealt:
            assert [n % 2 for n in d.asked] == [0, 1] and d.asked[0] // 2 == d.asked[1] // 2
            assert {n % 2 for n in d.liked} == {0} and {n % 2 for n in d.disliked} == {1}
            assert not {n // 2 for n in d.asked} & {n // 2 for n in (*d.liked, *d.disliked)}
    assert sample_histories(Pairs(), 1, 6, 8, 0) is None, "ten prompts are no six histories with a picture more"


def run(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", *map(str, words)]
    return warm.run(line, env=environment)


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """A data set of the common schema: 80 users with about ten liked and ten disliked pictures."""
    folder = tmp_path_factory.mktemp("agents")
    result = run(
        "training.data.agents", folder / "set", "--users", 80, "--pictures", 1600, "--size", 64, "--processes", 1
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return folder / "set"


@pytest.fixture(scope="module")
def config(agents, tmp_path_factory):
    """A configuration with a tiny MLLM for that set."""
    from tests.prefgen.tiny_mllms import write_folder

    folder = tmp_path_factory.mktemp("config")
    write_folder(folder / "mllm", "Idefics2")
    path = folder / "tiny.yaml"
    path.write_text(
        json.dumps(
            {
                "hardware": "none",
                "data": {"path": str(agents)},
                "base": {"family": "sd15", "path": "none", "pixels": 64},
                "mllm": {"path": str(folder / "mllm"), "precision": "fp32"},
                "clip_vision": {"path": "none"},
                "probe_layers": {"users": 3, "histories": 2, "pictures": 4},
            }
        )
    )
    return path


def test_the_stage_runs_on_a_data_set_and_goes_on_from_what_it_had_read(config, tmp_path):
    words = ["training.probe_layers", "--config", config, "--runs", tmp_path]
    first = run(*words)
    assert first.returncode == 0, first.stderr[-2000:]
    folder = tmp_path / "probe_layers"
    layers = json.loads((folder / "layers.json").read_text())
    assert layers["sem_layers"] == [0, 1, 2, 3] and layers["core_layer"] in (2, 3), "three users can't say which"
    figures = json.loads((folder / "done").read_text())
    assert {"colour", "embedding", "0", "3", "e_sem", "e_core"} <= set(figures["table"])
    assert (folder / "layers.png").stat().st_size > 1000 and "e_core" in (folder / "probes.md").read_text()
    pieces = {path: path.stat().st_mtime_ns for path in (folder / "readings").iterdir()}
    assert len(pieces) == 3
    lost = next(iter(pieces))
    lost.unlink()
    (folder / "done").unlink()
    assert run(*words).returncode == 0
    assert json.loads((folder / "done").read_text()) == figures
    assert [path for path, time in pieces.items() if path.stat().st_mtime_ns != time] == [lost]


@pytest.mark.parametrize(
    "change, words",
    [
        ("probe_layers.histories=15", "probe_layers.histories lower"),
        ("probe_layers.users=100000", "users of the train"),
        ("mllm.path=gone", "gone"),
        ("mllm.lora={}", "training.train_mllm"),
        ("data.path=gone", "not a finished data set"),
    ],
)
def test_what_is_missing_is_one_sentence(config, tmp_path, monkeypatch, change, words):
    line = ["probe_layers", "--config", str(config), "--runs", str(tmp_path), "--set", change]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match=words) as error, exit_with_message():
        probe_layers.main()
    assert "\n" not in str(error.value) and not (tmp_path / "probe_layers/layers.json").exists()


def test_dealing_from_a_data_set_keeps_to_its_pictures(agents):
    world = DataSetWorld(agents)
    user = world.users("train")[0]
    dealt = sample_histories(world, user, 2, 4, 0)
    numbers = [n for d in dealt for n in (*d.liked, *d.disliked, *d.asked)]
    assert len(set(numbers)) == len(numbers) and set(world.owner[numbers]) == {user}
    for d in dealt:
        assert world.is_liked[[*d.liked, d.asked[0]]].all() and not world.is_liked[[*d.disliked, d.asked[1]]].any()
    with pytest.raises(DataError):
        world.users("test", 10**6)
