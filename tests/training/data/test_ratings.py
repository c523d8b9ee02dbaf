"""People's own ratings, from whatever they lie in: planted users come out as what they were planted as."""

import csv
import io
import json
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prefgen.tastes.exchange import export_zip
from prefgen.tastes.origin import Origin
from prefgen.tastes.taste import Taste
from tests.training.commands import content
from training.data import __main__ as command
from training.data.check import check
from training.data.errors import DataError
from training.data.pickapic import looks
from training.data.ratings import make as making
from training.data.ratings import rating, rules
from training.data.ratings.make import make
from training.data.ratings.rules import Limits
from training.data.ratings.source import read_source
from training.data.schema import DISLIKED, LIKED, TEST, TRAIN, user_split
from training.data.vqa.questions import Picture, ask
from training.data.worlds import DataSetWorld

SIDE = 64
# A user likes pictures that are brighter on the left; every second one is.
PICTURES = 12
FEW = Limits(min_liked=2, min_disliked=2)


def png(number, side=SIDE):
    """A picture of its own for every number, left half bright where it is even."""
    pixels = np.random.default_rng(number).integers(0, 120, (side, side, 3), np.uint8)
    pixels[:, : side // 2] += 100 * (number % 2 == 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder, numbers=range(PICTURES)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(png(number))


def write_csv(path, rows, names=None, **options):
    names = names or list(rows[0])
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, names, **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def imported(path, folder, limits=FEW, **columns):
    make(read_source(path, columns), folder, limits, processes=1)
    faults = [fault for _, faults in check(folder, pictures=True) for fault in faults]
    assert faults == []
    return rows_of(folder)


def rows_of(folder):
    """{(user's name in the source, number of the picture): (verdict, prompt, held out, split)}."""
    with open(folder / "source_users.csv", encoding="utf-8", newline="") as file:
        names = {int(row["user"]): row["name"] for row in csv.DictReader(file)}
    numbers = {png(number): number for number in range(40)}
    return {
        (names[row["user"]], numbers[row["image"]]): (row["verdict"], row["prompt"], row["heldout"], row["split"])
        for shard in sorted((folder / "pictures").iterdir())
        for row in pq.read_table(shard).to_pylist()
    }


def verdicts(rows, user):
    return {number: row[0] for (name, number), row in rows.items() if name == user}


def dropped(folder):
    """{rule: how often}, those that dropped something; the report and the list agree."""
    report = json.loads((folder / "report.json").read_text())
    counted = {row["name"]: row["dropped"] for row in report["rules"] if row["dropped"]}
    listed = pq.read_table(folder / "dropped.parquet")["rule"].to_pylist()
    assert counted == {rule: listed.count(rule) for rule in set(listed)}
    card = (folder / "card.md").read_text()
    for row in report["rules"]:
        assert f"| {row['rule']} | {row['unit']} | {row['dropped']:,} |" in card
    return counted


def by_left(numbers=range(PICTURES)):
    return {number: LIKED if number % 2 == 0 else DISLIKED for number in numbers}


# Folders and zips


def write_taste(folder, numbers=range(PICTURES)):
    for number in numbers:
        write_pictures(folder / by_left()[number], [number])
    return folder


def test_folders_of_users_become_users_with_their_prompts(tmp_path):
    for user in ("ada", "Bo ☂"):
        write_taste(tmp_path / "people" / user)
    (tmp_path / "people/ada/liked/0.txt").write_text("a  hill\nat dusk", encoding="utf-16")
    write_pictures(tmp_path / "people/ada", [20])  # loose: no verdict
    write_pictures(tmp_path / "people/ada/liked", [])
    (tmp_path / "people/ada/liked/._0.png").write_bytes(b"of macOS")
    (tmp_path / "people/empty").mkdir()
    rows = imported(tmp_path / "people", tmp_path / "set")
    assert verdicts(rows, "ada") == verdicts(rows, "Bo ☂") == by_left()
    assert rows["ada", 0][1] == rows["Bo ☂", 0][1] == "a hill at dusk" and rows["ada", 2][1] == ""
    assert dropped(tmp_path / "set") == {rating.UNRATED: 1}
    pairs = pq.read_table(tmp_path / "set/pairs.parquet").to_pylist()
    assert len(pairs) == 2 and sum(row[2] for row in rows.values()) == 4


def test_a_taste_of_the_store_comes_in_order_of_its_verdicts_from_folder_and_zip_alike(tmp_path):
    taste_folder = tmp_path / "sea"
    taste_folder.mkdir()
    taste = Taste(taste_folder)
    for moment, number in enumerate(reversed(range(PICTURES))):
        taste.rate(
            png(number), by_left()[number], f"{number}.png", origin=Origin(f"a sea {number}"), moment=1e9 + moment
        )
    taste.rate(png(1), LIKED, "1.png", moment=2e9)  # changed their mind
    with open(tmp_path / "sea.zip", "wb") as file:
        assert export_zip(taste, file, private=True) == []
    for source, name in ((taste_folder, "one"), (tmp_path / "sea.zip", "other")):
        rows = imported(source, tmp_path / name, Limits(2, 2, 0, 0))
        assert verdicts(rows, "sea") == by_left() | {1: LIKED} and rows["sea", 4][1] == "a sea 4"
        assert list(rows) == [("sea", number) for number in (*reversed(range(2, PICTURES)), 0, 1)]
    assert not (taste_folder / ".revisions").exists()


def test_a_zip_of_several_tastes_keeps_their_manifests_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for user in ("sea", "hill"):
            files = {f"{verdict}/{number}.png": verdict for number, verdict in by_left().items()}
            listed = [{"file": f, "verdict": v, "prompt": f"{user} {f}"} for f, v in files.items()]
            archive.writestr(f"{user}/taste.json", json.dumps({"pictures": listed}))
            for file in files:
                archive.writestr(f"{user}/{file}", png(int(file.split("/")[1][:-4]) + 20 * (user == "hill")))
        archive.writestr("sea/liked/../../../escape.png", b"not a picture")
    rows = imported(tmp_path / "all.zip", tmp_path / "set")
    assert verdicts(rows, "sea") == by_left() and len(verdicts(rows, "hill")) == PICTURES
    assert rows["sea", 2][1] == "sea liked/2.png" and rows["hill", 22][1] == "hill liked/2.png"
    assert dropped(tmp_path / "set") == {} and not list(tmp_path.parent.rglob("escape*"))


def test_text_files_in_a_zip_are_prompts(tmp_path):
    with zipfile.ZipFile(tmp_path / "sea.zip", "w") as archive:
        for number, verdict in by_left().items():
            archive.writestr(f"sea/{verdict}/{number}.png", png(number))
        archive.writestr("sea/liked/2.txt", "a red\nboat")
    rows = imported(tmp_path / "sea.zip", tmp_path / "set")
    assert {number: row[1] for (_, number), row in rows.items() if row[1]} == {2: "a red boat"}


# Tables


def test_separators_of_unicode_and_half_letters_in_json_lines_lose_no_row(tmp_path):
    write_pictures(tmp_path)
    odd = ["a\u2028b", "a\u2029b", "a\x85b", "a\x1cb", "a\x0cb", "a \ud800 b"]
    rows = [
        {"user": "u \ud800", "image": f"{n}.png", "liked": n % 2 == 0, "prompt": odd[n % len(odd)]}
        for n in range(PICTURES)
    ]
    # As `json.dumps(..., ensure_ascii=False)` writes them; half a letter can only be written as an escape.
    lines = [json.dumps(row, ensure_ascii=False).replace("\ud800", "\\ud800") for row in rows]
    (tmp_path / "ratings.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="\n")
    read = imported(tmp_path / "ratings.jsonl", tmp_path / "set")
    assert verdicts(read, "u ?") == by_left() and dropped(tmp_path / "set") == {}
    assert {row[1] for row in read.values()} == {"a b", "a ? b"}


def test_scores_become_verdicts_on_each_users_own_scale(tmp_path):
    """One uses 4 and 5 alone, one 1 to 3, one all of it; 3 of that one's is nothing."""
    write_pictures(tmp_path / "p")
    scales = {"kind": (5, 4), "strict": (3, 1), "even": (5, 1)}
    rows = [
        {"user": user, "image": f"p/{number}.png", "score": scales[user][number % 2]}
        for user in scales
        for number in range(PICTURES)
    ]
    rows += [
        {"user": "even", "image": "p/0.png", "score": "nan"},
        {"user": "even", "image": "p/1.png", "score": "5 stars"},
    ]
    write_pictures(tmp_path / "p", [20])
    rows += [{"user": "even", "image": "p/20.png", "score": 3}]
    rows += [{"user": "same", "image": f"p/{number}.png", "score": 4} for number in range(PICTURES)]
    write_csv(tmp_path / "ratings.csv", rows)
    read = imported(tmp_path / "ratings.csv", tmp_path / "set")
    assert {user: verdicts(read, user) for user in scales} == dict.fromkeys(scales, by_left())
    assert dropped(tmp_path / "set") == {rating.UNRATED: 2, rating.NEUTRAL: 1, rating.FLAT: 1, rules.FEW: 1}


def test_choices_become_net_wins_and_the_last_is_held_out(tmp_path):
    write_pictures(tmp_path)
    rows = [
        {"user": 7, "image_a": f"{a}.png", "image_b": f"{b}.png", "choice": choice, "prompt": "a sea", "time": time}
        for time, (a, b, choice) in enumerate(
            [
                (0, 1, "a"),
                (3, 2, "image_b"),
                (4, 5, "4.png"),
                (6, 7, "LEFT"),
                (0, 3, "a"),
                (8, 9, "tie"),
                (8, 9, "7"),
                (8, 8, "a"),
                (10, 11, "a"),
                (11, 10, "left"),
                (2, 5, "a"),
            ]
        )
    ]
    write_csv(tmp_path / "choices.csv", rows, delimiter=";", encoding="utf-8-sig")
    read = imported(tmp_path / "choices.csv", tmp_path / "set")
    assert verdicts(read, "7") == by_left([0, 1, 2, 3, 4, 5, 6, 7])
    expected = {rating.TIED: 1, rating.UNRATED: 1, rating.SAME: 1, rating.EVEN: 2}
    assert dropped(tmp_path / "set") == expected
    assert [number for (_, number), row in read.items() if row[2]] == [2, 5]


def test_a_verdict_that_was_changed_counts_as_the_newest_and_without_a_time_not_at_all(tmp_path):
    write_pictures(tmp_path)
    rows = [{"user": u, "image": f"{n}.png", "liked": n % 2 == 0, "time": ""} for u in "ab" for n in range(PICTURES)]
    for row in rows[:PICTURES]:
        row["time"] = "2026-03-01T10:00:00Z"
    rows += [{"user": "a", "image": "0.png", "liked": "no", "time": 1.9e12}]  # milliseconds, later
    rows += [{"user": "b", "image": "0.png", "liked": "dislike", "time": ""}]
    rows += [{"user": "b", "image": "2.png", "liked": "Like", "time": ""}]
    write_csv(tmp_path / "liked.csv", rows)
    read = imported(tmp_path / "liked.csv", tmp_path / "set")
    assert verdicts(read, "a") == by_left() | {0: DISLIKED}
    assert verdicts(read, "b") == by_left(range(1, PICTURES))
    assert dropped(tmp_path / "set") == {rating.OLDER: 1, rating.CONTRADICTORY: 1, rating.REPEATED: 1}


HOSTILE = [
    "/etc/passwd",
    "../secret.png",
    "p/../../secret.png",
    "C:\\x.png",
    "https://a.b/c.png",
    "link.png",
    "a\0b.png",
]


def test_pictures_outside_missing_and_damaged_are_counted_and_never_read(tmp_path):
    inside = tmp_path / "in"
    write_pictures(inside)
    (tmp_path / "secret.png").write_bytes(png(30))
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "text.png").write_text("no picture")
    (inside / "cut.png").write_bytes(png(31)[:200])
    (inside / "tiny.png").write_bytes(png(32, side=16))
    bomb = bytearray(png(33))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    (inside / "bomb.png").write_bytes(bomb)
    (inside / "copy.png").write_bytes(png(0))
    names = [f"{number}.png" for number in range(PICTURES)]
    rows = [{"user": "u", "image": name, "liked": i % 2 == 0} for i, name in enumerate(names)]
    odd = [*HOSTILE, "gone.png", "text.png", "cut.png", "bomb.png", "tiny.png", "copy.png", ".", ""]
    rows += [{"user": "u", "image": name, "liked": True} for name in odd] + [
        {"user": " ", "image": "1.png", "liked": 1}
    ]
    (inside / "ratings.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken", "[1]", "5"]))
    read = imported(inside / "ratings.jsonl", tmp_path / "set")
    assert verdicts(read, "u") == by_left()
    assert dropped(tmp_path / "set") == {
        rating.OUTSIDE: len(HOSTILE),
        rating.INCOMPLETE: 2,
        rating.UNREADABLE: 3,
        rating.MISSING: 2,
        looks.BROKEN: 3,
        looks.TINY: 1,
        rating.FAULTY: 6,
        rating.REPEATED: 1,
    }


