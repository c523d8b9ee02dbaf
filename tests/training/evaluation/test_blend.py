"""The blend of two users, small: from one taste to the other, and the page that is written of it."""

import json
from pathlib import Path

import pytest

from prefgen.atelier import users
from training.evaluation import blend

ROOT = Path(__file__).parents[3]


def test_pairs_are_test_users_with_one_taste_each_and_nobody_twice():
    pairs = blend.pairs_of(16)
    ids = [person.id for pair in pairs for person in pair]
    assert len(pairs) == 16 and len(set(ids)) == 32
    assert all(users.split(number) == "test" and len(users.user(number).tastes) == 1 for number in ids)
    assert blend.pairs_of(2) == pairs[:2]


@pytest.mark.slow
def test_at_either_end_the_pictures_suit_that_user(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(blend, "SHARES", (0.0, 1.0))
    monkeypatch.setattr("sys.argv", ["blend", "--pairs", "2", "--prompts", "1", "--out", str(tmp_path)])
    blend.main()
    result = json.loads((tmp_path / "blend.json").read_text())
    assert result["shares"]["0.0"]["mean"] < 0 < result["shares"]["1.0"]["mean"] and result["monotonic"]
    assert (tmp_path / "blend.md").read_text() == blend.page(result)


def test_the_page_of_the_evidence_is_that_of_its_figures_and_the_reading_moves_at_every_quarter():
    result = json.loads((ROOT / "docs" / "evidence" / "blend.json").read_text())
    assert (ROOT / "docs" / "evidence" / "blend.md").read_text() == blend.page(result)
    assert result["monotonic"] and len(result["pairs"]) >= 16 and len(result["shares"]) == 5
