"""Export and import: whole, in order, without anybody's secrets, and no zip can do harm."""

import errno
import io
import json
import os
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from prefgen.tastes import exchange
from prefgen.tastes.exchange import export_zip, import_folder, import_zip
from prefgen.tastes.names import TasteError
from prefgen.tastes.origin import Origin
from prefgen.tastes.taste import Taste
from tests.prefgen.tastes.test_origin import XMP
from tests.prefgen.tastes.test_taste import picture, sha256, state


def empty(folder) -> Taste:
    folder.mkdir()
    return Taste(folder)


@pytest.fixture
def taste(tmp_path) -> Taste:
    taste = empty(tmp_path / "sea")
    for n in range(4):
        info = PngInfo()
        info.add_text("prompt", "SECRETGRAPH")
        out = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 40 * n, np.uint8)).save(out, "PNG", pnginfo=info)
        taste.rate(out.getvalue(), "disliked" if n % 2 else "liked", "same.png", origin=Origin(f"SECRETPROMPT {n}", n))
    return taste


def exported(taste: Taste, private: bool) -> bytes:
    out = io.BytesIO()
    assert export_zip(taste, out, private) == []
    return out.getvalue()


def zipped(files: dict[str, bytes], packed: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    out.seek(0)
    return out


def test_a_private_export_comes_back_as_the_same_revision(taste, tmp_path):
    there = empty(tmp_path / "there")
    done = import_zip(there, io.BytesIO(exported(taste, private=True)))
    assert (done.added, done.there, done.refused) == (4, 0, [])
    assert there.revision() == taste.revision() and state(there) == state(taste)
    assert [p.origin.seed for p in there.pictures()] == [0, 1, 2, 3]
    again = import_zip(there, io.BytesIO(exported(taste, private=True)))
    assert (again.added, again.there) == (0, 4) and there.revision() == taste.revision()
    there.undo()
    assert not there.pictures(), "an import is one act"


@pytest.mark.parametrize("private", [True, False])
def test_words_come_along_and_those_that_are_there_stay(taste, tmp_path, private):
    """A backup without the words that were struck out would have them back in every prompt."""
    taste.say_all([("fog", "liked", "added"), ("crowds", "disliked", "added"), ("boats", "liked", "struck")])
    there = empty(tmp_path / "there")
    there.say("Fog", "liked", "struck")
    import_zip(there, io.BytesIO(exported(taste, private)))
    words = there.words()
    assert words.state_of("fog", "liked") == "struck"
    assert words.state_of("crowds", "disliked") == "added" and words.state_of("boats", "liked") == "struck"
    there.undo()
    assert there.counts() == {"liked": 0, "disliked": 0} and there.words() == words, "first the pictures"
    there.undo()
    assert there.words().shown()["disliked"] == {"added": [], "struck": []}, "then the words, all at once"
    assert there.words().state_of("fog", "liked") == "struck"


def test_no_more_words_come_in_than_anybody_types(tmp_path):
    there = empty(tmp_path / "there")
    words = {"liked": {"added": [f"word {n}" for n in range(exchange.MAX_WORDS + 1)]}}
    manifest = json.dumps({"pictures": [], "words": words}).encode()
    import_zip(there, zipped({"a/liked/x.png": picture(1), "a/taste.json": manifest}))
    assert len(there.words().shown()["liked"]["added"]) == exchange.MAX_WORDS


@pytest.mark.parametrize(
    "words",
    [7, [], {"liked": 7}, {"liked": {"added": 7}}, {"liked": {"added": [7, None, "", "a" * 1000, {}]}, "odd": {}}],
)
def test_odd_words_in_a_manifest_stop_nothing(tmp_path, words):
    there = empty(tmp_path / "there")
    manifest = json.dumps({"pictures": [], "words": words}).encode()
    done = import_zip(there, zipped({"a/liked/x.png": picture(1), "a/taste.json": manifest}))
    assert done.added == 1 and there.words().shown()["liked"] == {"added": [], "struck": []}


def test_an_export_holds_no_prompt_and_no_metadata_unless_asked(taste, tmp_path):
    data = exported(taste, private=False)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
        dates = {entry.date_time for entry in archive.infolist()}
    assert b"SECRET" not in contents and b"SECRET" not in data and dates == {(1980, 1, 1, 0, 0, 0)}
    there = empty(tmp_path / "there")
    import_zip(there, io.BytesIO(data))
    assert [verdict for _, verdict in state(there)] == [verdict for _, verdict in state(taste)]


def test_a_picture_that_cannot_be_read_is_named_and_the_rest_is_exported(taste):
    (taste.folder / "liked" / "broken.png").write_bytes(b"not a picture")
    out = io.BytesIO()
    left_out = export_zip(taste, out)
    assert [name for name, _ in left_out] == ["broken.png"] and left_out[0][1]
    with zipfile.ZipFile(out) as archive:
        assert len(archive.namelist()) == 5


def test_a_zip_of_somebody_elses_is_sorted_by_its_folders(tmp_path):
    files = {
        "Fotos/Liked/b.png": picture(1),
        "Fotos\\disliked\\a.png": picture(2),
        "__MACOSX/liked/._b.png": b"fork",
        "liked/.hidden.png": picture(3),
        "liked/notes.txt": b"notes",
        "elsewhere/c.png": picture(4),
    }
    there = empty(tmp_path / "there")
    done = import_zip(there, zipped(files))
    assert done.added == 2 and not done.refused
    assert dict(state(there)) == {sha256(picture(1)): "liked", sha256(picture(2)): "disliked"}


def test_text_files_in_a_zip_are_prompts_of_the_pictures_beside_them(tmp_path):
    graph = PngInfo()
    graph.add_text("parameters", "another prompt\nSteps: 5, Seed: 7, Model: x")
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=graph)
    files = {
        "liked/a.png": picture(1),
        "liked/a.txt": "a red\n boat".encode("utf-16"),
        "other/a.txt": b"of another picture",
        "disliked\\b.PNG": out.getvalue(),
        "disliked\\b.TXT": b"a blue boat",
        "disliked/c.png": picture(3),
    }
    there = empty(tmp_path / "there")
    assert import_zip(there, zipped(files)).added == 3
    shown = {p.name: (there.prompt_of(p), p.origin.seed) for p in there.pictures()}
    assert shown == {"a.png": ("a red boat", None), "b.png": ("a blue boat", 7), "c.png": ("", None)}


