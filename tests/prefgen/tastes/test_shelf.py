"""Tastes side by side: names that work on every system, copies that go on apart, and forgetting for good."""

import errno
import os

import pytest

from prefgen.tastes.names import TasteError, checked_name, file_name
from prefgen.tastes.shelf import Shelf
from prefgen.tastes.taste import Taste
from tests.prefgen.tastes.test_taste import picture, sha256, state


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / "input" / "prefgen")


BAD_NAMES = [
    "",
    "   ",
    ".hidden",
    "dot.",
    "a/b",
    "a\\b",
    "..",
    "CON",
    "nul.txt",
    "com1",
    "LPT9.png",
    "a@1a2b3c4d",
    "x" * 81,
]
BAD_NAMES += ["a\0b", "a\nb", "what?", 'say "hi"', "a:b", "a|b", "<a>", "COM¹"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_some_system_cannot_hold_is_refused_in_one_sentence(shelf, name, one_sentence):
    with pytest.raises(TasteError) as raised:
        shelf.new(name)
    one_sentence(raised)
    assert shelf.names() == []


@pytest.mark.parametrize("name", ["sea", "My Taste 2", "Ünïcøde 海", "console", "a.b", "-x", "100%"])
def test_ordinary_names_are_taken_as_they_are(shelf, name):
    assert shelf.new(name).name == name and shelf.names() == [name]


@pytest.mark.parametrize("name", ["none", "None", "auto", " AUTO "])
def test_a_name_that_means_something_else_in_a_combo_is_refused(shelf, name, one_sentence):
    shelf.new("sea")
    for act in (lambda: shelf.new(name), lambda: shelf.copy("sea", name), lambda: shelf.rename("sea", name)):
        with pytest.raises(TasteError) as raised:
            act()
        assert "for something else: choose another name" in one_sentence(raised)
    assert shelf.names() == ["sea"] and os.listdir(shelf.folder) == ["sea"]


def test_names_that_differ_by_case_or_accents_alone_are_one(shelf):
    shelf.new("Sea")
    for same in ("sea", "SEA", " Sea "):
        with pytest.raises(TasteError, match="a taste called .* already"):
            shelf.new(same)
    shelf.new("é")
    with pytest.raises(TasteError, match="already"):
        shelf.new("e\u0301")
    assert checked_name("e\u0301") == "é"


def test_names_are_looked_up_and_never_joined_to_a_path(shelf, tmp_path):
    shelf.new("sea")
    (tmp_path / "input" / "secret").mkdir()
    (shelf.folder / ".trash").mkdir()
    for name in ("../secret", str(tmp_path), ".trash", "Sea", "sea/", "", "."):
        with pytest.raises(TasteError, match="no taste called"):
            shelf.taste(name)


def test_tastes_are_listed_whatever_their_case_without_what_is_hidden(shelf):
    assert shelf.names() == []
    for name in ("b", "A", "c"):
        shelf.new(name)
    (shelf.folder / ".DS_Store").mkdir()
    (shelf.folder / "a file").write_text("")
    assert shelf.names() == ["A", "b", "c"]


def test_a_copy_has_all_that_the_taste_had_and_goes_on_apart(shelf):
    source = shelf.new("sea")
    for n in range(3):
        source.rate(picture(n), "liked", f"{n}.png")
    source.place([sha256(picture(0))], "")
    revision = source.keep_revision()
    copy = shelf.copy("sea", "sea again")
    assert copy.revision() == revision and copy.frozen(revision)
    copy.undo()
    assert len(copy.pictures()) == 3 and len(source.pictures()) == 2
    assert not [name for name in os.listdir(shelf.folder) if name.startswith(".")]


def test_a_copy_that_finds_no_room_leaves_nothing(shelf, monkeypatch, one_sentence):
    shelf.new("sea").rate(picture(1), "liked")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prefgen.tastes.shelf.shutil.copytree", full)
    with pytest.raises(TasteError) as raised:
        shelf.copy("sea", "two")
    assert "the disk is full" in one_sentence(raised) and shelf.names() == ["sea"]


def test_renaming_keeps_everything_and_case_alone_is_a_new_name(shelf):
    taste = shelf.new("sea")
    taste.rate(picture(1), "liked")
    before = taste.revision()
    assert shelf.rename("sea", "Sea").revision() == before and shelf.names() == ["Sea"]
    shelf.new("other")
    with pytest.raises(TasteError, match="already"):
        shelf.rename("Sea", "OTHER")
    with pytest.raises(TasteError, match="isn't there any more"):
        Taste(taste.folder)


def test_a_forgotten_taste_leaves_no_byte_behind(shelf):
    taste = shelf.new("sea")
    taste.rate(picture(1), "liked")
    taste.thumbnail(taste.pictures()[0])
    taste.place([sha256(picture(1))], "")
    taste.keep_revision()
    (shelf.folder / ".forgotten-before").mkdir()  # of a process that was killed
    shelf.forget("sea")
    assert os.listdir(shelf.folder) == [] and shelf.names() == []


def test_two_shelves_see_the_same(shelf):
    shelf.new("sea").rate(picture(1), "liked")
    assert state(Shelf(shelf.folder).taste("sea")) == [(sha256(picture(1)), "liked")]


@pytest.mark.parametrize(
    ("wanted", "written"),
    [("boat.png", "boat.png"), ("C:\\pictures\\boat.jpeg", "boat.png"), ("aux.png", "_aux.png"), ("...", "picture.png"),
     ("a:b?.png", "a_b_.png"), ("archive.tar.gz", "archive.tar.png")],
)  # fmt: skip
def test_a_picture_gets_a_name_that_every_system_takes(wanted, written):
    assert file_name(wanted, ".png") == written
    assert file_name(wanted, ".png", [written.upper()]) == written.replace(".png", " (2).png")


def refusing(monkeypatch, name):
    """Let a function of the operating system fail, as a drive that went away does."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(name, refuse)


def test_what_the_system_refuses_is_a_sentence_and_leaves_everything(shelf, monkeypatch, one_sentence):
    shelf.new("sea").rate(picture(1), "liked", "1.png")
    refused = "can't be changed (read-only file system): close what has its files open"
    for act, function, said in (
        (lambda: shelf.new("hills"), "pathlib.Path.mkdir", refused),
        (lambda: shelf.copy("sea", "hills"), "shutil.copyfile", "Nothing was changed in sea: read-only file system."),
        (lambda: shelf.copy("sea", "hills"), "os.rename", refused),
        (lambda: shelf.rename("sea", "hills"), "os.rename", refused),
        (lambda: shelf.forget("sea"), "os.rename", refused),
    ):
        with monkeypatch.context() as changed:
            refusing(changed, function)
            with pytest.raises(TasteError) as raised:
                act()
        assert said in one_sentence(raised)
        assert shelf.names() == ["sea"] and state(shelf.taste("sea")) == [(sha256(picture(1)), "liked")]
        assert os.listdir(shelf.folder) == ["sea"], "half a copy is left"


def test_a_taste_that_another_process_made_meanwhile_is_not_taken_over(shelf, monkeypatch):
    shelf.new("sea")
    monkeypatch.setattr(shelf, "names", lambda: [])
    with pytest.raises(TasteError, match="There is a taste called sea already"):
        shelf.new("sea")
