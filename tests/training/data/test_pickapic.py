"""Pick-a-Pic: every planted fault is found and nothing sound dropped; whole after any kill; bad input in a sentence."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter, defaultdict
from functools import partial

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training import pickapic_tables as planted
from tests.training.commands import content, kill_a_ray_worker, start
from training.data.check import check
from training.data.errors import DataError
from training.data.pickapic import looks, rules
from training.data.pickapic.graphs import clusters, on_cycles
from training.data.pickapic.make import make
from training.data.pickapic.source import find
from training.data.schema import normal_prompt, prompt_split, split, user_split

LIMITS = rules.Limits(min_liked=3, min_disliked=3, heldout=2, nsfw_words=(planted.WORD,))
PLAIN_ROWS, IMAGE_ROWS = 6000, 1500


class Made:
    """Planted tables, and the set that was made of them."""

    def __init__(self, base, rows, images):
        self.tables = planted.generate(rows, seed=4, images=images)
        self.source = planted.write(self.tables, base / "source", images, files=3, row_group=64 if images else 1000)
        self.folder = base / "set"
        make_set(self.source, self.folder)
        self.dropped = pq.read_table(self.folder / "dropped.parquet").to_pylist()

    def rows_dropped(self, rule):
        files = sorted(self.source.rglob("*.parquet"))
        lengths = [pq.read_metadata(f).num_rows for f in files]
        start = {str(f.relative_to(self.source)): sum(lengths[:i]) for i, f in enumerate(files)}
        rows = [start[d["file"]] + d["row"] for d in self.dropped if d["rule"] == rule]
        assert len(rows) == len(set(rows)), "a row is listed once"
        return set(rows)

    def pictures_dropped(self, rule):
        return {d["picture"] for d in self.dropped if d["rule"] == rule}


def make_set(source, folder, processes=1, limits=LIMITS):
    make(find(str(source), "**/*.parquet", 1 << 20), folder, limits, unit_mb=1, processes=processes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("plain"), PLAIN_ROWS, images=False)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("pictured"), IMAGE_ROWS, images=True)


EXACT = [*planted.SINGLE, "repeated", "A over B and B over A", "cycle"]


@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("variant", ["plain", "pictured"])
def test_a_rule_drops_the_planted_rows_and_no_other(rule, variant, request):
    cleaned = request.getfixturevalue(variant)
    assert cleaned.rows_dropped(rule) == cleaned.tables.rows_of(rule) != set()


@pytest.mark.parametrize("fault", looks.FAULTS)
def test_a_rule_drops_the_planted_pictures_and_no_other(fault, pictured):
    wanted = {pictured.tables.uids[p] for p, name in pictured.tables.fault.items() if name == fault}
    assert pictured.pictures_dropped(fault) == wanted != set()


def test_choices_with_a_faulty_picture_go_and_no_other(pictured):
    assert pictured.rows_dropped(rules.FAULTY) == pictured.tables.rows_of(rules.FAULTY) != set()


def test_near_duplicates_precision_is_1_and_recall_0_9(pictured):
    """Fuzzy: re-encoded at quality 60, resized, or brighter. No sound picture is taken for another."""
    wanted = {pictured.tables.uids[p] for p in pictured.tables.copies}
    dropped = pictured.pictures_dropped(rules.NEAR)
    assert dropped <= wanted
    assert len(dropped) >= 0.9 * len(wanted) > 0
    assert pictured.rows_dropped(rules.NEAR_CHOICE) <= pictured.tables.rows_of(rules.NEAR_CHOICE)


def test_banding_misses_no_pair_that_all_pairs_would_find(tmp_path):
    random_ = np.random.default_rng(0)
    hashes = random_.integers(-(2**63), 2**63, 400)
    for i in range(0, 400, 4):  # relatives 2 to 4 and 5 bits away, in any band
        for flips in (1, 2, 3):
            bits = random_.choice(64, flips + 1 + (i % 8 == 0), replace=False)
            hashes[i + flips] = hashes[i] ^ np.bitwise_or.reduce(np.left_shift(np.int64(1), bits.astype(np.int64)))
    unsigned = hashes.astype(np.uint64)
    distances = np.bitwise_count(unsigned[:, None] ^ unsigned[None])
    wanted = clusters(np.argwhere(np.triu(distances <= looks.NEAR, 1)))
    table = {"id": np.arange(400), "fault": pa.nulls(400, pa.string()), "hash": hashes}
    table["digest"] = [bytes([i % 256, i // 256]) for i in range(400)]
    pq.write_table(pa.table(table), tmp_path / "looks.parquet")
    columns = ("number", "user", "created", "prompt", "winner", "loser"), ("rule", "unit", "number", "picture", "user")
    with rules.connect(tmp_path / "db.duckdb", "200MB", 1) as db:
        db.execute(f"CREATE TABLE choices ({' BIGINT, '.join(columns[0])} BIGINT)")
        db.execute(f"CREATE TABLE dropped (rule VARCHAR, unit VARCHAR, {' BIGINT, '.join(columns[1][2:])} BIGINT)")
        db.execute("INSERT INTO choices SELECT range, 1, 0, 0, 2 * range, 2 * range + 1 FROM range(200)")
        rules.start(db)
        rules.judge_pictures(db, [str(tmp_path / "looks.parquet")])
        merged = {p for (p,) in db.execute("SELECT picture FROM gone WHERE rule = ?", [rules.NEAR]).fetchall()}
    assert merged == set(wanted) and 200 < len(merged) < 300


def test_cycles_are_what_walking_the_choices_finds():
    generator = random.Random(1)
    for _ in range(60):
        n = generator.randint(2, 7)
        edges = {(generator.randrange(n), generator.randrange(n)) for _ in range(generator.randint(1, 12))}
        edges = [(a, b) for a, b in sorted(edges) if a != b]
        reach = np.eye(n, dtype=bool)
        for a, b in edges:
            reach[a, b] = True
        for _ in range(n):
            reach = reach | (reach.astype(int) @ reach.astype(int) > 0)
        winners, losers = np.array(edges, int).reshape(-1, 2).T
        assert on_cycles(winners, losers).tolist() == [reach[b, a] for a, b in edges]


def reference(cleaned):
    """{(user, picture uid): (verdict, held out, split)} by the written rules, in plain Python, from the truth."""
    tables = cleaned.tables
    sound = [n for n in range(len(tables.user)) if not tables.kind[n]]
    score, first, last, prompt = defaultdict(int), {}, {}, {}
    for n in sound:
        for picture, point in ((tables.winner[n], 1), (tables.loser[n], -1)):
            key = int(tables.user[n]), int(picture)
            score[key] += point
            first.setdefault(key, n)
            last[key] = n
            prompt.setdefault(int(picture), int(tables.prompt[n]))
    sides = defaultdict(Counter)
    for (user, _), points in score.items():
        if points:
            sides[user][points > 0] += 1
    stays = {u for u, c in sides.items() if c[True] >= LIMITS.min_liked and c[False] >= LIMITS.min_disliked}
    heldout_pictures = defaultdict(set)
    for n in reversed(sound):
        user, winner, loser = int(tables.user[n]), int(tables.winner[n]), int(tables.loser[n])
        room = min(sides[user][True] - LIMITS.min_liked, sides[user][False] - LIMITS.min_disliked, LIMITS.heldout)
        clear = score[user, winner] > 0 > score[user, loser] and not {winner, loser} & heldout_pictures[user]
        if user in stays and clear and len(heldout_pictures[user]) // 2 < room:
            heldout_pictures[user] |= {winner, loser}
    result = {}
    for user in stays:
        own = [
            (p, points) for (u, p), points in score.items() if u == user and points and p not in heldout_pictures[user]
        ]
        keep = int(LIMITS.ratio * min(sum(x > 0 for _, x in own), sum(x < 0 for _, x in own)))
        chosen = {p: points for p, points in score.items() if p[0] == user and p[1] in heldout_pictures[user]}
        for liked in (True, False):
            side = sorted((p for p in own if (p[1] > 0) == liked), key=lambda p: (-abs(p[1]), -last[user, p[0]], p))
            chosen |= {(user, p): points for p, points in side[:keep]}
        for (_, p), points in chosen.items():
            words = prompt_split(planted.caption(prompt[p], 1, ""))
            verdict = "liked" if points > 0 else "disliked"
            result[user, str(tables.uids[p])] = verdict, p in heldout_pictures[user], split(user_split(user), words)
    return result


def test_histories_and_held_out_pairs_are_what_the_written_rules_say(plain):
    wanted = reference(plain)
    rows = pq.read_table(plain.folder / "pictures").to_pylist()
    assert {(r["user"], r["picture"]): (r["verdict"], r["heldout"], r["split"]) for r in rows} == wanted
    assert len(rows) == len(wanted) > 1000 and all(r["image"] is None for r in rows)
    pairs = pq.read_table(plain.folder / "pairs.parquet").to_pylist()
    assert 2 * len(pairs) == sum(heldout for _, heldout, _ in wanted.values()) > 0
    assert {len(p) for p in Counter(p["user"] for p in pairs).items()} and max(p["pair"] for p in pairs) == 1
    prompts = {(r["user"], r["picture"]): normal_prompt(r["prompt"]) for r in rows}
    for p in pairs:
        assert prompts[p["user"], p["liked"]] == prompts[p["user"], p["disliked"]] == normal_prompt(p["prompt"])


def test_pictures_keep_their_published_bytes(pictured):
    number = {uid: n for n, uid in enumerate(pictured.tables.uids)}
    rows = pq.read_table(pictured.folder / "pictures", columns=["image", "picture"]).to_pylist()
    assert len(rows) > 300
    for row in rows:
        assert row["image"] == planted.encoded(pictured.tables, number[row["picture"]])


@pytest.mark.parametrize("variant", ["plain", "pictured"])
def test_the_check_passes(variant, request):
    cleaned = request.getfixturevalue(variant)
    assert [(name, faults) for name, faults in check(cleaned.folder, pictures=True) if faults] == []


def test_the_report_counts_what_the_list_names(pictured, plain):
    for cleaned in (pictured, plain):
        report = json.loads((cleaned.folder / "report.json").read_text())
        listed = Counter(d["rule"] for d in cleaned.dropped)
        assert {r["name"]: r["dropped"] for r in report["rules"] if r["dropped"]} == dict(listed)
    assert set(report["not_applied"]) == set(rules.IMAGE_RULES)


def test_the_word_list_is_off_by_default(plain, tmp_path):
    make_set(plain.source, tmp_path / "set", limits=rules.Limits())
    report = json.loads((tmp_path / "set/report.json").read_text())
    assert rules.NSFW in report["not_applied"]


def test_workers_and_another_file_system_make_the_same_bytes(pictured, tmp_path):
    make_set(pictured.source, tmp_path / "two", processes=2)
    memory = fsspec.filesystem("memory")
    memory.put(str(pictured.source), "/pickapic", recursive=True)
    try:
        make_set("memory://pickapic", tmp_path / "memory")
    finally:
        memory.rm("/pickapic", recursive=True)
    assert content(tmp_path / "two") == content(tmp_path / "memory") == content(pictured.folder)


def run(*words, **options):
    return start("data.pickapic", *words, **options)


def test_killed_at_any_moment_and_started_again_it_makes_the_same_bytes(pictured, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text(f"# of ours\n{planted.WORD}\n")
    options = "--min-liked 3 --min-disliked 3 --heldout 2 --unit-mb 1 --processes 1 --nsfw-words".split() + [words]
    folder, generator = tmp_path / "set", random.Random(7)
    stages = ["choices.half.duckdb*", "looks/*.parquet", "chosen/*.parquet", "finished/*users*"]
    for stage in stages:  # a little after each stage has begun
        process = run(pictured.source, folder, *options)
        while process.poll() is None and not list((folder / ".work").glob(stage)):
            time.sleep(0.002)
        time.sleep(generator.random() * 0.05)
        done = {p: p.stat().st_mtime_ns for p in (folder / ".work/looks").glob("*.parquet")}
        done |= {p: p.stat().st_mtime_ns for p in (folder / "pictures").glob("*.parquet")}
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = run(pictured.source, folder, *options)
    assert process.wait(300) == 0, process.communicate()[1]
    assert content(folder) == content(pictured.folder)
    assert done and all(p.stat().st_mtime_ns == t for p, t in done.items() if p.exists()), "finished work is kept"


def test_the_ray_engine_makes_the_same_bytes_though_a_worker_is_killed(pictured, tmp_path):
    pytest.importorskip("ray")
    words = tmp_path / "words.txt"
    words.write_text(planted.WORD)
    options = "--min-liked 3 --min-disliked 3 --heldout 2 --unit-mb 1 --engine ray --processes 2".split()
    process = run(pictured.source, tmp_path / "set", *options, "--nsfw-words", words)
    kill_a_ray_worker(process)
    assert process.wait(300) == 0, process.communicate()[1]
    assert content(tmp_path / "set") == content(pictured.folder)


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(pictured, tmp_path):
    options = "--min-liked 3 --min-disliked 3 --heldout 2 --unit-mb 1 --processes 1".split()
    words = tmp_path / "words.txt"
    words.write_text(planted.WORD)
    for size in (100_000, 700_000):  # the database's log, then the database; EFBIG stands in for ENOSPC
        small_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        process = run(pictured.source, tmp_path / "set", *options, "--nsfw-words", words, preexec_fn=small_files)
        message = process.communicate(timeout=300)[1].splitlines()[-1]
        assert process.returncode == 1
        assert re.match("Can't (write|work in) .*: (the disk is full|make room)", message), message
        assert not (tmp_path / "set/manifest.json").exists() and not list(tmp_path.rglob("*.tmp"))
    process = run(pictured.source, tmp_path / "set", *options, "--nsfw-words", words)
    assert process.wait(300) == 0
    assert content(tmp_path / "set") == content(pictured.folder)


def test_one_file_alone_and_a_folder_with_brackets_are_sources(plain, tmp_path):
    folder = tmp_path / "[v2] data"
    folder.mkdir()
    shutil.copy(first_file(plain.source), folder / "part.parquet")
    make_set(folder, tmp_path / "a")
    make_set(folder / "part.parquet", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_source_without_users_who_stay_is_one_sentence(plain, tmp_path):
    with pytest.raises(DataError, match="No user of .* has 9999 liked and 4 disliked pictures: lower --min-liked"):
        make_set(plain.source, tmp_path / "set", limits=rules.Limits(min_liked=9999))


def first_file(source):
    return sorted(source.rglob("*.parquet"))[0]


def rewrite(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def cut_short(source):
    path = first_file(source)
    os.truncate(path, path.stat().st_size // 2)


def cut_out_of_the_middle(source):
    path = first_file(source)
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes(2000) + data[2100:])


def drop_column(source):
    rewrite(first_file(source), lambda table: table.drop_columns(["label_1"]))


def change_type(source):
    rewrite(first_file(source), lambda t: t.set_column(t.column_names.index("user_id"), "user_id", t["caption"]))


def empty(source):
    shutil.rmtree(source)
    source.mkdir()


def mix(source):
    rewrite(
        first_file(source),
        lambda t: t.append_column("jpg_0", [[b""] * len(t)]).append_column("jpg_1", [[b""] * len(t)]),
    )


BAD = {
    cut_short: "train-00000-of-00003.parquet in .* is no whole Parquet file",
    cut_out_of_the_middle: "train-00000-of-00003.parquet in .* is no whole Parquet file",
    drop_column: "train-00000-of-00003.parquet lacks the column 'label_1'",
    change_type: "has the column 'user_id' as string instead of whole numbers",
    empty: "has no file",
    shutil.rmtree: "has no file",
    mix: "has no pictures, unlike",
}


@pytest.mark.parametrize("harm", BAD, ids=lambda harm: harm.__name__)
def test_bad_input_is_one_sentence_and_leaves_no_set(plain, tmp_path, harm):
    source, folder = tmp_path / "source", tmp_path / "set"
    shutil.copytree(plain.source, source)
    harm(source)
    with pytest.raises(DataError, match=BAD[harm]) as raised:
        make_set(source, folder)
    assert "\n" not in str(raised.value)
    assert [p for p in folder.rglob("*") if p.is_file() and ".work" not in p.parts] == []