def test_a_table_says_in_one_sentence_what_it_lacks(tmp_path):
    write_pictures(tmp_path, [0])
    table = tmp_path / "t.csv"
    cases = {
        "rater,file,stars\nu,0.png,3\n": "needs the columns user, image and one of liked or score",
        "user,image,score,liked\nu,0.png,3,1\n": "has the columns liked and score: leave all but one out",
        "": "needs the columns user",
        "user,image,score\n": "has no rating that can be used: 0 rows were read",
        'user,image,score\nu,"0.png,3\n' + "x" * 200_000: "is no CSV table from row 1 on",
    }
    for text, sentence in cases.items():
        table.write_text(text)
        with pytest.raises(DataError, match=sentence) as caught:
            read_source(table, {})
        assert len(str(caught.value).splitlines()) == 1
    table.write_bytes("user,image,liked\nMüller,0.png,1\n".encode("cp1252"))
    with pytest.raises(DataError, match="isn't UTF-8 text: open it in an editor and save it as UTF-8"):
        read_source(table, {})
    for name, data in (("t.parquet", b"PAR1"), ("t.zip", b"PK"), ("t.json", b"[{"), ("t.doc", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read_source(tmp_path / name, {})
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=path.name):
            read_source(path, {})


def test_nobody_left_is_said_with_the_reasons_and_leaves_no_set(tmp_path):
    write_pictures(tmp_path, range(3))
    write_csv(tmp_path / "t.csv", [{"user": u, "image": f"{u}.png", "liked": 1} for u in range(4)])
    with pytest.raises(DataError, match="of 4 rows were dropped: 1 missing, 1 rating of a faulty picture, 3 too few"):
        imported(tmp_path / "t.csv", tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


def parquet_with_pictures(path, users, columns=("rater", "picture", "stars")):
    rows = [
        {"rater": user, "picture": {"bytes": png(number), "path": None}, "stars": float(number % 2 == 0)}
        for user in users
        for number in range(PICTURES)
    ]
    table = pa.Table.from_pylist(rows)
    return table, path


def test_parquet_and_hugging_face_sets_bring_their_pictures_with_them(tmp_path):
    table, _ = parquet_with_pictures(None, ("a", "b"))
    table = table.append_column("empty", pa.nulls(len(table)))
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "hub/data/train-00000.parquet", row_group_size=5)
    columns = {"user": "rater", "image": "picture", "score": "stars"}
    read = imported(tmp_path / "hub", tmp_path / "one", **columns)
    assert verdicts(read, "a") == verdicts(read, "b") == by_left()

    saved = tmp_path / "saved/train"
    saved.mkdir(parents=True)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    # As datasets.save_to_disk writes it: an Arrow stream, and state.json that names it.
    with pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (saved / "dataset_info.json").write_text("{}")
    assert imported(tmp_path / "saved", tmp_path / "two", **columns) == read
    assert json.loads((tmp_path / "two/manifest.json").read_text())["config"]["form"] == "dataset"


def test_pamelas_layout_is_known_by_its_annotations(tmp_path):
    """README of bethgelab/PAMELA: annotations/pamela_*.json, a row a rating."""
    source = tmp_path / "PAMELA"
    write_pictures(source / "images/Art")
    rows = [
        {
            "participant_id": f"P{person}",
            "image_id": str(number),
            "original_score": 4 + (number % 2 == 0) - 2 * person,
            "image_metadata": {"group": "travel", "style": None, "type": "Art"},
        }
        for person in range(2)
        for number in range(PICTURES)
    ]
    rows += [rows[0] | {"image_id": "none"}, 5]
    (source / "annotations").mkdir()
    (source / "annotations/pamela_train.json").write_text(json.dumps(rows[:20]))
    (source / "annotations/pamela_test_seen.json").write_text(json.dumps(rows[20:]))
    read = imported(source, tmp_path / "set")
    assert verdicts(read, "P0") == verdicts(read, "P1") == by_left()
    assert dropped(tmp_path / "set") == {rating.UNREADABLE: 1, rating.MISSING: 1, rating.FAULTY: 1}
    assert "CC BY 4.0" in (tmp_path / "set/card.md").read_text()


# The set


def many(folder, users=24):
    write_pictures(folder, range(30))
    random = np.random.default_rng(0)
    rows = [
        {"user": f"user {user}", "image": f"{number}.png", "liked": number % 2 == user % 2}
        for user in range(users)
        for number in random.permutation(30)[:20]
    ]
    return write_csv(folder / "ratings.csv", rows)


def test_splits_are_by_user_and_by_picture_where_nobody_knows_a_prompt(tmp_path):
    imported(many(tmp_path / "in"), tmp_path / "set")
    index = pq.read_table(tmp_path / "set/index.parquet").to_pylist()
    assert {row["split"] for row in index} == {TRAIN, TEST, "mixed"}
    assert all(row["split"] != TRAIN or user_split(row["user"]) == TRAIN for row in index)
    world = DataSetWorld(tmp_path / "set")
    assert len(world.users(TRAIN)) == 21 and len(world.users(TEST)) == 3
    person = world.users(TRAIN)[0]
    pictures = [
        Picture(row["picture"], row["verdict"] == LIKED, "", frozenset(), row["heldout"], 0, i)
        for i, row in enumerate(row for row in index if row["user"] == person)
    ]
    questions = [question for _, question in ask(pictures, 0, person, range(8), heldout=False)]
    assert len(questions) == 8 and all(not set(q.asked) & set(q.history) for q in questions)


def test_a_killed_import_goes_on_to_the_same_bytes_and_a_changed_source_is_refused(tmp_path, monkeypatch):
    table = many(tmp_path / "in", users=8)
    monkeypatch.setattr(making, "LOOKS_AT_ONCE", 7)
    monkeypatch.setattr(making, "SHARD_PICTURES", 50)
    make(read_source(table, {}), tmp_path / "one", FEW, processes=1)
    for step in ("look", "copy"):
        function = getattr(making, step)
        done = []

        def dies(*arguments, function=function, done=done):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(function(*arguments))

        monkeypatch.setattr(making, step, dies)
        with pytest.raises(KeyboardInterrupt):
            make(read_source(table, {}), tmp_path / "two", FEW, processes=1)
        monkeypatch.setattr(making, step, function)
    make(read_source(table, {}), tmp_path / "two", FEW, processes=1)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    table.write_text(table.read_text() + "user 0,1.png,True\n")
    with pytest.raises(DataError, match="was made with another configuration .source_sha256"):
        make(read_source(table, {}), tmp_path / "two", FEW, processes=1)


def test_a_picture_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    table = many(tmp_path / "in", users=2)
    decide = making.decide

    def meddled(*arguments):
        (tmp_path / "in/0.png").write_bytes(png(35))
        return decide(*arguments)

    monkeypatch.setattr(making, "decide", meddled)
    with pytest.raises(DataError, match="0.png has changed while it was imported"):
        make(read_source(table, {}), tmp_path / "set", FEW, processes=1)
    assert not (tmp_path / "set/manifest.json").exists()


def test_the_larger_side_is_cut_to_the_clearest(tmp_path):
    write_pictures(tmp_path, range(20))
    scores = {number: 5 if number < 2 else 1 + (number % 3) / 10 for number in range(20)}
    write_csv(tmp_path / "t.csv", [{"user": 1, "image": f"{n}.png", "score": s} for n, s in scores.items()])
    make(read_source(tmp_path / "t.csv", {}), tmp_path / "set", Limits(2, 2, 0, 2.0), processes=1)
    read = verdicts(rows_of(tmp_path / "set"), "1")
    assert sorted(read) == [0, 1, 9, 12, 15, 18] and dropped(tmp_path / "set") == {rating.NEUTRAL: 6, rating.SURPLUS: 8}


def test_the_command_reads_its_options(tmp_path, monkeypatch, capsys):
    table = many(tmp_path / "in", users=3)
    text = table.read_text().replace("user,image,liked", "who,image,liked")
    table.write_text(text)
    words = ["import", str(table), str(tmp_path / "set"), "--columns", "user=who", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["data", *words])
    command.main()
    command.main()
    assert f"{tmp_path / 'set'} is finished already." in capsys.readouterr().out
    for wrong in (["--columns", "taste=x"], ["--margin", "9"], ["--ratio", "0.5"]):
        monkeypatch.setattr(sys, "argv", ["data", *words, *wrong])
        with pytest.raises(SystemExit):
            command.main()
