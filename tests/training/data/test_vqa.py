"""Preference questions: answered by the pictures alone, balanced, the same every time; a set that leaks is refused."""

import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefgen.pictures import read_picture
from tests.training.commands import content
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.errors import DataError
from training.data.schema import TEST, TRAIN, normal_prompt, user_split
from training.data.store import images_at
from training.data.vqa import __main__ as command
from training.data.vqa import make as make_module
from training.data.vqa.control import TextOnly, beats_chance
from training.data.vqa.questions import ANSWERS, KINDS, SIDE, Picture, Question, ask, traits_of

EACH = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa") / "agents"
    make(Population(60, 1180, 3, 16, Atelier(16), None), folder, processes=1)
    return folder


@pytest.fixture(scope="module")
def question_set(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa") / "questions"
    report = make_module.make(data, folder, EACH, seed=0)
    return folder, report, {s: pq.read_table(folder / f"{s}.parquet").to_pylist() for s in (TRAIN, TEST)}


def test_every_kind_is_asked_in_several_wordings_and_answers_are_in_balance(question_set):
    _, report, rows = question_set
    for split in (TRAIN, TEST):
        assert {row["kind"] for row in rows[split]} == set(KINDS)
        assert {user_split(row["user"]) for row in rows[split]} == {split}
    for kind, answers in ANSWERS.items():
        counts = Counter(row["answer"] for split in rows.values() for row in split if row["kind"] == kind)
        assert set(counts) == set(answers) and abs(counts[answers[0]] - counts[answers[1]]) <= 4
    for kind in KINDS.values():
        assert {row["question"] for row in rows[TRAIN] if row["kind"] == kind.name} == set(kind.wordings)
    assert sum(report["questions"][TRAIN].values()) == len(rows[TRAIN])


def test_no_asked_picture_nor_its_prompt_is_in_the_history_and_test_asks_about_held_out_ones(data, question_set):
    index = {(r["user"], r["picture"]): r for r in pq.read_table(data / "index.parquet").to_pylist()}
    for split, rows in question_set[2].items():
        for row in rows:
            history_rows = [index[row["user"], p["picture"]] for p in row["history"]]
            assert [k["verdict"] == "liked" for k in history_rows] == [p["liked"] for p in row["history"]]
            assert not any(k["heldout"] for k in history_rows)
            assert all(sum(p["liked"] == side for p in row["history"]) >= SIDE[0] for side in (True, False))
            prompts = {normal_prompt(k["prompt"]) for k in history_rows}
            asked = [index[row["user"], p["picture"]] for p in row["asked"]]
            assert not prompts & {normal_prompt(a["prompt"]) for a in asked}
            assert all(a["heldout"] == (split == TEST) for a in asked)
            liked = [a["verdict"] == "liked" for a in asked]
            if row["kind"] == "would":
                assert liked == [row["answer"] == "yes"]
            elif row["kind"] == "which":
                assert liked == [row["answer"] == "first", row["answer"] == "second"]
            else:
                assert not asked and row["answer"]


def test_traits_are_told_from_the_history_s_own_pictures(question_set, data):
    index = {(r["user"], r["picture"]): set(r["attributes"]) for r in pq.read_table(data / "index.parquet").to_pylist()}
    checked = 0
    for row in question_set[2][TRAIN]:
        if row["kind"] in ("shared", "avoid"):
            side = row["kind"] == "shared"
            here, there = (
                [index[row["user"], p["picture"]] for p in row["history"] if p["liked"] == s] for s in (side, not side)
            )
            for trait in row["answer"].split(", "):
                key = trait.replace(" ", "/", 1)
                assert sum(key in shown for shown in here) >= 0.6 * len(here)
                assert sum(key in shown for shown in there) <= 0.34 * len(there)
                checked += 1
    assert checked > 100


def test_the_named_rows_hold_the_pictures(data, question_set):
    row = next(r for r in question_set[2][TEST] if r["kind"] == "which")
    places = [*row["history"], *row["asked"]]
    shards, rows = (np.array([place[name] for place in places]) for name in ("shard", "row"))
    pictures = [read_picture(image) for _, image in images_at(data, shards, rows)]
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * len(places)


def test_the_same_command_makes_the_same_bytes_and_another_is_refused(data, question_set, tmp_path):
    folder, report, _ = question_set
    assert make_module.make(data, tmp_path / "again", EACH, seed=0) == report
    assert content(tmp_path / "again") == content(folder)
    assert make_module.make(data, folder, EACH, seed=0) == report
    with pytest.raises(DataError, match="another set or other options"):
        make_module.make(data, folder, EACH, seed=1)
    with pytest.raises(DataError, match="no data set"):
        make_module.make(tmp_path, tmp_path / "x", EACH, seed=0)


def test_a_folder_of_other_wordings_is_refused_not_called_finished(data, question_set, monkeypatch):
    kind = replace(KINDS["would"], wordings=("Yes or no?",))
    monkeypatch.setitem(KINDS, "would", kind)
    with pytest.raises(DataError, match="holds other questions"):
        make_module.make(data, question_set[0], EACH, seed=0)


def pictures(attributes=frozenset({"palette/neon"})):
    """Ten prompts, each with a liked and a disliked picture; the attributes are those of the liked ones."""
    return [
        Picture(f"{n}", n % 2 == 0, f"a thing {n // 2}", attributes if n % 2 == 0 else frozenset(), n > 17, 0, n)
        for n in range(20)
    ]


def test_pictures_without_attributes_are_asked_about_as_pictures_only():
    questions = [q for _, q in ask(pictures(frozenset()), 0, 5, range(20), heldout=False)]
    assert Counter(q.kind for q in questions) == {"would": 10, "which": 10}
    few = [p for p in pictures() if p.prompt in ("a thing 0", "a thing 1")]
    assert not [q for _, q in ask(few, 0, 5, range(4), heldout=False) if q.kind in ANSWERS], (
        "nothing left for a history"
    )


def test_a_trait_of_both_sides_is_no_taste():
    shown = frozenset({"palette/neon", "line/thin"})
    history = tuple(
        Picture(str(n), n < 4, "", shown if n < 4 else frozenset({"line/thin"}), False, 0, n) for n in range(8)
    )
    assert traits_of(history, True) == ("palette neon",) and traits_of(history, False) == ()


def test_the_control_finds_what_a_text_gives_away_and_passes_what_it_does_not():
    def questions(leak):
        for user in range(200):
            for _, q in ask(pictures(), 0, user, range(10), heldout=False):
                text = f"{q.question} {q.answer if leak else ''}"
                yield Question(q.kind, text, q.answer, q.history, q.asked)

    for leak in (True, False):
        control, right, asked = TextOnly(), 0, 0
        closed = [q for q in questions(leak) if q.kind in ANSWERS]
        for q in closed[: len(closed) // 2]:
            control.learn(q)
        for q in closed[len(closed) // 2 :]:
            right, asked = right + (control.answer(q) == q.answer), asked + 1
        assert beats_chance(right, asked) == leak


def test_the_command_refuses_a_set_whose_text_gives_the_answers_away(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vqa", str(data), str(tmp_path / "good"), "--each", "5"])
    command.main()
    assert json.loads(capsys.readouterr().out)["text_only"]["would"]["gives_away"] is False
    monkeypatch.setattr(make_module, "beats_chance", lambda right, asked: True)
    monkeypatch.setattr(sys, "argv", ["vqa", str(data), str(tmp_path / "bad"), "--each", "5"])
    with pytest.raises(SystemExit, match="The text alone answers would, which better than chance"):
        command.main()
