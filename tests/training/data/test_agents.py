"""Simulated users: a pure function of seed, user and item; whole after any interruption; drawn by either renderer."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefgen.atelier import captions
from prefgen.atelier import users as atelier_users
from tests.training.commands import content, kill_a_ray_worker, start
from training.data import engine, ray_engine
from training.data.agents import __main__ as command
from training.data.agents import people, renderers, vocabulary
from training.data.agents.make import Population, make, make_one, picture_rows
from training.data.check import check
from training.data.errors import DataError
from training.data.schema import TEST, TRAIN, normal_prompt, prompt_split, user_split
from training.data.store import shard_name

ROOT = Path(__file__).parents[3]
SMALL = Population(users=7, pictures=96, seed=3, shard_users=2, renderer=renderers.Atelier(16), vocabulary_file=None)
OPTIONS = "--users 7 --pictures 96 --seed 3 --shard-users 2 --size 16".split()
WORLDS = {"atelier": vocabulary.atelier(), "real": vocabulary.load()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The small set, made without any interruption."""
    folder = tmp_path_factory.mktemp("agents") / "whole"
    make(SMALL, folder, processes=1)
    return folder


def run(*words, **options):
    return start("data.agents", *words, **options)


def test_the_paper_s_numbers_are_met_exactly():
    counts = [people.picture_count(user, 50_153, 990_998) for user in range(50_153)]
    assert sum(counts) == 990_998 and set(counts) == {19, 20}


def test_the_set_is_whole_and_its_check_agrees(undisturbed):
    assert [faults for _, faults in check(undisturbed, pictures=True)] == [[]] * 8
    assert sum(pq.read_metadata(undisturbed / shard_name(n)).num_rows for n in range(4)) == 96
    assert pq.read_table(undisturbed / "users.parquet")["user"].to_pylist() == list(range(7))


def test_parts_on_several_machines_make_the_same_bytes(undisturbed, tmp_path, capsys):
    make(SMALL, tmp_path / "set", 1, part=(1, 2))
    assert "2 shards of other parts are missing" in capsys.readouterr().out
    assert not (tmp_path / "set/manifest.json").exists()
    make(SMALL, tmp_path / "set", 1, part=(0, 2))
    assert content(tmp_path / "set") == content(undisturbed)


def test_one_user_made_alone_is_bit_identical(undisturbed, tmp_path):
    make_one(SMALL, tmp_path, 4)
    alone = pq.read_table(tmp_path / "user-0000004.parquet").to_pylist()
    assert alone == [row for row in pq.read_table(undisturbed / "pictures").to_pylist() if row["user"] == 4]
    assert len(alone) == SMALL.count(4)
    make_one(SMALL, tmp_path / "again", 4)
    assert set(content(tmp_path / "again").values()) == {content(tmp_path)["user-0000004.parquet"]}
    with pytest.raises(DataError, match="holds a whole set"):
        make_one(SMALL, undisturbed, 4)


def test_a_user_does_not_depend_on_how_many_others_there_are():
    more = Population(70, 960, 3, 64, SMALL.renderer, None)
    shared = min(SMALL.count(2), more.count(2)) // 2 * 2 - 2  # without the held-out pair, which is the last
    assert picture_rows(SMALL, 2)[:shared] == picture_rows(more, 2)[:shared]
    other = Population(7, 96, 4, 2, SMALL.renderer, None)
    assert picture_rows(SMALL, 2)[0]["image"] != picture_rows(other, 2)[0]["image"]


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_in_the_same_bytes(undisturbed, tmp_path):
    folder, moments, mtimes = tmp_path / "set", random.Random(5), {}
    finished = folder / ".work/finished"
    for files in (0, 1, 2, 4, 6, 8):  # so many are finished, and then some moments later
        process = run(folder, *OPTIONS, "--processes", 2)
        while process.poll() is None and len(list(finished.glob("*.json"))) < files:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()  # the parent alone: its workers must end by themselves
        process.communicate()
        for note in finished.glob("pictures-*.json"):
            shard = folder / json.loads(note.read_text())["file"]
            mtimes.setdefault(shard, (shard.stat().st_ino, shard.stat().st_mtime_ns))
    process = run(folder, *OPTIONS, "--processes", 2)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert content(folder) == content(undisturbed)
    # What was finished when a kill came was not made again.
    assert mtimes and mtimes == {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in mtimes}


