"""A history's folder: which files count, in which order, and what is said of those that don't."""

import errno
import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prefgen.history import MAX_ITEMS, PreferenceHistory
from prefgen.history_folder import HistoryFolder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ada" / "liked").mkdir(parents=True)
    return tmp_path / "ada"


def put(file, shade=100, age=0):
    """A grey picture; age in seconds before a fixed day."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (shade,) * 3).save(file)
    os.utime(file, (1_700_000_000 - age, 1_700_000_000 - age))
    return file


def shades(items):
    return [round(item.image[0, 0, 0].item() * 255) for item in items]


# ---- order ----------------------------------------------------------------------------------------------------------


def test_the_newest_are_read_by_their_time_and_not_by_their_name(folder, caplog):
    for number in range(50):
        put(folder / "liked" / f"z_{number:02d}.png", shade=number, age=1000 - number)
    for number in range(10):
        put(folder / "liked" / f"a_{number}.png", shade=200 + number, age=100 - number)
    with caplog.at_level(logging.WARNING):
        history = PreferenceHistory.from_folder(folder)
    assert shades(history.items) == [*range(20, 50), *range(200, 210)]
    assert "newest 40 liked" in caplog.text and "20 older ones are left out" in caplog.text


def test_files_of_one_time_go_by_name_with_numbers_as_numbers(folder):
    for number in (10, 9, 1, 100, 2):
        put(folder / "liked" / f"Study {number}.png", shade=number)
    put(folder / "liked" / "study 5.png", shade=5)
    assert shades(PreferenceHistory.from_folder(folder).items) == [1, 2, 5, 9, 10, 100]


def test_both_sides_keep_their_order_and_share_what_a_history_holds(folder):
    for number in range(70):
        put(folder / "liked" / f"{number}.png", shade=number, age=100 - number)
        put(folder / "disliked" / f"{number}.png", shade=100 + number, age=100 - number)
    history = PreferenceHistory.from_folder(folder)
    assert len(history) == MAX_ITEMS
    assert shades(history.liked) == [*range(38, 70)] and shades(history.disliked) == [*range(138, 170)]
    assert shades(PreferenceHistory.from_folder(folder, limit=2).liked) == [68, 69]


def test_an_older_picture_takes_the_place_of_one_that_cannot_be_read(folder):
    for number in range(5):
        put(folder / "liked" / f"{number}.png", shade=number, age=10 - number)
    (folder / "liked" / "4.png").write_bytes(b"words")
    history = PreferenceHistory.from_folder(folder, limit=3)
    assert shades(history.items) == [1, 2, 3] and "4.png" in history.left_out


# ---- what counts ----------------------------------------------------------------------------------------------------


def test_hidden_and_system_files_are_no_pictures_and_are_not_spoken_of(folder, caplog):
    put(folder / "liked" / "study.png")
    for name in ("._study.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", "ehthumbs.db", ".DS_Store", "Icon\r"):
        (folder / "liked" / name).write_bytes(b"\0\5\26\7")
    (folder / "__MACOSX" / "liked").mkdir(parents=True)
    for name in ("study.txt", "notes.json", "readme.md"):
        (folder / "liked" / name).write_text("a boat")
    history = PreferenceHistory.from_folder(folder)
    assert len(history) == 1 and not history.left_out and not caplog.text


@pytest.mark.parametrize("names", [("Liked", "DISLIKED"), ("LIKED", "Disliked")])
def test_sub_folders_are_known_in_any_case(tmp_path, names):
    for name in names:
        put(tmp_path / "ada" / name / "a.png")
    history = PreferenceHistory.from_folder(tmp_path / "ada")
    assert len(history.liked) == len(history.disliked) == 1


def test_loose_pictures_count_as_liked_where_no_liked_folder_has_any(tmp_path):
    put(tmp_path / "ada" / "a.png", shade=10)
    put(tmp_path / "ada" / "disliked" / "b.png", shade=20)
    history = PreferenceHistory.from_folder(tmp_path / "ada")
    assert shades(history.liked) == [10] and shades(history.disliked) == [20]
    put(tmp_path / "ada" / "liked" / "c.png", shade=30)
    assert shades(PreferenceHistory.from_folder(tmp_path / "ada").liked) == [30]


def test_pictures_of_no_verdict_are_counted_in_the_log(folder, caplog):
    put(folder / "liked" / "a.png")
    put(folder / "overview.png")
    put(folder / "liked" / "2024" / "b.png")
    put(folder / "disliked" / "2024" / "c.txt.png")
    with caplog.at_level(logging.WARNING):
        history = PreferenceHistory.from_folder(folder)
    assert len(history) == 1
    assert caplog.text.count("passes over 1 pictures in 2024") == 2 and "passes over 1 pictures in ada" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="no such names there")
def test_names_that_are_no_text_can_be_spoken_of(folder):
    put(folder / "liked" / "good.png")
    with open(os.fsencode(folder / "liked") + b"/caf\xe9\nbad.png", "wb") as file:
        file.write(b"words")
    history = PreferenceHistory.from_folder(folder)
    assert len(history) == 1 and "caf??bad.png" in history.left_out
    assert history.left_out.encode() and HistoryFolder(folder).fingerprint()


def test_linked_folders_and_pictures_are_followed(tmp_path):
    put(tmp_path / "elsewhere" / "a.png", shade=10)
    put(tmp_path / "b.png", shade=20)
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "liked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "b.png").symlink_to(tmp_path / "b.png")
    assert sorted(shades(PreferenceHistory.from_folder(tmp_path / "ada").items)) == [10, 20]


# ---- bad files ------------------------------------------------------------------------------------------------------


def test_every_bad_file_is_named_once_with_its_reason_and_the_rest_is_read(folder, caplog):
    put(folder / "liked" / "good.png", shade=77)
    (folder / "liked" / "empty.png").write_bytes(b"")
    (folder / "liked" / "page.jpg").write_bytes(b"<html></html>")
    (folder / "disliked" / "inner.png").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        history = PreferenceHistory.from_folder(folder)
    assert shades(history.items) == [77]
    for name, reason in (("empty.png", "is empty"), ("page.jpg", "web page"), ("inner.png", "a folder")):
        assert history.left_out.count(name) == 1 and reason in history.left_out
        assert caplog.text.count(name) == 1


@pytest.mark.parametrize("count", [1, 3, 12])
def test_where_nothing_liked_can_be_read_one_sentence_says_so(folder, count, one_sentence):
    for number in range(count):
        (folder / "liked" / f"{number:02d}.png").write_bytes(b"words")
    put(folder / "disliked" / "fine.png")
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_folder(folder)
    assert "00.png" in one_sentence(raised) or "11.png" in str(raised.value)
    assert "ada" in str(raised.value) and "isn't a picture" in str(raised.value)


def test_reading_shows_progress_and_stops_at_an_interrupt(folder):
    for number in range(4):
        put(folder / "liked" / f"{number}.png")
        put(folder / "disliked" / f"{number}.png")
    seen = []
    PreferenceHistory.from_folder(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 8) for n in range(1, 9)]

    class Stopped(Exception):
        pass

    def interrupt():
        if len(seen) == 3:
            raise Stopped

    seen.clear()
    with pytest.raises(Stopped):
        PreferenceHistory.from_folder(folder, progress=lambda *step: seen.append(step), interrupt=interrupt)
    assert len(seen) == 3


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
def test_a_prompt_is_read_however_an_editor_saved_it(folder, encoding):
    put(folder / "liked" / "a.png")
    (folder / "liked" / "a.txt").write_bytes("a café,\r\n naïve  style".encode(encoding))
    assert PreferenceHistory.from_folder(folder).items[0].prompt == "a café, naïve style"


def test_a_prompt_file_in_capitals_counts(folder):
    put(folder / "liked" / "A.PNG")
    (folder / "liked" / "A.TXT").write_text("a boat")
    assert PreferenceHistory.from_folder(folder).items[0].prompt == "a boat"


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_pictures_prompts_and_order_and_nothing_else(folder):
    a, b = put(folder / "liked" / "a.png", age=20), put(folder / "liked" / "b.png", age=10)
    seen = [HistoryFolder(folder).fingerprint()]

    def changed() -> bool:
        seen.append(HistoryFolder(folder).fingerprint())
        return seen[-1] not in seen[:-1]

    (folder / "liked" / "notes.md").write_text("no picture")
    (folder / "liked" / "._a.png").write_text("no picture")
    assert not changed()
    assert seen[-1] == seen[0]
    os.utime(a, (1_700_000_000, 1_700_000_000))  # now b is the older one
    assert changed()
    (folder / "liked" / "a.txt").write_text("a boat")
    assert changed()
    (folder / "liked" / "a.txt").write_text("a small boat")
    assert changed()
    put(folder / "liked" / "c.tif")
    assert changed()
    shutil.move(b, folder / "liked" / "d.png")
    assert changed()
    put(folder / "disliked" / "e.png")
    assert changed()


def test_the_fingerprint_opens_no_picture(folder, monkeypatch):
    put(folder / "liked" / "a.png")
    monkeypatch.setattr(Image, "open", None)
    assert HistoryFolder(folder).fingerprint()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_pictures_that_are_clean_already_are_not_copied():
    image = torch.rand(20, 30, 3)
    (item,) = PreferenceHistory.from_images([image]).items
    assert item.image.data_ptr() == image.data_ptr()


def test_a_folder_gives_what_its_pictures_give_one_by_one(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (folder / "liked" / "a.png").write_bytes(buffer.getvalue())
    read = PreferenceHistory.from_folder(folder)
    assert read.digest == PreferenceHistory.from_images([torch.from_numpy(pixels) / 255]).digest


def test_a_folder_that_may_not_be_opened_is_told(folder, monkeypatch, one_sentence):
    put(folder / "liked" / "1.png")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError) as raised:
        PreferenceHistory.from_folder(folder)
    assert "can't be opened (permission denied): let ComfyUI read it" in one_sentence(raised)


def test_a_prompt_that_may_not_be_read_is_told_and_the_picture_counts(folder, monkeypatch, caplog):
    put(folder / "liked" / "1.png")
    (folder / "liked" / "1.txt").write_text("a boat")
    plain = Path.read_bytes
    denied = PermissionError(errno.EACCES, "Permission denied")

    def read_bytes(path):
        if path.suffix == ".txt":
            raise denied
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    history = PreferenceHistory.from_folder(folder)
    assert [item.prompt for item in history.liked] == [""]
    assert "PrefGen can't read the prompt 1.txt (Permission denied)." in caplog.messages
