"""Files that people and their systems leave: hidden ones are passed over, text is read in whatever editors save."""

import codecs
import os
from types import SimpleNamespace

import pytest

from prefgen.errors import MendableError
from prefgen.files import atomic_file, is_hidden, read_text, visible_files, write_atomic

HIDDEN = [
    "._photo.jpg",
    ".DS_Store",
    ".ipynb_checkpoints",
    ".hidden.png",
    "Thumbs.db",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "Desktop.ini",
    "Icon\r",
    "__MACOSX",
    "@eaDir",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_system_leaves_in_a_folder_is_hidden(tmp_path, name):
    (tmp_path / name).touch()
    assert is_hidden(tmp_path / name)


@pytest.mark.parametrize("name", ["photo.jpg", "_photo.jpg", "train.parquet", "a.b", "Icon", "thumbs.db.jpg", "…"])
def test_a_persons_file_is_not_hidden_whatever_folder_it_lies_in(tmp_path, name):
    folder = tmp_path / ".cache"
    folder.mkdir()
    (folder / name).touch()
    assert not is_hidden(folder / name)


def test_a_link_without_its_target_and_a_missing_file_are_asked_by_their_names_alone(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert not is_hidden(tmp_path / "gone.jpg") and not is_hidden(tmp_path / "missing.jpg")


def test_windows_hidden_attribute_counts_where_there_is_one(tmp_path, monkeypatch):
    from prefgen import files

    attributes = {"seen.jpg": 0x20, "unseen.jpg": 0x22, "system.jpg": 0x04}

    class Path(type(tmp_path)):
        def stat(self):
            return SimpleNamespace(st_file_attributes=attributes[self.name])

    monkeypatch.setattr(files, "Path", Path)
    monkeypatch.setattr(files.os, "stat_result", SimpleNamespace(st_file_attributes=0))
    assert [is_hidden(tmp_path / name) for name in attributes] == [False, True, True]


def test_files_below_a_hidden_folder_are_not_listed_but_the_folder_itself_may_be_hidden(tmp_path):
    root = tmp_path / ".models"
    hidden = ("._a.txt", "__MACOSX/deep/._b.txt", "__MACOSX/c.txt", ".ipynb_checkpoints/a.txt")
    for name in ("a.txt", "deep/b.txt", *hidden):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "folder.txt").mkdir()
    assert visible_files(root, "**/*.txt") == [root / "a.txt", root / "deep/b.txt"]
    assert visible_files(root, "*.txt") == [root / "a.txt"]
    assert visible_files(root / "missing", "*.txt") == []


ENCODED = {
    "plain": "grün\nblau\n".encode(),
    "UTF-8 of Notepad": codecs.BOM_UTF8 + "grün\r\nblau\r\n".encode(),
    "UTF-16 of Notepad": codecs.BOM_UTF16_LE + "grün\r\nblau\r\n".encode("utf-16-le"),
    "UTF-16, big end first": codecs.BOM_UTF16_BE + "grün\nblau\n".encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + "grün\nblau\n".encode("utf-32-le"),
    "ends of lines of old": "grün\rblau\r".encode(),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_text_reads_alike_in_every_encoding_that_says_what_it_is(tmp_path, kind):
    file = tmp_path / "words.txt"
    file.write_bytes(ENCODED[kind])
    assert read_text(file) == "grün\nblau\n"


@pytest.mark.parametrize(
    "data", ["grün".encode("latin-1"), "grau".encode("utf-16-le"), codecs.BOM_UTF16_LE + b"a", os.urandom(999)]
)
def test_other_text_is_refused_in_one_sentence_that_names_the_file(tmp_path, data):
    file = tmp_path / "words.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="words.txt isn't UTF-8 text: .* save it as UTF-8") as caught:
        read_text(file)
    assert isinstance(caught.value, MendableError) and len(str(caught.value).splitlines()) == 1


def test_an_empty_file_is_empty_text_and_a_missing_one_stays_the_systems_error(tmp_path):
    (tmp_path / "empty.txt").touch()
    assert read_text(tmp_path / "empty.txt") == ""
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "missing.txt")


def test_a_file_that_is_not_written_to_its_end_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "array.npy"
    write_atomic(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError), atomic_file(path) as file:
            file.write(bytes(99_000))
            # In memory when the limit is met: it can't be written when the file is closed either.
            file.write(bytes(5000))
            file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
