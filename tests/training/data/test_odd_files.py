"""What real disks hold: hidden files beside shards, text that isn't UTF-8, paths full of signs, files of Notepad."""

import codecs
import json
import shutil
import subprocess
import sys
from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training import pickapic_tables as planted
from tests.training.commands import ROOT, content
from training.common.config.command import ConfigError, load
from training.data import duck
from training.data.agents import vocabulary
from training.data.agents.make import Population
from training.data.agents.make import make as make_agents
from training.data.agents.renderers import Atelier
from training.data.check import check
from training.data.errors import DataError
from training.data.pickapic import rules
from training.data.pickapic.__main__ import words
from training.data.pickapic.make import make
from training.data.pickapic.source import find
from training.data.worlds import DataSetWorld
from training.evaluation.study import pictures as study_pictures

LIMITS = rules.Limits(min_liked=2, min_disliked=2, heldout=1)
SIGNS = ["what? a*b [v2]", "it's #1 of 100% grün 猫", "user=3", "a::b {a,b}"]


def make_set(source, folder, limits=LIMITS):
    make(find(str(source), "**/*.parquet", 1 << 20), folder, limits, unit_mb=1, processes=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickapic") / "source"
    return planted.write(planted.generate(1500, seed=4), folder, files=2, row_group=500)


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "set"
    make_set(source, folder)
    return folder


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agents") / "set"
    make_agents(Population(20, 120, 3, 10, Atelier(32), None), folder, processes=1)
    return folder


def litter(folder):
    """What macOS, Windows and Jupyter leave."""
    for name in ("._train.parquet", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/train.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7 no parquet")
    for path in list(folder.rglob("*.parquet")):
        if not path.name.startswith("."):
            twin = folder / "__MACOSX" / path.relative_to(folder).with_name("._" + path.name)
            twin.parent.mkdir(parents=True, exist_ok=True)
            twin.write_bytes(b"\0\5\x16\7")
            path.with_name("._" + path.name).write_bytes(b"\0\5\x16\7")
    (folder / "__MACOSX" / "copy.parquet").write_bytes(b"no parquet")


def failures(folder):
    return {name: faults for name, faults in check(folder) if faults and name != "balance"}


# Hidden files


def test_hidden_files_beside_pick_a_pics_shards_change_nothing(source, plain, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    litter(tmp_path / "source")
    make_set(tmp_path / "source", tmp_path / "set")
    assert content(tmp_path / "set") == content(plain)


def test_a_source_of_hidden_files_alone_has_no_file(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "._train.parquet").write_bytes(b"\0\5\x16\7")
    with pytest.raises(DataError, match="has no file"):
        make_set(tmp_path / "source", tmp_path / "set")


def test_hidden_files_in_a_finished_set_are_no_fault_and_no_shard(agents, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(agents, folder)
    litter(folder)
    litter(folder / "pictures")
    assert failures(folder) == {}
    world = DataSetWorld(folder)
    assert len(world.pictures([0, len(world.owner) - 1])) == 2


def test_a_set_is_made_in_a_folder_that_finder_has_looked_into(agents, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / ".DS_Store").write_bytes(b"Bud1")
    make_agents(Population(20, 120, 3, 10, Atelier(32), None), folder, processes=1)
    digests = {name: digest for name, digest in content(folder).items() if name != ".DS_Store"}
    assert digests == content(agents)


def test_hidden_configurations_are_not_offered(tmp_path, monkeypatch):
    from training.common.config import command

    (tmp_path / "mine.yaml").write_text("hardware: a test\n")
    (tmp_path / "._mine.yaml").write_bytes(b"\0\5\x16\7")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="name one of mine, or a YAML file"):
        load("yours")


# Text that isn't UTF-8, and other damage


def spoil(path, column, rows):
    """Put bytes that aren't UTF-8 into a text column, as a careless writer does."""
    table = pq.read_table(path)
    raw = table[column].cast(pa.binary()).to_pylist()
    for row in rows:
        raw[row] = b"caf\xe9 " + (raw[row] or b"")
    lengths = [0 if value is None else len(value) for value in raw]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32()).buffers()[1]
    valid = pa.array([value is not None for value in raw]).buffers()[1]
    data = pa.py_buffer(b"".join(value or b"" for value in raw))
    texts = pa.Array.from_buffers(pa.string(), len(raw), [valid, offsets, data])
    pq.write_table(table.set_column(table.column_names.index(column), column, texts), path, row_group_size=500)


@pytest.mark.parametrize("column", ["caption", "image_0_uid", "image_1_uid", "best_image_uid"])
def test_a_row_whose_text_is_not_utf_8_is_dropped_and_counted_and_no_other(source, plain, tmp_path, column):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    first = sorted(folder.rglob("*.parquet"))[0]
    spoil(first, column, [3, 501, 502])
    make_set(folder, tmp_path / "set")
    dropped = pq.read_table(tmp_path / "set" / "dropped.parquet").to_pylist()
    unreadable = [(row["file"], row["row"]) for row in dropped if row["rule"] == "unreadable"]
    assert unreadable == [(f"data/{first.name}", row) for row in (3, 501, 502)]
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    rule = next(rule for rule in report["rules"] if rule["name"] == "unreadable")
    assert rule["dropped"] == 3 and "isn't UTF-8" in (tmp_path / "set" / "card.md").read_text()
    before = pq.read_table(plain / "dropped.parquet").to_pylist()
    same = Counter((row["file"], row["row"]) for row in before if row["rule"] in ("unlabelled", "tied"))
    there = Counter((row["file"], row["row"]) for row in dropped if row["rule"] in ("unlabelled", "tied"))
    assert there == same - Counter(unreadable)
    assert failures(tmp_path / "set") == {}


def test_captions_with_zeros_and_signs_of_every_plane_are_text(source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    first = sorted(folder.rglob("*.parquet"))[0]
    table = pq.read_table(first)
    captions = table["caption"].to_pylist()
    odd = ["a\0b", "\U0001f98a fox", "\ud7ff\ue000", "\u2028line", "'; DROP TABLE rows; --"]
    captions[: len(odd)] = odd
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", [captions]), first)
    make_set(folder, tmp_path / "set")
    assert failures(tmp_path / "set") == {}


def rewritten(source, folder, change):
    shutil.copytree(source, folder)
    first = sorted(folder.rglob("*.parquet"))[0]
    pq.write_table(change(pq.read_table(first)), first)
    return folder


def with_column(name, values, kind):
    def change(table):
        return table.set_column(table.column_names.index(name), name, pa.array(values(len(table)), kind))

    return change


VALUES = {
    "a user that no number of 64 bits with a sign holds": (
        with_column("user_id", lambda n: [2**63 + 1] * n, pa.uint64()),
        "has a value in the column 'user_id' that doesn't belong there",
    ),
    "labels as text": (
        with_column("label_0", lambda n: ["1.0"] * n, pa.string()),
        "has the column 'label_0' as string instead of floating-point numbers",
    ),
    "captions as bytes": (
        with_column("caption", lambda n: [b"a fox"] * n, pa.binary()),
        "has the column 'caption' as binary instead of strings",
    ),
    "pictures of one side alone": (
        lambda table: table.append_column("jpg_0", pa.array([b""] * len(table), pa.binary())),
        "lacks the column 'jpg_1'",
    ),
    "a missing column": (lambda table: table.drop_columns(["best_image_uid"]), "lacks the column 'best_image_uid'"),
}


@pytest.mark.parametrize("harm", VALUES)
def test_a_column_that_is_not_as_published_is_one_sentence_that_names_it(source, tmp_path, harm):
    change, sentence = VALUES[harm]
    with pytest.raises(DataError, match=sentence) as caught:
        make_set(rewritten(source, tmp_path / "source", change), tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(source, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def refused(self, path, *args, **options):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(LocalFileSystem, "open", refused)
    with pytest.raises(DataError, match=r"Can't read .*\.parquet in .* \(Permission denied\)") as caught:
        make_set(source, tmp_path / "set")
    assert "fetch it again" not in str(caught.value)


ERRORS = {
    duckdb.OutOfMemoryException("Out of Memory Error: could not allocate block"): "memory is full .* by --memory",
    duckdb.IOException("IO Error: Could not set lock on file: Conflicting lock is held"): "Another command works in",
    duckdb.IOException("IO Error: No space left on device"): "make room there",
    duckdb.IOException("IO Error: The file is not a valid DuckDB database file!"): "damaged .* delete it",
    duckdb.IOException("IO Error: Cannot open file: Permission denied"): "can be read and written",
    duckdb.InternalException("INTERNAL Error: something\nStack Trace:\n0x1"): "DuckDB failed in",
    duckdb.InvalidInputException("Invalid Input Error: Invalid unicode"): "values that don't belong there",
    duckdb.ConversionException("Conversion Error: Could not convert"): "values that don't belong there",
    duckdb.BinderException('Binder Error: Referenced column "split" not found'): "other columns than the layout",
    duckdb.CatalogException("Catalog Error: Table does not exist"): "other columns than the layout",
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_each_error_of_duckdb_is_one_sentence_that_says_what_helps(tmp_path, error):
    with pytest.raises(DataError, match=ERRORS[error]) as caught, duck.explained(tmp_path, "--memory"):
        raise error
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) or "memory" in str(caught.value)


def test_a_set_whose_index_lacks_a_column_or_is_cut_is_one_sentence_for_the_questions(agents, tmp_path):
    from training.data.vqa.make import make as make_questions

    for number, harm in enumerate(("lacks", "cut")):
        folder = tmp_path / harm
        shutil.copytree(agents, folder)
        index = folder / "index.parquet"
        if harm == "lacks":
            pq.write_table(pq.read_table(index).drop_columns(["split"]), index)
        else:
            index.write_bytes(index.read_bytes()[:-50])
        with pytest.raises(DataError, match=f"{harm}") as caught:
            make_questions(folder, tmp_path / f"questions-{number}", 2, 0)
        assert "\n" not in str(caught.value)


# Paths


@pytest.mark.parametrize("sign", SIGNS)
def test_a_source_is_read_from_a_path_with_signs_in_it(source, plain, tmp_path, sign):
    shutil.copytree(source, tmp_path / sign)
    make_set(tmp_path / sign, tmp_path / "set")
    assert content(tmp_path / "set") == content(plain)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_set_is_made_checked_and_read_in_a_path_with_signs_in_it(source, plain, tmp_path, sign):
    folder = tmp_path / sign / "set"
    if "?" in sign:
        with pytest.raises(DataError, match=r"can't work below a folder with \? in its name: name another folder"):
            make_set(source, folder)
        shutil.copytree(plain, folder)  # it may be moved there
    else:
        make_set(source, folder)
    assert content(folder) == content(plain)
    assert failures(folder) == {}
    assert DataSetWorld(folder).users("train", 3)


def test_pictures_of_a_set_in_a_path_with_signs_are_judged_from_files_of_their_own_names(tmp_path):
    tables = planted.generate(300, seed=1, images=True)
    data = planted.write(tables, tmp_path / "source", images=True, files=1, row_group=64)
    for folder in (tmp_path / "plain", tmp_path / "user=3 [a]*"):
        make_set(data, folder)
    assert content(tmp_path / "plain") == content(tmp_path / "user=3 [a]*")


@pytest.mark.parametrize("sign", ["user=3", "split=test", "what? [a]*"])
def test_a_folder_that_is_named_like_a_column_takes_no_columns_place(agents, tmp_path, sign):
    from training.data.vqa.make import users

    folder = tmp_path / sign / "set"
    shutil.copytree(agents, folder)
    assert failures(folder) == {}
    assert list(users(folder, "train")) == list(users(agents, "train")) != []


# Text files


NOTEPAD = {"UTF-8": codecs.BOM_UTF8, "UTF-16": codecs.BOM_UTF16_LE}


def notepad(path, text, kind):
    path.write_bytes(NOTEPAD[kind] + text.replace("\n", "\r\n").encode({"UTF-8": "utf-8", "UTF-16": "utf-16-le"}[kind]))
    return path


@pytest.mark.parametrize("kind", NOTEPAD)
def test_a_word_list_of_notepad_drops_as_many_rows_as_any_other(source, tmp_path, kind):
    dropped = {}
    for name in ("plain", kind):
        file = tmp_path / f"{name}.txt"
        text = f"{planted.WORD}\n# a remark\nnaïve\n"
        file.write_text(text, encoding="utf-8") if name == "plain" else notepad(file, text, kind)
        listed = words(file)
        assert listed == tuple(sorted((planted.WORD, "naïve")))
        make_set(source, tmp_path / name, rules.Limits(2, 2, 1, nsfw_words=listed))
        report = json.loads((tmp_path / name / "report.json").read_text())
        dropped[name] = next(rule["dropped"] for rule in report["rules"] if rule["name"] == "word list")
    assert dropped[kind] == dropped["plain"] > 0


def test_a_word_that_ends_in_a_sign_is_found(source, tmp_path):
    path = tmp_path / "source"
    shutil.copytree(source, path)
    first = sorted(path.rglob("*.parquet"))[0]
    table = pq.read_table(first)
    captions = table["caption"].to_pylist()
    captions[0] = captions[1] = "written in C++, alone"
    captions[2] = "c++11 is another word"
    pq.write_table(table.set_column(table.column_names.index("caption"), "caption", [captions]), first)
    make_set(path, tmp_path / "set", rules.Limits(2, 2, 1, nsfw_words=("C++",)))
    dropped = pq.read_table(tmp_path / "set" / "dropped.parquet").to_pylist()
    assert {row["row"] for row in dropped if row["rule"] == "word list"} <= {0, 1}
    assert any(row["rule"] == "word list" for row in dropped)


def test_a_word_list_in_another_encoding_or_without_words_is_one_sentence(tmp_path):
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt isn't UTF-8 text: .* save it as UTF-8"):
        words(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(DataError, match="empty.txt holds no word"):
        words(tmp_path / "empty.txt")


@pytest.mark.parametrize("kind", NOTEPAD)
def test_a_configuration_of_notepad_is_read(tmp_path, kind):
    text = (ROOT / "training/configs/sd15_12gb.yaml").read_text(encoding="utf-8")
    assert load(notepad(tmp_path / "mine.yaml", text, kind)) == load("sd15_12gb")


def test_a_configuration_that_is_no_text_or_no_file_is_one_sentence(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("hardware: größe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin.yaml isn't UTF-8 text: .* save it as UTF-8"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="Can't read the configuration .*folder.yaml") as caught:
        load(tmp_path / "folder.yaml")
    assert "There is no configuration" not in str(caught.value)


@pytest.mark.parametrize("kind", NOTEPAD)
def test_a_vocabulary_of_notepad_is_the_same_vocabulary(tmp_path, kind):
    text = vocabulary.REAL_WORLD.read_text(encoding="utf-8")
    assert vocabulary.load(notepad(tmp_path / "mine.json", text, kind)).digest == vocabulary.load().digest


def test_a_vocabulary_in_another_encoding_is_one_sentence(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"name": "größe"}'.encode("latin-1"))
    with pytest.raises(DataError, match="latin.json isn't UTF-8 text: .* save it as UTF-8"):
        vocabulary.load(tmp_path / "latin.json")


@pytest.mark.parametrize("kind", NOTEPAD)
def test_a_studys_table_of_notepad_is_read_and_a_line_separator_in_a_prompt_ends_no_line(tmp_path, kind):
    lines = [{"user": "ü", "verdict": "liked", "image": "a.png"}]
    lines += [{"user": "ü", "prompt": "a\u2028b\x85c", "method": m, "image": "a.png"} for m in ("one", "two")]
    (tmp_path / "a.png").touch()
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    table = study_pictures.read_table(notepad(tmp_path / "pictures.jsonl", text, kind))
    assert list(table.painted) == [("ü", "a\u2028b\x85c")] and table.methods == ["one", "two"]


def test_the_command_says_one_sentence_for_a_word_list_that_is_no_text(source, tmp_path):
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    line = [
        sys.executable,
        "-m",
        "training.data.pickapic",
        source,
        tmp_path / "set",
        "--nsfw-words",
        tmp_path / "latin.txt",
    ]
    ran = subprocess.run(list(map(str, line)), cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    assert "save it as UTF-8" in ran.stderr