def test_a_damaged_text_file_leaves_its_picture(tmp_path):
    data = bytearray(zipped({"liked/a.txt": b"a boat" * 40, "liked/a.png": picture(1)}, zipfile.ZIP_STORED).getvalue())
    place = data.index(b"a boat")
    data[place : place + 6] = b"a goat"
    there = empty(tmp_path / "there")
    assert import_zip(there, io.BytesIO(data)).added == 1 and there.prompt_of(there.pictures()[0]) == ""


def test_what_a_manifest_says_of_a_picture_goes_before_its_own_words_and_silence_does_not(tmp_path):
    graph = PngInfo()
    graph.add_text("parameters", "its own\nSteps: 5, Seed: 7, Model: x")
    said: list[dict] = [{}, {"prompt": "told"}, {"seed": 3}, {"model": "sdxl"}]
    rows = [{"file": f"liked/{n}.png", "verdict": "liked"} | row for n, row in enumerate(said)]
    files = {"sea/taste.json": json.dumps({"pictures": rows}).encode()}
    files |= {f"sea/liked/{n}.png": picture(n, pnginfo=graph) for n in range(4)}
    there = empty(tmp_path / "there")
    assert import_zip(there, zipped(files)).added == 4
    origins = [picture.origin for picture in there.pictures()]
    assert origins == [Origin("its own", 7, "x"), Origin("told"), Origin(seed=3), Origin(model="sdxl")]


HALF = "a \ud800 boat"  # JSON may hold half a letter; no file, zip or answer can


def test_half_a_letter_in_a_manifest_stops_nothing(tmp_path):
    row = {"file": "liked/a.png", "verdict": "liked", "prompt": HALF, "model": HALF}
    files = {"sea/taste.json": json.dumps({"pictures": [row]}).encode(), "sea/liked/a.png": picture(1)}
    there = empty(tmp_path / "there")
    assert import_zip(there, zipped(files)).added == 1
    [shown] = there.pictures()
    assert there.prompt_of(shown) == "a ? boat" and shown.origin.model == "a ? boat"
    assert exported(there, private=True)


