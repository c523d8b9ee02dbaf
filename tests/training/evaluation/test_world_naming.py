"""Sheets without prompts, and how answers to them are counted."""

import json
from collections import Counter

import pytest
from PIL import Image

from prefgen.atelier.world.subjects import SUBJECTS
from training.data.errors import DataError
from training.evaluation.world import naming


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("naming")
    naming.write_sheets(folder, 14, 60, renders=True)
    return folder


def test_sheets_number_every_picture_and_say_nothing_of_its_prompt(folder):
    sizes = [Image.open(folder / f"sheet-{number}.png").size for number in (1, 2)]
    assert sizes == [(4 * 256, 3 * (256 + naming.CAPTION)), (4 * 256, 256 + naming.CAPTION)]
    assert not Image.open(folder / "sheet-1.png").info
    assert len(json.loads((folder / "key.json").read_text())["subjects"]) == 14


def test_every_subject_is_asked_for_about_as_often_in_no_order():
    subjects = [request.prompt.subject for request in naming.balanced(60, 60)]
    counts = Counter(subjects)
    assert set(counts) == set(SUBJECTS) and max(counts.values()) - min(counts.values()) <= 1
    assert subjects[: len(SUBJECTS)] != list(SUBJECTS)
    assert [request.prompt.subject for request in naming.balanced(60, 61)] != subjects


def test_answers_are_counted_by_their_numbers(folder, tmp_path):
    subjects = json.loads((folder / "key.json").read_text())["subjects"]
    answers = tmp_path / "names.txt"
    wrong = next(name for name in SUBJECTS if name != subjects[3])
    answers.write_text("\n".join([*subjects[:3], wrong.title(), *subjects[4:]]) + "\n\n")
    assert naming.marked(folder, answers) == {
        "pictures": 14,
        "right": 13,
        "wrong": [f"4: {subjects[3]}, named {wrong}"],
    }


def test_answers_that_are_no_subjects_or_too_few_are_refused(folder, tmp_path):
    answers = tmp_path / "names.txt"
    answers.write_text("dragon\n" * 14)
    with pytest.raises(DataError, match="'dragon' is no subject: write one of cat, owl"):
        naming.marked(folder, answers)
    answers.write_text("cat\n" * 13)
    with pytest.raises(DataError, match="13 answers for 14 pictures: write one of"):
        naming.marked(folder, answers)
    with pytest.raises(DataError, match="no sheets: paint them first"):
        naming.marked(tmp_path, answers)
