"""What the MLLM reads of a taste: the verdicts' order, each picture once, and a frozen revision to the last byte."""

import os

import pytest

from prefgen.history import PreferenceHistory
from prefgen.tastes.names import TasteError
from prefgen.tastes.origin import Origin
from prefgen.tastes.reading import history_folder
from prefgen.tastes.taste import Taste
from tests.prefgen.tastes.test_taste import picture, sha256


@pytest.fixture
def taste(tmp_path) -> Taste:
    (tmp_path / "sea").mkdir()
    return Taste(tmp_path / "sea")


def prompts(history: PreferenceHistory) -> list[str]:
    return [item.prompt for item in history.items]


def test_pictures_are_read_in_the_order_of_their_verdicts_with_what_they_were_made_of(taste):
    for n, when in ((1, 300.0), (2, 100.0), (3, 200.0)):
        taste.rate(picture(n), "liked", f"{n}.png", origin=Origin(f"prompt {n}"), moment=when)
    assert prompts(PreferenceHistory.from_folder(taste.folder)) == ["prompt 2", "prompt 3", "prompt 1"]
    (taste.folder / "liked" / "2.txt").write_text("what the artist wrote")
    assert prompts(PreferenceHistory.from_folder(taste.folder))[0] == "what the artist wrote"


def test_a_picture_that_is_there_twice_is_read_once_by_its_newest_verdict(taste):
    taste.rate(picture(1), "liked", "1.png", moment=100.0)
    taste.rate(picture(2), "liked", "2.png", moment=200.0)
    (taste.folder / "disliked").mkdir()
    (taste.folder / "disliked" / "again.png").write_bytes(picture(2))
    history = PreferenceHistory.from_folder(taste.folder)
    assert [item.liked for item in history.items] == [True, False]


def test_a_frozen_revision_is_the_same_history_after_a_hundred_edits(taste):
    for n in range(8):
        taste.rate(picture(n), "liked" if n % 2 else "disliked", f"{n}.png", origin=Origin(f"prompt {n}"))
    before = PreferenceHistory.from_folder(taste.folder)
    revision = taste.revision()
    for n in range(8):
        (taste.folder / ("liked" if n % 2 else "disliked") / f"{n}.txt").write_text("another prompt")
    for edit in range(100):
        if edit % 3:
            taste.rate(picture(100 + edit), "liked", f"{edit}.png")
        else:
            taste.place([taste.pictures()[0].sha256], ("disliked", "", "liked")[edit % 9 // 3])
    assert PreferenceHistory.from_folder(taste.folder).digest != before.digest
    assert PreferenceHistory.from_folder(taste.folder, revision=revision).digest == before.digest


def test_a_revision_without_liked_pictures_and_one_that_lacks_some_are_refused(taste, one_sentence):
    taste.rate(picture(1), "disliked", "1.png")
    revision = taste.keep_revision()
    with pytest.raises(ValueError, match="no pictures in its `liked`"):
        PreferenceHistory.from_folder(taste.folder, revision=revision)
    taste.rate(picture(2), "liked", "2.png")
    revision = taste.keep_revision()
    taste.place([sha256(picture(2))], "")
    taste.empty_trash()
    with pytest.raises(TasteError) as raised:
        PreferenceHistory.from_folder(taste.folder, revision=revision)
    assert "2.png left the taste" in one_sentence(raised)


def test_a_folder_of_files_alone_is_read_as_it_is_and_nothing_is_written_there(tmp_path):
    (tmp_path / "liked").mkdir()
    (tmp_path / "liked" / "a.png").write_bytes(picture(1))
    assert len(PreferenceHistory.from_folder(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["liked"] and os.listdir(tmp_path / "liked") == ["a.png"]


def test_the_fingerprint_changes_with_a_verdict_that_moves_no_file_in_time(taste):
    taste.rate(picture(1), "liked", "1.png")
    before = history_folder(taste.folder).fingerprint()
    assert history_folder(taste.folder).fingerprint() == before
    taste.rate(picture(2), "liked", "2.png")
    taste.undo()
    assert history_folder(taste.folder).fingerprint() != before
