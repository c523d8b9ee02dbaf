"""The comparison of methods: its statistics on known cases, its controls, and a small run that goes on where it was."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefgen.atelier import captions, models, users
from tests.closeness import assert_close, assert_far
from training.data.atelier_users import users_of
from training.evaluation import metrics, reference, rows
from training.evaluation.evaluate import __main__ as command
from training.evaluation.evaluate import measure, painter, readings


def test_an_interval_is_over_users_and_leaves_the_unknown_out():
    assert metrics.interval(np.array([0.4, 0.4, np.nan])) == {"mean": 0.4, "ci95": [0.4, 0.4], "users": 2}
    rng = np.random.default_rng(3)
    by_user = rng.normal(0.2, 1.0, 400)
    low, high = metrics.interval(by_user)["ci95"]
    expected = 2 * 1.96 * by_user.std() / 20
    assert high - low == pytest.approx(expected, rel=0.1) and low < by_user.mean() < high


def test_a_row_s_figures_are_its_own_beside_prefgen_and_the_ends_of_the_scale():
    none = np.array([0.0, 0.1, 0.2])
    aligned = {"none": none, "prefgen": none + 0.3, "oracle": none + 0.4}
    figures = measure.alignment_figures(none + 0.1, aligned)
    means = {name: entry["mean"] for name, entry in figures.items()}
    assert means == pytest.approx({"alignment": 0.2, "minus_prefgen": -0.2, "gain_share": 0.25})


def test_a_gain_share_is_paired_and_there_is_none_of_no_gain():
    rng = np.random.default_rng(4)
    none, gain = rng.normal(0, 1, 30), rng.uniform(0.5, 1, 30)
    assert metrics.gain_share(none + gain / 4, none, none + gain) == {"mean": 0.25, "ci95": [0.25, 0.25]}
    assert metrics.gain_share(none, none, none) == {"mean": None, "ci95": None}


def test_the_controls_keep_what_they_say_and_nothing_else():
    picture = torch.rand(8, 6, 3, generator=torch.Generator().manual_seed(1))
    (mixed,), (plain,) = rows.colours_only([picture]), rows.grey([picture])
    assert sorted(map(tuple, mixed.flatten(0, 1).tolist())) == sorted(map(tuple, picture.flatten(0, 1).tolist()))
    assert not torch.equal(mixed, picture)
    assert_close(plain.mean(-1), picture.mean(-1), ulps=8)
    assert not (plain - plain[..., :1]).any()


def test_alignment_over_some_families_counts_who_has_opinions_there():
    person = users.User(1, (users.Taste((("palette", "neon"), ("line", "thin"))),), (("palette", "earth"),))
    narrowed = readings.only(person, {"palette"})
    assert narrowed.tastes[0].liked == (("palette", "neon"),)
    assert readings.only(person, {"line"}) is None, "nothing is disliked there"
    seen = [{"attributes": {"palette": "neon", "line": "thick"}}] * 2
    alignments = readings.alignment(seen, [narrowed, None], [(0, "owl", "moon"), (1, "owl", "moon")])
    assert alignments[0] == 1.0 and np.isnan(alignments[1])


def test_every_user_gets_held_out_prompts_and_all_of_them_come_by_turns():
    asked = painter.requests(users_of("test", 10), 4)
    assert [user for user, _, _ in asked[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {(s, p) for _, s, p in asked} == set(captions.heldout_prompts())


def test_distances_to_the_liked_are_unbiased_and_grow_with_the_shift():
    rng = np.random.default_rng(5)
    for distance in (metrics.kid, metrics.cmmd):
        same = [distance(rng.normal(size=(4, 8)), rng.normal(size=(32, 8))) for _ in range(400)]
        assert abs(np.mean(same)) < 4 * np.std(same) / 20, "unbiased: the mean over many is zero"
        near, far = (
            np.mean([distance(rng.normal(shift, 1, (4, 8)), rng.normal(size=(32, 8))) for _ in range(50)])
            for shift in (0.7, 1.5)
        )
        assert 4 * np.std(same) / 20 < near < far


def test_the_frechet_distance_is_that_of_two_normal_distributions():
    rng = np.random.default_rng(6)
    pictures, liked = (np.concatenate([rng.normal(0, 1, (200, 3)) for _ in range(20)]) for _ in range(2))
    assert abs(metrics.frechet(pictures, pictures)) < 1e-3  # of traces of 3 each
    assert metrics.frechet(pictures, liked) < 0.02
    # |3|^2 on each of three axes, and (2 - 1)^2 for each of three deviations of 2.
    assert metrics.frechet(2 * pictures + 3, liked) == pytest.approx(30, rel=0.05)


def test_diversity_is_0_for_one_picture_again_and_1_for_unrelated_ones():
    same = [[1.0, 0.0, 0.0]] * 3
    assert metrics.diversity(np.array([same, np.eye(3)])).tolist() == pytest.approx([0.0, 1.0])


def test_reference_attention_is_the_plain_one_at_weight_0_and_reads_each_half_its_own():
    unet = models.load_unet_diffusers(random=True)
    processors = reference.install(unet)
    assert len(processors) == sum(name.endswith("attn1.processor") for name in unet.attn_processors)
    generator = torch.Generator().manual_seed(1)

    def noise(count):
        return torch.randn(count, 8, 16, 16, generator=generator)

    states, empty, latents = torch.randn(2, 48, 128, generator=generator), torch.zeros(1, 48, 128), noise(1)
    liked, disliked, step = noise(2), noise(2), torch.tensor(500)
    both = torch.cat([latents, latents])

    def painted(disliked, liked, weight):
        unet_with = reference.Referenced(unet, processors, disliked, liked, empty, weight)
        return unet_with(both, step, states).sample

    with torch.inference_mode():
        plain = unet(both, step, states).sample
        first, other = painted(disliked, liked, 1.0), painted(disliked, noise(2), 1.0)
        assert torch.equal(unet(both, step, states).sample, plain), "nothing of it stays"
        assert_close(painted(disliked, liked, 1e-30), plain, unlike=first)
    # Other liked pictures change the half with the prompt alone.
    assert_close(first[0], other[0], unlike=plain[0])
    assert_far(first[1], other[1])


@pytest.mark.slow
def test_a_small_run_measures_every_row_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(painter, "STEPS", 3)
    monkeypatch.setattr(measure, "SEEDS", 2)
    out, runs, ablations = (tmp_path / name for name in ("out", "runs", "ablations"))
    for name in ("pointwise", "blind_image"):
        ablations.joinpath(name).mkdir(parents=True)
        ablations.joinpath(name, "weights").symlink_to(models.WEIGHTS)
    options = {"users": 2, "skip": 3, "prompts": 2, "runs": runs, "out": out, "ablations": ablations}
    arguments = ["evaluate", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    first = (out / "methods.json").read_bytes()
    page, result = (out / "methods.md").read_text(), json.loads(first)
    there = {name for name, row in rows.ROWS.items() if row.ablation in ("", "pointwise", "blind_image")}
    assert set(result["rows"]) == there and all(f"| {rows.ROWS[name].label} |" in page for name in there)
    assert "Not in this run: image-only adapter" in page and "2 users of the test split, after the first 3," in page
    assert result["user_ids"] == [person.id for person in users_of("test", 5)[3:]]
    assert "Reference attention is ours" in page and "The image-only adapter is" not in page, "only what was run"
    assert result["rows"]["pointwise"]["alignment"] == result["rows"]["prefgen"]["alignment"], "the same weights here"
    blind, other = (result["rows"][name]["alignment"]["mean"] for name in ("blind_image", "blind_image_other"))
    assert result["rows"]["blind_image"]["minus_other"]["mean"] == pytest.approx(blind - other, abs=2e-4)
    assert "## From verdicts alone" in page and "less another user's" in page
    assert (out / "figures/history_size.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures/methods.jpg").read_bytes().startswith(b"\xff\xd8")
    stored = {path.stem: json.loads(path.read_text()) for path in runs.rglob("*.json")}
    different = [
        name
        for name in stored
        if "readings" in stored[name] and stored[name]["readings"] != stored["prefgen"]["readings"]
    ]
    assert {"none", "mismatched", "oracle", "swapped", "described", "reference_1", "weight_1.5"} <= set(different)

    def without_times(record):
        assert all(row.pop("cpu_seconds_a_picture") > 0 for row in record["rows"].values())
        return record

    for path in runs.rglob("s*.json"):  # as if it had been stopped before these
        path.unlink()
    command.main()
    again = (out / "methods.json").read_bytes()
    assert without_times(json.loads(again)) == without_times(result)
    monkeypatch.setattr(measure, "Painter", None)  # everything is there: no model is needed
    command.main()
    assert (out / "methods.json").read_bytes() == again


def test_of_two_tastes_that_the_mllm_names_the_first_is_what_a_prompt_holds():
    class Told:
        def answer(self, history):
            return "ocean palette, gold frame or neon palette, no frame; ink outline"

    pictures = [torch.rand(8, 8, 3)]
    traits = painter.Painter.traits(SimpleNamespace(mllm=Told()), pictures, pictures)
    assert traits.liked == ("ocean palette", "gold frame") and traits.disliked == ("ink outline",)