DYING = """
import itertools, os, signal, sys
from pathlib import Path
import matplotlib.figure, matplotlib.backends.backend_agg
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier

def attempt(moment):
    replace, steps = os.replace, itertools.count()
    def dying(*names):
        if next(steps) == moment: os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if next(steps) == moment: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = dying
    make(Population(7, 96, 3, 2, Atelier(16), None), Path(sys.argv[1]), processes=1)

for moment in itertools.count():
    child = os.fork()
    if child == 0:
        attempt(moment)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(moment)
        break
"""


@pytest.mark.slow
def test_killed_just_before_and_just_after_renames_the_set_is_still_the_same(undisturbed, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DYING, tmp_path / "set"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert int(done.stdout.split()[-1]) >= 8, done.stderr  # kills before it came through
    assert content(tmp_path / "set") == content(undisturbed)


def test_a_killed_worker_is_named_and_the_command_can_be_repeated():
    with pytest.raises(DataError, match="The same command goes on"):
        list(engine.run(os._exit, [9], processes=2))


def test_the_ray_engine_makes_the_same_bytes_though_a_worker_is_killed(undisturbed, tmp_path):
    pytest.importorskip("ray")
    folder = tmp_path / "set"
    process = run(folder, *OPTIONS, "--processes", 2, "--engine", "ray")
    kill_a_ray_worker(process)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert content(folder) == content(undisturbed)


def test_without_ray_its_engine_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match="needs Ray: pip install"):
        list(ray_engine.run(abs, [1]))


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence_and_keeps_the_good_part(undisturbed, tmp_path):
    import resource

    folder = tmp_path / "set"
    largest = max(p.stat().st_size for p in (undisturbed / "pictures").iterdir())

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))

    process = run(folder, *OPTIONS, "--processes", 1, preexec_fn=small_disk)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"Can't write {folder}" in errors and "the disk is full" in errors
    assert not list(folder.rglob("*.tmp")) and not (folder / "manifest.json").exists()
    make(SMALL, folder, 1)
    assert content(folder) == content(undisturbed)


def test_a_finished_set_is_left_alone_and_another_configuration_refused(undisturbed, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    make(SMALL, undisturbed, 1)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(DataError, match="seed=3 instead of 9"):
        make(Population(7, 96, 9, 2, SMALL.renderer, None), undisturbed, 1)
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="holds other files"):
        make(SMALL, tmp_path, 1)


def test_a_shard_cut_short_before_it_was_noted_is_made_again(undisturbed, tmp_path):
    make(SMALL, tmp_path / "set", 1, part=(0, 4))
    shard = tmp_path / "set" / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-100])
    for note in (tmp_path / "set/.work/finished").iterdir():
        note.unlink()
    make(SMALL, tmp_path / "set", 1)
    assert content(tmp_path / "set") == content(undisturbed)


def test_damaged_files_that_were_deleted_are_made_again_and_nothing_else(undisturbed, tmp_path):
    folder = Path(shutil.copytree(undisturbed, tmp_path / "set"))
    for name in (shard_name(2), "users.parquet"):
        (folder / name).unlink()
    before = (folder / shard_name(1)).stat()
    make(SMALL, folder, 1)
    assert content(folder) == content(undisturbed)
    assert (folder / shard_name(1)).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("words", WORLDS.values(), ids=WORLDS)
def test_users_have_about_fifty_opinions_and_a_share_has_two_tastes(words):
    agents = [people.agent(words, 0, user) for user in range(400)]
    opinions = [sum((t > 0).sum() for t in a.tastes) + (a.dislikes > 0).sum() for a in agents]
    assert min(45, len(words.keys)) <= min(opinions) and 47 <= np.mean(opinions) <= 53
    assert 0.13 < np.mean([len(a.tastes) == 2 for a in agents]) < 0.27
    for agent in agents:
        assert not any((taste > 0)[agent.dislikes > 0].any() for taste in agent.tastes)
        assert all(0 <= w <= 1 for weights in (*agent.tastes, agent.dislikes) for w in (weights.min(), weights.max()))


