"""What is wrong with a set is found and said in one sentence; what is sound passes."""

import errno
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prefgen.files import file_sha256
from prefgen.pictures import read_picture
from training.data import card, store
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.check import check
from training.data.errors import DataError
from training.data.schema import DISLIKED, LIKED, MIXED, PAIRS, PICTURES, TEST, TRAIN, USERS, split, user_split
from training.data.store import Store, shard_name, write_parquet

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sound"
    make(Population(24, 240, 1, 12, Atelier(16), None), folder, processes=1)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def faults(folder, pictures=False):
    return [fault for _, faults_of_part in check(folder, pictures) for fault in faults_of_part]


def seal(folder, name):
    """Enter a changed file in the manifest, so that only its content can give it away."""
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / name
    manifest["files"][name] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def rewrite(folder, name, change):
    """Replace a table by change(table), the manifest with it."""
    table = change(pq.read_table(folder / name))
    pq.write_table(table, folder / name)
    seal(folder, name)


def put(table, column, values):
    place = table.schema.get_field_index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(place).type))


def rewrite_pictures(folder, change):
    """Apply change(table) to all shards and make the index anew, as a faulty tool would have done."""
    for path in sorted((folder / "pictures").iterdir()):
        rewrite(folder, f"pictures/{path.name}", change)
    tables = []
    for number, path in enumerate(sorted((folder / "pictures").iterdir())):
        table = pq.read_table(path).drop_columns("image")
        place = {"shard": [number] * len(table), "row": range(len(table))}
        for name, values in place.items():
            table = table.append_column(name, pa.array(values, pa.int32()))
        tables.append(table)
    pq.write_table(pa.concat_tables(tables), folder / "index.parquet")
    seal(folder, "index.parquet")


def test_a_sound_set_passes_every_check(sound):
    assert [name for name, _ in check(sound, pictures=True)] == [
        "files and checksums",
        "schema",
        "index",
        "leakage",
        "held-out pairs",
        "users",
        "balance",
        "pictures",
    ]
    assert faults(sound, pictures=True) == []


def test_the_command_says_ok_or_fail_and_ends_accordingly(folder):
    line = [sys.executable, "-m", "training.data", "check", str(folder)]
    good = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout.count("ok   ") == 7
    with open(folder / "users.parquet", "r+b") as file:
        file.seek(200)
        byte = file.read(1)[0]
        file.seek(200)
        file.write(bytes([byte ^ 1]))
    bad = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1 and "FAIL files and checksums\n       users.parquet has another checksum" in bad.stdout


def test_a_changed_byte_is_found_in_every_file(folder):
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :])
        name = path.relative_to(folder)
        assert faults(folder)[0] == f"{name} has another checksum"
        path.write_bytes(data)
    assert faults(folder) == []