@pytest.mark.skipif(sys.platform != "linux", reason="this system takes names that are text alone")
def test_a_taste_and_pictures_whose_names_are_no_text_can_be_moved_and_exported(tmp_path):
    there = empty(tmp_path / os.fsdecode(b"caf\xe9"))
    (there.folder / "liked").mkdir()
    (there.folder / "liked" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(1))
    assert there.place([sha256(picture(1))], "disliked").events and state(there) == [(sha256(picture(1)), "disliked")]
    again = empty(tmp_path / "again")
    assert import_zip(again, io.BytesIO(exported(there, private=True))).added == 1
    assert there.keep_revision() and there.undo().events


@pytest.mark.parametrize(
    "name", ["../../liked/out.png", "/liked/out.png", "C:\\liked\\out.png", "liked/../../../out.png"]
)
def test_nothing_is_written_outside_the_taste(tmp_path, name):
    there = empty(tmp_path / "deep")
    before = {path for path in tmp_path.rglob("*") if "deep" not in path.parts}
    if ".." in name:
        with pytest.raises(TasteError, match="no pictures in folders"):
            import_zip(there, zipped({name: picture(1)}))
        return
    import_zip(there, zipped({name: picture(1)}))
    assert {path for path in tmp_path.rglob("*") if "deep" not in path.parts} == before
    assert [p.path.parent.name for p in there.pictures()] == ["liked"]


def test_a_link_in_a_zip_is_no_picture(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("liked/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("liked/real.png", picture(1))
    out.seek(0)
    there = empty(tmp_path / "there")
    done = import_zip(there, out)
    assert done.added == 1 and [name for name, _ in done.refused] == ["link.png"]


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_entry_is_named_and_the_others_are_taken(tmp_path, packed):
    data = bytearray(zipped({"liked/damaged.png": picture(1), "liked/sound.png": picture(2)}, packed).getvalue())
    # The entry's bytes lie behind its header of 30 bytes and its name.
    start = 30 + len("liked/damaged.png")
    data[start : start + 40] = bytes(byte ^ 0xFF for byte in data[start : start + 40])
    done = import_zip(empty(tmp_path / "there"), io.BytesIO(data))
    assert done.added == 1 and [name for name, _ in done.refused] == ["damaged.png"]
    assert "damaged or locked in the zip" in done.refused[0][1]


def test_a_bomb_is_refused_before_it_unfolds(tmp_path, monkeypatch, one_sentence):
    monkeypatch.setattr(exchange, "MAX_BYTES", 10_000)
    there = empty(tmp_path / "there")
    done = import_zip(there, zipped({"liked/bomb.png": b"\0" * 5_000_000, "liked/real.png": picture(1)}))
    assert done.added == 1 and "MB: shrink it first" in done.refused[0][1]
    monkeypatch.setattr(exchange, "MAX_TOTAL", 1_000_000)
    with pytest.raises(TasteError) as raised:
        import_zip(there, zipped({"liked/bomb.png": b"\0" * 5_000_000}))
    assert "import it in parts" in one_sentence(raised)
    monkeypatch.setattr(exchange, "MAX_FILES", 2)
    with pytest.raises(TasteError, match="more than 2 files"):
        import_zip(there, zipped({f"liked/{n}.png": b"" for n in range(3)}))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 nonsense", picture(1)])
def test_what_is_no_zip_is_refused(tmp_path, data, one_sentence):
    with pytest.raises(TasteError) as raised:
        import_zip(empty(tmp_path / "there"), io.BytesIO(data))
    assert "isn't a zip file" in one_sentence(raised)


def test_a_zip_without_verdicts_is_refused(tmp_path):
    with pytest.raises(TasteError, match="folders called liked or disliked"):
        import_zip(empty(tmp_path / "there"), zipped({"a.png": picture(1)}))


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b'{"pictures": 5}', b'{"pictures": [{"file": 5}]}', b"\xff", b"[" * 50_000,
     json.dumps({"pictures": [{"file": "liked/a.png", "prompt": 5, "seed": "x", "model": []}]}).encode()],
)  # fmt: skip
def test_an_odd_manifest_stops_nothing(tmp_path, manifest):
    there = empty(tmp_path / "there")
    assert import_zip(there, zipped({"x/taste.json": manifest, "x/liked/a.png": picture(1)})).added == 1