def test_the_atelier_s_strong_opinions_are_those_of_its_users():
    words = WORLDS["atelier"]
    for number in range(20):
        person, agent = atelier_users.user(number, 3), people.agent(words, 3, number)
        strong = [{words.keys[i] for i in np.flatnonzero(t >= people.STRONG[0])} for t in agent.tastes]
        assert strong == [{f"{family}/{name}" for family, name in taste.liked} for taste in person.tastes]
        assert agent.split == atelier_users.split(number)


@pytest.mark.parametrize("words", WORLDS.values(), ids=WORLDS)
def test_pictures_show_what_their_verdict_says(words):
    liked_shown, disliked_shown = [], []
    for user in range(60):
        agent = people.agent(words, 0, user)
        taste = np.maximum.reduce(agent.tastes)
        for item in people.items(words, agent, 0, range(10)):
            shown = list(item.attributes)
            families = words.family_of[shown]
            assert len(set(families.tolist())) == len(shown) and (not words.every_family or len(shown) == 10)
            assert not any(words.excludes[i] & set(shown) for i in shown)
            strong = (agent.dislikes[shown] >= people.STRONG[0]).sum()
            assert strong == 0 if item.liked else strong >= 2
            (liked_shown if item.liked else disliked_shown).append((taste[shown] >= people.STRONG[0]).sum())
    assert np.mean(liked_shown) > 2.5 > 1 > np.mean(disliked_shown)


@pytest.mark.parametrize("words", WORLDS.values(), ids=WORLDS)
def test_pairs_share_a_prompt_and_no_prompt_or_user_leaks(words):
    prompts = {TRAIN: set(), TEST: set()}
    for user in range(80):
        agent = people.agent(words, 0, user)
        items = people.items(words, agent, 0, range(20))
        assert [i.prompt for i in items[::2]] == [i.prompt for i in items[1::2]]
        assert [i.liked for i in items] == [True, False] * 10
        assert agent.split == user_split(user)
        prompts[agent.split] |= {normal_prompt(i.prompt) for i in items}
    assert prompts[TRAIN] and prompts[TEST] and not prompts[TRAIN] & prompts[TEST]


def test_splits_never_change():
    """Fixed for ever: a set made next year must not leak into one made today."""
    assert [u for u in range(60) if user_split(u) == TEST] == [u for u in range(60) if atelier_users.split(u) == "test"]
    assert prompt_split("a lighthouse") == prompt_split("  A  LIGHTHOUSE ") == TRAIN
    heldout = {captions.neutral(*pair) for pair in captions.heldout_prompts()}
    assert {prompt for _, prompt in WORLDS["atelier"].prompts[TEST]} == heldout


def test_the_real_world_s_vocabulary_holds_together():
    words = WORLDS["real"]
    content = json.loads(vocabulary.REAL_WORLD.read_text())
    assert 450 <= len(words.keys) <= 600 and len(words.families) >= 15 and len(content["subjects"]) >= 120
    assert len({normal_prompt(s) for s in content["subjects"]}) == len(content["subjects"])
    assert sum(map(len, words.excludes)) == 2 * len({frozenset(pair) for pair in content["excludes"]}) > 200
    for one, others in enumerate(words.excludes):
        for other in others:
            assert one in words.excludes[other] and words.family_of[one] != words.family_of[other]
    assert 8 < len(words.prompts[TEST]) < 0.2 * len(content["subjects"])
    assert "," not in "".join([*words.phrases, *content["subjects"]])  # commas part the phrases of a prompt


