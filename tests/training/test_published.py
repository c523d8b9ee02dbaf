"""Published pickles become sets: both layouts, every rule, whole after any kill, bad input in a sentence."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.training import handmade_pickles as handmade
from training.data.check import check
from training.data.errors import DataError
from training.data.schema import prompt_split, split, user_split
from training.published import rules
from training.published.layouts import Options, base_name
from training.published.make import make

ROOT = Path(__file__).parents[2]
TRAIN_PROMPT = next(p for p in (f"a hill {i}" for i in range(99)) if prompt_split(p) == "train")
TEST_PROMPT = next(p for p in (f"a sea {i}" for i in range(99)) if prompt_split(p) == "test")


def png(number):
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def named(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def content(folder):
    """{name: SHA-256} of everything in a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def row(user, start, prompt=TRAIN_PROMPT, label=1, **other):
    """A row of a frame: two liked, two disliked and a pair, of pictures numbered from start."""
    liked, disliked, asked = ([png(start + i) for i in some] for some in ((0, 1), (2, 3), (4, 5)))
    cells = {"user_id": user, "reference_list": liked, "reference_list_bad": disliked}
    cells |= {"reference_prompt_list": [prompt] * 2, "image0": asked[0], "image1": asked[1]}
    return cells | {"prompt": prompt, "label0": label} | other


def write_frame(path, rows, **other):
    columns = {name: [r[name] for r in rows] for name in row(1, 0)} | other
    path.write_bytes(handmade.dump(handmade.frame(columns)))


def read_set(folder):
    """{(user, picture): (verdict, held out)} and {rule: dropped}."""
    rows = pq.read_table(folder / "pictures").to_pylist()
    report = json.loads((folder / "report.json").read_text())
    dropped = {r["name"]: r["dropped"] for r in report["rules"] if r["dropped"]}
    return {(r["user"], r["picture"]): (r["verdict"], r["heldout"]) for r in rows}, dropped


def faults(folder):
    return [fault for _, found in check(folder, pictures=True) for fault in found]


