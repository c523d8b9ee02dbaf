"""The comparison of methods: its statistics on known cases, its controls, and a small run that goes on where it was."""

import json
import sys

import numpy as np
import pytest
import torch

from prefgen.atelier import users
from training import evaluate
from training.users_pool import users_of


def test_an_interval_is_over_users_and_leaves_the_unknown_out():
    assert evaluate.interval(np.array([0.4, 0.4, np.nan])) == {"mean": 0.4, "ci95": [0.4, 0.4], "users": 2}
    rng = np.random.default_rng(3)
    by_user = rng.normal(0.2, 1.0, 400)
    low, high = evaluate.interval(by_user)["ci95"]
    expected = 2 * 1.96 * by_user.std() / 20
    assert high - low == pytest.approx(expected, rel=0.1) and low < by_user.mean() < high


def test_a_gain_share_is_paired_and_there_is_none_of_no_gain():
    rng = np.random.default_rng(4)
    none, gain = rng.normal(0, 1, 30), rng.uniform(0.5, 1, 30)
    assert evaluate.gain_share(none + gain / 4, none, none + gain) == {"mean": 0.25, "ci95": [0.25, 0.25]}
    assert evaluate.gain_share(none, none, none) == {"mean": None, "ci95": None}


def test_the_controls_keep_what_they_say_and_nothing_else():
    picture = torch.rand(8, 6, 3, generator=torch.Generator().manual_seed(1))
    (mixed,), (plain,) = evaluate.colours_only([picture]), evaluate.grey([picture])
    assert sorted(map(tuple, mixed.flatten(0, 1).tolist())) == sorted(map(tuple, picture.flatten(0, 1).tolist()))
    assert not torch.equal(mixed, picture)
    assert torch.allclose(plain.mean(-1), picture.mean(-1)) and (plain - plain[..., :1]).abs().max() == 0


def test_alignment_over_some_families_counts_who_has_opinions_there():
    person = users.User(1, (users.Taste((("palette", "neon"), ("line", "thin"))),), (("palette", "earth"),))
    narrowed = evaluate.only(person, {"palette"})
    assert narrowed.tastes[0].liked == (("palette", "neon"),)
    assert evaluate.only(person, {"line"}) is None, "nothing is disliked there"
    readings = [{"attributes": {"palette": "neon", "line": "thick"}}] * 2
    found = evaluate.alignment(readings, [narrowed, None], [(0, "owl", "moon"), (1, "owl", "moon")])
    assert found[0] == 1.0 and np.isnan(found[1])


def test_every_user_gets_held_out_prompts_and_all_of_them_come_by_turns():
    asked = evaluate.requests(users_of("test", 10), 4)
    assert [user for user, _, _ in asked[:8]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {(s, p) for _, s, p in asked} == set(evaluate.captions.heldout_prompts())


@pytest.mark.slow
def test_a_small_run_measures_every_row_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", 3)
    out, runs = tmp_path / "out", tmp_path / "runs"
    arguments = ["evaluate", "--users", "2", "--prompts", "1", "--runs", str(runs), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    evaluate.main()
    first = (out / "methods.json").read_bytes()
    page, result = (out / "methods.md").read_text(), json.loads(first)
    assert set(result["rows"]) == set(evaluate.ROWS) and all(f"| {r.label} |" in page for r in evaluate.ROWS.values())
    assert (out / "figures" / "history_size.png").read_bytes().startswith(b"\x89PNG")
    kept = {path.stem: path.read_text() for path in runs.rglob("*.json")}
    different = [name for name in kept if name != "prefgen" and kept[name] != kept["prefgen"]]
    assert {"none", "mismatched", "oracle", "swapped"} <= set(different)

    for path in runs.rglob("s*.json"):  # as if it had been stopped before these
        path.unlink()
    evaluate.main()
    assert (out / "methods.json").read_bytes() == first
    monkeypatch.setattr(evaluate, "Painter", None)  # everything is there: no model is needed
    evaluate.main()
    assert (out / "methods.json").read_bytes() == first