def small_vocabulary(**changed):
    families = {f"family {f}": [f"thing {f}.{i}" for i in range(10)] for f in range(8)}
    content = {"name": "toy", "version": "1", "families": families, "excludes": []}
    return content | {"subjects": [f"subject {i}" for i in range(60)]} | changed


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "is no vocabulary"),
        ("[]", "is no vocabulary"),
        (json.dumps({"name": "x"}), "needs name, version, families"),
        (json.dumps(small_vocabulary(families={"a": ["b", "b"]})), "'a/b' twice"),
        (json.dumps(small_vocabulary(excludes=[["family 0/thing 0.0", "family 9/none"]])), "name two attributes"),
        (json.dumps(small_vocabulary(subjects=["a cat"])), "too small"),
        (json.dumps(small_vocabulary(families=small_vocabulary()["families"] | {"none": []})), "none empty"),
    ],
)
def test_a_vocabulary_that_does_not_hold_together_is_explained(tmp_path, text, sentence):
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(DataError, match=sentence):
        vocabulary.load(tmp_path / "words.json")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--users", "0"], "at least 1"),
        (["--processes", "-2"], "no whole number from 0 on"),
        (
            ["--renderer", "diffusers", "--pipeline", str(ROOT / "tiny"), "--allow-download", "--jpeg", "101"],
            "from 1 to 100",
        ),
        (["--users", "5", "--pictures", "9"], "at least twice --users"),
        (["--size", "100"], "multiples of 16"),
        (["--renderer", "diffusers"], "needs --pipeline"),
        (["--renderer", "diffusers", "--pipeline", "nowhere"], "not a folder with a model_index.json"),
        (["--vocabulary", str(vocabulary.REAL_WORLD)], "draws its own vocabulary only"),
        (["--part", "4/4"], "N/COUNT"),
        (["--engine", "spark"], "invalid choice"),
        (["--engine", "ray", "--renderer", "diffusers"], "one command a device, with --part"),
    ],
)
def test_a_wrong_command_line_is_explained_and_leaves_nothing(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(sys, "argv", ["agents", str(tmp_path / "set"), *words])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert sentence in f"{stopped.value}{capsys.readouterr().err}"
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny random StableDiffusionPipeline in a folder; nothing is fetched."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from training.atelier import tokenizers

    folder = tmp_path_factory.mktemp("pipeline")
    size = tokenizers.write_clip(folder / "words", ["a cat"])
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **blocks,
    )
    parts = (
        vae,
        CLIPTextModel(text),
        CLIPTokenizer.from_pretrained(folder / "words"),
        unet,
        DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    loaded = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    loaded.save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.mark.slow
def test_a_pipeline_of_diffusers_paints_the_real_world(pipeline, tmp_path, monkeypatch):
    options = f"--renderer diffusers --pipeline {pipeline} --size 16 --steps 2 --batch 3".split()

    def call(folder, *more):
        monkeypatch.setattr(sys, "argv", ["agents", str(folder), *options, *"--users 3 --pictures 18".split(), *more])
        command.main()

    call(tmp_path / "set")
    assert [faults for _, faults in check(tmp_path / "set", pictures=True)] == [[]] * 8
    rows = pq.read_table(tmp_path / "set/pictures").to_pylist()
    assert len({row["image"] for row in rows}) == 18
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    assert manifest["config"]["pipeline"] == "tiny" and manifest["config"]["vocabulary"] == "real-world"
    assert {"diffusers", "torch", "transformers"} <= set(manifest["versions"])
    call(tmp_path / "alone", "--user", "1")
    alone = pq.read_table(tmp_path / "alone/user-0000001.parquet").to_pylist()
    assert alone == [row for row in rows if row["user"] == 1]
    call(tmp_path / "jpeg", "--user", "1", "--jpeg", "80")
    jpeg = pq.read_table(tmp_path / "jpeg/user-0000001.parquet")["image"].to_pylist()
    assert all(image.startswith(b"\xff\xd8") for image in jpeg)


def test_a_pipeline_reads_the_subject_and_every_attribute():
    words = WORLDS["real"]
    item = people.items(words, people.agent(words, 0, 1), 0, [0])[0]
    prompt = renderers.enriched_prompt(words, item).split(", ")
    assert prompt[0] == item.prompt and prompt[1:] == [words.phrases[i] for i in item.attributes] and len(prompt) > 3


def test_a_folder_that_is_no_pipeline_is_explained(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match="Can't load the pipeline"):
        renderers.Diffusers(str(tmp_path), 16).render(WORLDS["real"], [people.Item(0, 0, True, "x", "x", (), 1)])


@pytest.mark.slow
def test_the_bar_counts_pictures_and_ctrl_c_leaves_a_sentence(tmp_path):
    process = run(tmp_path / "set", "--users", 400, "--pictures", 8000, "--shard-users", 5)
    deadline = time.monotonic() + 900
    # By the sixth shard both workers have started.
    while len(list((tmp_path / "set").glob("pictures/*.parquet"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "8000" in errors and "picture/s" in errors and "The same command goes on from here" in errors