def test_a_truncated_file_is_found(folder):
    path = folder / shard_name(1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    assert faults(folder) == [
        f"{shard_name(1)} has {size // 2} bytes instead of {size}",
        f"{shard_name(1)} is no whole Parquet file: it was cut short or overwritten",
    ]


def test_missing_and_foreign_files_are_found(folder):
    (folder / "pairs.parquet").unlink()
    (folder / "notes.txt").write_text("mine")
    assert faults(folder) == ["pairs.parquet is missing", "notes.txt is not in the manifest"]


@pytest.mark.parametrize("name", ["users.parquet", "pairs.parquet", "index.parquet", shard_name(0)])
def test_a_missing_column_is_found(folder, name):
    rewrite(folder, name, lambda table: table.drop_columns("split"))
    assert faults(folder) == [f"{name} lacks the column 'split'"]


def test_a_column_of_another_type_is_found(folder):
    def text(table):
        return table.set_column(table.schema.get_field_index("user"), "user", table["user"].cast(pa.string()))

    rewrite(folder, shard_name(0), text)
    assert faults(folder) == [f"{shard_name(0)} has the column 'user' as string instead of int64"]


def test_a_column_too_many_is_found(folder):
    rewrite(folder, "pairs.parquet", lambda table: table.append_column("score", table["pair"]))
    assert faults(folder) == ["pairs.parquet has an unknown column 'score'"]


def test_an_index_that_lies_is_found(folder):
    rewrite(folder, "index.parquet", lambda table: put(table, "prompt", table["prompt"].to_pylist()[::-1]))
    assert f"the index says other things about the pictures of {Path(shard_name(0)).name} than the shard" in faults(
        folder
    )
    rewrite(folder, "index.parquet", lambda table: table.slice(1))
    assert any("the index lists 119 or not each once" in fault for fault in faults(folder))


def test_a_user_in_train_and_test_is_found(folder):
    def leak(table):
        rows = table.select(["user", "item", "split"]).to_pylist()
        return put(table, "split", [TEST if r["user"] == 3 and r["item"] == 0 else r["split"] for r in rows])

    assert user_split(3) == TRAIN
    rewrite_pictures(folder, leak)
    sentences = faults(folder)
    assert "1 users are in train and in test" in sentences
    assert "1 pictures are in another split than their user in users.parquet" in sentences


def test_a_prompt_in_train_and_test_is_found_however_it_is_spelled(folder):
    index = pq.read_table(folder / "index.parquet")
    theirs = index.filter(pc.equal(index["split"], TEST))["prompt"][0].as_py()

    def leak(table):
        rows = table.select(["user", "item", "prompt"]).to_pylist()
        spelled = theirs.upper().replace(" ", "  ")
        return put(table, "prompt", [spelled if (r["user"], r["item"]) == (3, 0) else r["prompt"] for r in rows])

    rewrite_pictures(folder, leak)
    assert faults(folder) == [f"1 prompts are in train and in test, such as {theirs!r}"]


def test_pairs_that_do_not_fit_their_pictures_are_found(folder):
    rewrite(
        folder,
        "pairs.parquet",
        lambda t: t.rename_columns({"liked": "disliked", "disliked": "liked"}).select(PAIRS.names),
    )
    sentences = faults(folder)
    assert "24 pairs name a liked picture that is missing, not held out, of another split or verdict" in sentences
    rewrite(folder, "pairs.parquet", lambda table: table.slice(2))
    assert "4 pictures are held out and in no pair" in faults(folder)


def test_users_who_are_counted_wrongly_are_found(folder):
    rewrite(folder, "users.parquet", lambda table: put(table, "liked", [n + 1 for n in table["liked"].to_pylist()]))
    assert faults(folder) == ["24 users have other numbers of pictures than users.parquet says"]


def test_a_set_out_of_balance_is_found(folder):
    def all_liked(table):
        heldout = table["heldout"].to_pylist()
        return put(
            table, "verdict", [v if h else LIKED for v, h in zip(table["verdict"].to_pylist(), heldout, strict=True)]
        )

    rewrite_pictures(folder, all_liked)
    rewrite(folder, "users.parquet", lambda t: put(put(t, "liked", [8] * 24), "disliked", [0] * 24))
    assert [fault.split(":")[0] for fault in faults(folder)] == [
        "100% of the histories' pictures are liked",
        "24 users like everything or nothing",
    ]


def test_a_picture_that_can_not_be_decoded_is_named(folder):
    def damage(table):
        images = table["image"].to_pylist()
        return put(table, "image", [images[0][:60], *images[1:]])

    rewrite(folder, shard_name(1), damage)
    assert faults(folder) == []
    (fault,) = faults(folder, pictures=True)
    assert fault.startswith("pictures-00001.parquet: the picture of row 0 can't be decoded")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_that_is_no_finished_set_is_explained(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="is no data set" if content is None else "is damaged"):
        list(check(tmp_path))


def real_set(folder, images=True):
    """A set of real people: no tastes, attributes or seeds; pictures are shared, and perhaps not published."""
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "teal").save(file, "JPEG")
    rows, pairs, users = [], [], []
    for user in (3, 17, 40):
        for item in range(6):
            prompt = f"prompt {item // 2}"
            rows.append(
                {
                    "image": file.getvalue() if images else None,
                    "picture": f"uid-{item}",
                    "user": user,
                    "item": item,
                    "verdict": (LIKED, DISLIKED)[item % 2],
                    "prompt": prompt,
                    "attributes": [],
                    "split": split(user_split(user), TRAIN),
                    "heldout": item >= 4,
                    "seed": None,
                }
            )
        names = {"prompt": "prompt 2", "liked": "uid-4", "disliked": "uid-5"}
        pairs.append({"user": user, "pair": 0, "split": split(user_split(user), TRAIN)} | names)
        numbers = {"liked": 2, "disliked": 2, "pairs": 1, "tastes": [], "dislikes": []}
        users.append({"user": user, "split": user_split(user)} | numbers)
    real = Store(folder, {"kind": "pickapic"})
    real.write(shard_name(0), PICTURES, [pa.Table.from_pylist(rows, PICTURES)])
    real.write("users.parquet", USERS, [pa.Table.from_pylist(users, USERS)])
    real.write("pairs.parquet", PAIRS, [pa.Table.from_pylist(pairs, PAIRS)])
    real.write_bytes(
        "report.json", json.dumps({"rules": [{"rule": "tied", "unit": "rows", "dropped": 12345}]}).encode()
    )
    real.write_index()
    card.write(real)
    real.seal(card.versions())