def test_a_locked_or_damaged_entry_is_named(tmp_path):
    data = bytearray(zipped({"liked/a.png": picture(1), "liked/b.png": picture(2)}).getvalue())
    place = data.find(b"liked/a.png") + len("liked/a.png") + 4
    data[place] ^= 0xFF
    done = import_zip(empty(tmp_path / "there"), io.BytesIO(bytes(data)))
    assert done.added == 1 and [name for name, _ in done.refused] == ["a.png"]


def test_a_folder_comes_in_by_its_sub_folders_its_stars_or_one_verdict(tmp_path):
    source = tmp_path / "source"
    (source / "deep" / "Disliked").mkdir(parents=True)
    (source / "deep" / "Disliked" / "a.png").write_bytes(picture(1))
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(source / "five.jpg", xmp=XMP % 5)
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(source / "three.jpg", xmp=XMP % 3)
    (source / "five.txt").write_text("a prompt")
    there = empty(tmp_path / "there")
    assert import_folder(there, source).added == 2
    shown = {p.path.name: (p.verdict, there.prompt_of(p)) for p in there.pictures()}
    assert shown == {"a.png": ("disliked", ""), "five.jpg": ("liked", "a prompt")}
    assert os.path.exists(source / "five.jpg"), "the folder stays as it is"
    assert import_folder(empty(tmp_path / "all"), source, "liked").added == 3
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TasteError, match="no pictures with a verdict"):
        import_folder(there, tmp_path / "nothing")


def test_links_to_nowhere_and_odd_stars_in_a_folder_stop_nothing(tmp_path):
    source = tmp_path / "source"
    (source / "liked").mkdir(parents=True)
    (source / "liked" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (source / "liked" / "here.png").write_bytes(picture(1))
    (source / "starred.png").write_bytes(picture(2))
    (source / "starred.xmp").write_text('<x xmp:Rating="%s"/>' % ("9" * 400))
    there = empty(tmp_path / "there")
    done = import_folder(there, source)
    assert done.added == 2 and [name for name, _ in done.refused] == ["gone.png"]


def test_a_sidecar_that_may_not_be_read_is_named_and_the_rest_comes_in(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for n in (1, 2):
        (source / f"{n}.png").write_bytes(picture(n))

    def stars(path):
        if path.name == "1.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return 5

    monkeypatch.setattr(exchange, "stars_of", stars)
    done = import_folder(empty(tmp_path / "there"), source)
    assert done.added == 1 and done.refused == [("1.png", "permission denied")]


def test_what_the_system_does_not_hand_out_is_told_without_its_path(taste, tmp_path, monkeypatch):
    """The sentence goes to a browser."""

    plain = Path.read_bytes

    def refuse(path):
        if path.suffix == ".png":
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return plain(path)

    source = tmp_path / "source"
    (source / "liked").mkdir(parents=True)
    (source / "liked" / "a.png").write_bytes(picture(1))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    left_out = export_zip(taste, io.BytesIO())
    assert len(left_out) == 4 and {reason for _, reason in left_out} == {"permission denied"}
    assert import_folder(taste, source).refused == [("a.png", "permission denied")]


def test_a_large_file_of_a_folder_is_named_and_the_others_come_in(taste, tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "liked").mkdir(parents=True)
    (source / "liked" / "a.png").write_bytes(picture(1))
    (source / "liked" / "b.png").write_bytes(picture(2) + bytes(1 << 20))
    monkeypatch.setattr(exchange, "MAX_BYTES", 1 << 20)
    done = import_folder(taste, source)
    assert done.added == 1 and done.refused == [("b.png", "more than 1 MB")]


def test_an_import_says_how_far_it_is(tmp_path):
    files = {f"liked/{n}.png": picture(n) for n in range(3)}
    seen = []
    import_zip(empty(tmp_path / "there"), zipped(files), lambda *far: seen.append(far))
    assert seen == [(1, 3), (2, 3), (3, 3)]