def sound(user, start, label=1):
    """What of row() comes into the set."""
    verdicts = ["liked"] * 2 + ["disliked"] * 2 + (["liked", "disliked"] if label else ["disliked", "liked"])
    return {(user, named(png(start + i))): (v, i > 3) for i, v in enumerate(verdicts)}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Two frames: users 0 to 39 in one, 20 to 59 in the other."""
    base = tmp_path_factory.mktemp("frames")
    (base / "source").mkdir()
    for name, users in (("a", range(40)), ("b", range(20, 60))):
        rows = [row(u, 10 * u + 1000 * (name == "b"), label=u % 2) for u in users]
        write_frame(base / "source" / f"{name}.pkl", rows)
    make(base / "source", base / "set", Options(), 1, processes=1)
    return base


def test_frames_become_histories_and_held_out_pairs(frames):
    wanted = {}
    for start, users in ((0, range(40)), (1000, range(20, 60))):
        for u in users:
            wanted |= sound(u, 10 * u + start, u % 2)
    found, dropped = read_set(frames / "set")
    assert found == wanted and dropped == {}
    assert faults(frames / "set") == []
    rows = pq.read_table(frames / "set/pictures").to_pylist()
    for r in rows:
        assert named(r["image"]) == r["picture"]
        assert r["split"] == split(user_split(r["user"]), prompt_split(r["prompt"]))
    pairs = pq.read_table(frames / "set/pairs.parquet").to_pylist()
    assert len(pairs) == 80 and all(found[p["user"], p["liked"]] == ("liked", True) for p in pairs)
    assert (frames / "set/card.md").read_text().startswith("# Data card: import\n\n60 users, 480 pictures")


def test_every_rule_counts_what_was_planted(tmp_path):
    base = row(1, 0)
    again = row(1, 10, reference_list=[png(0), png(11)])  # 0 is liked already
    both = row(1, 20, reference_list=[png(2), png(21)])  # 2 is disliked above
    asked = row(1, 30, reference_list=[png(4), png(31)])  # 4 is asked about above
    repeated = row(1, 40, image0=png(5), image1=png(4), label0=0)
    contrary = row(1, 50, image0=png(4), image1=png(5), label0=0)
    half = row(1, 60, reference_list=[b"", png(61)], reference_prompt_list=[TRAIN_PROMPT, " "], prompt=None)
    label = row(1, 70, label0=2)
    same = row(1, 80, image0=png(85))
    nobody = row(None, 90)
    elsewhere = row(1, 100, TEST_PROMPT, image0=png(0))  # 0 came first with a prompt for training
    lone = row("3", 110, reference_list=[])
    other = row(2, 0)  # the same pictures, of another user
    rows = [base, again, both, asked, repeated, contrary, half, label, same, nobody, elsewhere, lone, other]
    write_frame(tmp_path / "a.pkl", rows)
    make(tmp_path / "a.pkl", tmp_path / "set", Options(), 1, processes=1)
    found, dropped = read_set(tmp_path / "set")
    assert dropped == {
        rules.NO_USER: 1,
        rules.BAD_REFERENCE: 3,  # one without bytes, and a liked and a disliked one without a prompt
        rules.BAD_PAIR: 3,
        rules.SPLITS: 1,
        rules.REPEATED: 1,
        rules.CONTRADICTING: 1,
        rules.AGAIN: 1,
        rules.BOTH: 1,
        rules.ASKED: 1,
        rules.ONE_SIDED: 1,
    }
    wanted = {k: v for start in range(0, 110, 10) if start != 90 for k, v in sound(1, start).items()}
    asked_rows = {start: [named(png(start + i)) for i in (4, 5)] for start in (40, 50, 60, 70, 80, 100)}
    gone = [name for names in asked_rows.values() for name in names]
    gone += [named(png(n)) for n in (10, 20, 30, 2, 60, 61, 63)]
    wanted = {k: v for k, v in wanted.items() if k[1] not in gone}
    assert found == wanted | sound(2, 0)
    assert faults(tmp_path / "set") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"user_id": [[1]]}, "a.pkl has the column 'user_id' with list instead of strings|instead of numbers"),
        ({"reference_list": ["no list"]}, "has the column 'reference_list' with str instead of lists"),
        ({"image0": ["a path"]}, "has the column 'image0' with str instead of raw bytes"),
        ({"prompt": [b"bytes"]}, "has the column 'prompt' with bytes instead of strings"),
    ],
)
def test_a_column_of_another_type_is_one_sentence(tmp_path, change, sentence):
    write_frame(tmp_path / "a.pkl", [row(1, 0)], **change)
    assert_refused(tmp_path, sentence)


def assert_refused(base, sentence, options=None, source="a.pkl"):
    folder = Path(tempfile.mkdtemp(dir=base)) / "set"
    with pytest.raises(DataError, match=sentence) as raised:
        make(base / source, folder, options or Options(), 1, processes=1)
    assert "\n" not in str(raised.value)
    assert [p for p in folder.rglob("*") if p.is_file() and ".work" not in p.parts] == []


def test_bad_sources_are_one_sentence_each(tmp_path):
    assert_refused(tmp_path, "There is no .*a.pkl")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path, r"has no file \*.pkl", source="empty")
    columns = {name: [cell] for name, cell in row(1, 0).items() if name != "image1"}
    (tmp_path / "a.pkl").write_bytes(handmade.dump(handmade.frame(columns)))
    assert_refused(tmp_path, "a.pkl lacks the column 'image1'")
    write_frame(tmp_path / "a.pkl", [row(1, 0)])
    data = (tmp_path / "a.pkl").read_bytes()
    write_frame(tmp_path / "a.pkl", [row(1, 0, image0=None, reference_list=[], reference_list_bad=[])])
    assert_refused(tmp_path, "has no picture that stays .incomplete pair: 1.")
    (tmp_path / "a.pkl").write_bytes(data[:-20])
    assert_refused(tmp_path, "ends early|no whole pickle")


AGENTS = {
    f"agent {u}": [[f"{u}-{p}-n.png", f"{u}-{p}-p.png", f"{TRAIN_PROMPT} {p}"] for p in range(4)]
    + [{"style": ["ink", "soft"], "age": 30 + u}]
    for u in range(12)
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for n, name in enumerate(name for user in AGENTS.values() for item in user[:-1] for name in item[:2]):
        (folder / name).write_bytes(png(n))
    return folder


def make_agents(base, content, options, **kwargs):
    (base / "a.pkl").write_bytes(pickle.dumps(content, 4))
    make(base / "a.pkl", base / "set", options, 1, processes=1, **kwargs)
    return read_set(base / "set")


def test_agents_keep_names_metadata_and_bytes(tmp_path, images):
    found, dropped = make_agents(tmp_path, AGENTS, Options(images))
    wanted = {
        (u, f"{u}-{p}-{side}.png"): ("liked" if side == "p" else "disliked", p == 3)
        for u in range(12)
        for p in range(4)
        for side in "np"
    }
    assert found == wanted and dropped == {}
    assert faults(tmp_path / "set") == []
    named_users = pq.read_table(tmp_path / "set/source_users.parquet").to_pylist()
    assert [(u["user"], u["name"]) for u in named_users] == [(n, f"agent {n}") for n in range(12)]
    assert [json.loads(u["metadata"]) for u in named_users] == [user[-1] for user in AGENTS.values()]
    for r in pq.read_table(tmp_path / "set/pictures").to_pylist():
        assert r["image"] == (images / r["picture"]).read_bytes()
    users = pq.read_table(tmp_path / "set/users.parquet").to_pylist()
    assert {(u["liked"], u["disliked"], u["pairs"], len(u["tastes"])) for u in users} == {(3, 3, 1, 0)}


def test_users_and_held_out_csv(tmp_path, images):
    numbered = {7 * n: items for n, items in enumerate(AGENTS.values())}
    (tmp_path / "user.json").write_text("[21, 14]")
    (tmp_path / "21_test.csv").write_text(
        f"caption,positive_image\n{TRAIN_PROMPT} 0,/nfs/3-0-p.png\n{TRAIN_PROMPT} 9,3-1-p.png\n"
    )
    found, dropped = make_agents(tmp_path, numbered, Options(images, tmp_path / "user.json", tmp_path))
    assert {key for key, (_, held) in found.items() if held} == {(21, "3-0-n.png"), (21, "3-0-p.png")}
    assert {user for user, _ in found} == {21, 14} and dropped == {rules.UNMATCHED: 1}
    names = pq.read_table(tmp_path / "set/source_users.parquet")["name"].to_pylist()
    assert sorted(names) == ["14", "21"]
    assert faults(tmp_path / "set") == []
    (tmp_path / "user.json").write_text('[21, "nobody"]')
    options = Options(images, tmp_path / "user.json")
    assert_refused(tmp_path, "user.json names 1 of 2 users that are not in .*a.pkl, such as 'nobody'", options)
    (tmp_path / "user.json").write_text("{")
    assert_refused(tmp_path, "user.json is no JSON", options)
    (tmp_path / "21_test.csv").write_text("caption,image\na,b\n")
    assert_refused(tmp_path, "21_test.csv lacks the column 'positive_image'", Options(images, None, tmp_path))


def test_the_shorter_variant_is_liked_only_and_only_the_balance_complains(tmp_path, images):
    short = [[[name, prompt] for _, name, prompt in user[:-1]] + [user[-1]] for user in AGENTS.values()]
    found, dropped = make_agents(tmp_path, short, Options(images))
    assert set(found.values()) == {("liked", False)} and len(found) == 48 and dropped == {}
    assert {name for name, found in check(tmp_path / "set", pictures=True) if found} == {"balance"}


def test_missing_pictures_are_counted_and_names_never_leave_the_folder(tmp_path, images):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9999))
    hostile = {
        name: [
            ["../secret.png", items[0][1], "a"],
            [str(secret), items[1][1], "a"],
            ["..", items[1][1], "a"],
            ["a\0b", items[1][1], "a"],
            ["/etc/passwd", "..\\..\\secret.png", "a"],
            [f"../../{items[2][0]}", f"/nfs/{items[2][1]}", "a"],
            items[3],
            items[-1],
        ]
        for name, items in AGENTS.items()
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(hostile, 5))
    assert_refused(
        tmp_path, r"3 of \d+ pictures are not in .*, such as 'secret.png': .*--skip-missing", Options(images)
    )
    assert_refused(tmp_path, "name their folder with --images", Options())
    inner = tmp_path / "again"
    inner.mkdir()
    found, dropped = make_agents(inner, hostile, Options(images, skip_missing=True))
    assert {name for _, name in found} == {f"{u}-{p}-{side}.png" for u in range(12) for p in (2, 3) for side in "np"}
    assert dropped == {rules.MISSING: 4 * 12, rules.BAD_PAIR: 12}
    assert all(r["image"] != png(9999) for r in pq.read_table(inner / "set/pictures").to_pylist())
    assert faults(inner / "set") == []
    assert base_name("..") == base_name("a/..") == "" and base_name("../../etc/passwd") == "passwd"


def test_a_corrupt_picture_is_kept_as_published_and_found_by_the_check(tmp_path):
    rows = [row(u, 10 * u) for u in range(3)]
    rows[1]["reference_list"][0] = b"no picture at all"
    write_frame(tmp_path / "a.pkl", rows)
    make(tmp_path / "a.pkl", tmp_path / "set", Options(), 1, processes=1)
    found = {name: some for name, some in check(tmp_path / "set", pictures=True) if some}
    assert list(found) == ["pictures"] and len(found["pictures"]) == 1 and "can't be decoded" in found["pictures"][0]


def run(*words, **options):
    """Start the real command in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "training.published", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True, **pipes, **options)


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_it_makes_the_same_bytes(frames, tmp_path):
    folder, generator, options = tmp_path / "set", random.Random(3), ["--unit-mb", 1, "--processes", 1]
    for stage in ("rows/*", "read/00001*", "chosen/*.parquet", "finished/*users*"):  # a little after each has begun
        process = run(frames / "source", folder, *options)
        while process.poll() is None and not list((folder / ".work").glob(stage)):
            time.sleep(0.002)
        time.sleep(generator.random() * 0.03)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = run(frames / "source", folder, "--unit-mb", 1, "--processes", 2)
    assert process.wait(300) == 0, process.communicate()[1]
    assert content(folder) == content(frames / "set")


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(frames, tmp_path):
    for size in (10_000, 100_000):  # EFBIG stands in for ENOSPC
        small_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        process = run(frames / "source", tmp_path / "set", "--unit-mb", 1, "--processes", 1, preexec_fn=small_files)
        message = process.communicate(timeout=300)[1].splitlines()[-1]
        assert process.returncode == 1
        assert re.match("Can't (write|work in) .*: (the disk is full|make room)", message), message
        assert not (tmp_path / "set/manifest.json").exists() and not list(tmp_path.rglob("*.tmp"))
    make(frames / "source", tmp_path / "set", Options(), 1, processes=1)
    assert content(tmp_path / "set") == content(frames / "set")