@pytest.mark.parametrize("images", [True, False])
def test_sets_of_real_people_are_checked_and_described_too(tmp_path, images):
    real_set(tmp_path / "set", images)
    assert faults(tmp_path / "set", pictures=True) == []
    text = (tmp_path / "set/card.md").read_text()
    assert "| tied | rows | 12,345 |" in text and "don't try to learn who they are" in text
    assert "3 users, 18 pictures, 3 prompts, 3 held-out pairs" in text
    assert ("contact_sheet" in text) == images == (tmp_path / "set/card/contact_sheet.jpg").exists()
    Image.open(tmp_path / "set/card/histograms.png").load()


def test_the_card_says_what_is_in_the_set(sound):
    text = (sound / "card.md").read_text()
    for part in ("Splits", "How it was made", "Histograms", "Configuration", "Licence notes", "How to cite"):
        assert f"## {part}" in text
    splits = duckdb.sql(f"SELECT split, count(*) FROM '{sound / 'index.parquet'}' GROUP BY split").fetchall()
    for name, pictures in splits:
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
        assert line.split("|")[4].strip() == f"{pictures:,}"
    assert MIXED not in dict(splits)
    sheet = Image.open(sound / "card/contact_sheet.jpg")
    assert sheet.size == (2 * card.SHEET_PICTURES * card.SHEET_SIDE + 12, card.SHEET_USERS * (card.SHEET_SIDE + 14))


def test_one_picture_is_read_from_the_place_that_the_index_names(sound):
    rows = duckdb.sql(f"SELECT shard, row, picture FROM '{sound / 'index.parquet'}' WHERE row IN (0, 100)").fetchall()
    for shard, row, picture in rows:
        table = pq.read_table(sound / shard_name(shard))
        expected = Image.open(io.BytesIO(table["image"][row].as_py()))
        assert table["picture"][row].as_py() == picture
        assert read_picture(image_at(sound, shard, row)).tobytes() == expected.convert("RGB").tobytes()
    with pytest.raises(DataError, match="pictures-00000.parquet is damaged or missing"):
        image_at(sound, 0, 10_000)


def image_at(folder, shard, row):
    return dict(store.images_at(folder, np.array([shard]), np.array([row])))[0]


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")])
def test_what_can_not_be_written_leaves_nothing_half(tmp_path, monkeypatch, number, words):
    def refuse(handle):
        raise OSError(number, "Permission denied")

    path = tmp_path / "pairs.parquet"
    write_parquet(path, PAIRS, [])
    before = path.read_bytes()
    monkeypatch.setattr(store.os, "fsync", refuse)
    with pytest.raises(DataError, match=f"Can't write .*: {words}.*same command again"):
        write_parquet(path, PAIRS, [PAIRS.empty_table()])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["pairs.parquet"]
