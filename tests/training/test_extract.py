"""`extract`: arrays that a kill does not change, read as the nodes read, and refused with one sentence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.closeness import assert_close
from tests.prefgen import tiny_mllms
from tests.training import tiny_bases, tiny_clip
from tests.training.commands import kill, start, until
from training import extract
from training.common.config.schema import Extract
from training.common.errors import exit_with_message
from training.common.stage_outputs import ExtractedUsers
from training.data.worlds import DataSetWorld

ROOT = Path(__file__).parents[2]
# Is killed after its second piece.
KILLED = """
import os, signal, sys
from training import extract
read, pieces = extract.read, []
def short(*arguments):
    pieces.append(0)
    if len(pieces) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*arguments)
extract.read = short
extract.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("extract")
    tiny_bases.write_data(folder / "agents")
    tiny_mllms.write_folder(folder / "mllm", "Qwen3-VL")
    torch.manual_seed(3)
    sizes = {"image_size": tiny_clip.SIDE, "patch_size": tiny_clip.PATCH, "projection_dim": 12}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny_clip.TOWER, **sizes)).save_pretrained(folder / "vision")
    content = {
        "hardware": "a test",
        "data": {"path": str(folder / "agents")},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": 64},
        "mllm": {"path": str(folder / "mllm"), "precision": "fp32"},
        "clip_vision": {"path": str(folder / "vision")},
        "extract": {"users": 10, "histories": 2, "pictures": 3, "batch": 5},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


def main(monkeypatch, folder, runs, *changes):
    options = [word for change in changes for word in ("--set", change)]
    words = ["extract", "--config", str(folder / "run.yaml"), "--runs", str(runs), *options]
    monkeypatch.setattr(sys, "argv", words)
    with exit_with_message():
        extract.main()


@pytest.fixture(scope="module")
def straight(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        main(monkeypatch, folder, folder / "runs")
    return folder / "runs/extract"


def test_a_row_is_what_the_nodes_read_of_that_history(folder, straight):
    from prefgen.clip import ClipVision
    from prefgen.history import HistoryItem, PreferenceHistory
    from prefgen.mllm.model import PreferenceMLLM
    from prefgen.pooling import pool_image_embeds

    world, users = DataSetWorld(folder / "agents"), ExtractedUsers(folder / "runs")
    section = Extract(seed=9, pictures=3)
    mllm, vision = PreferenceMLLM.load(folder / "mllm"), ClipVision(folder / "vision")
    for row in (0, 3, 19):
        one = extract.history_of(world, section, int(users.owners[row]), row % 2)
        pictures = [torch.from_numpy(p).float() / 255 for p in world.pictures(one.pictures)]
        items = zip(pictures, one.liked.tolist(), one.prompts, strict=True)
        history = PreferenceHistory(tuple(HistoryItem(image, liked, prompt) for image, liked, prompt in items))
        # Kept in half precision, which rounds by half a unit: the rest is for the pictures' way there.
        assert_close(users.hidden[row], mllm.encode(history).numpy(), ulps=4)
        embeds = vision(tuple(pil(item.image) for item in history.liked))
        assert_close(users.images[row], pool_image_embeds(embeds).numpy(), ulps=4)
    assert isinstance(users.hidden, np.memmap) and users.hidden.shape[0] == 20
    assert users.index["clip_vision"]["width"] == users.images.shape[1] == 12
    assert users.index["mllm"]["num_layers"] == users.hidden.shape[1]


def pil(image):
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().numpy())


def test_killed_and_resumed_gives_the_same_bytes_and_repeats_no_finished_piece(folder, straight, tmp_path, monkeypatch):
    words = ["--config", folder / "run.yaml", "--runs", tmp_path, "--threads", "1"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, words)], cwd=ROOT, env=os.environ, capture_output=True, timeout=900
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert json.loads((tmp_path / "extract/arrays.json").read_text())["done"] == 10
    assert not (tmp_path / "extract/hidden.npy").exists()
    read, pieces = extract.read, []
    monkeypatch.setattr(extract, "read", lambda *arguments: pieces.append(0) or read(*arguments))
    main(monkeypatch, folder, tmp_path)
    assert len(pieces) == 2
    for name in ("hidden.npy", "images.npy", "owners.npy", "index.json"):
        assert (tmp_path / "extract" / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_image_tokens_that_are_read_once_are_those_that_are_read_each_time(folder, tmp_path, precision):
    from types import SimpleNamespace

    from prefgen.dtypes import DTYPES
    from prefgen.mllm.model import PreferenceMLLM
    from training.common.config.command import load
    from training.data.readers import Reader, data_set_tokens

    changes = ["mllm.cache_vision=true", f"mllm.precision={precision}"]
    args = SimpleNamespace(config=load(folder / "run.yaml", changes), runs=tmp_path)
    world, mllm = DataSetWorld(folder / "agents"), PreferenceMLLM.load(folder / "mllm", DTYPES[precision])
    tokens = data_set_tokens(args, world, mllm)
    assert len(tokens) == len(world.index) and isinstance(tokens, np.memmap)
    numbers = [5, 3, 77, 3]
    each_time, once = (Reader(mllm, world, cache).features(numbers) for cache in (None, tokens))
    assert_close(once.to(DTYPES[precision]), each_time.to(DTYPES[precision]), ulps=16)
    args.config = load(folder / "run.yaml")
    assert data_set_tokens(args, world, mllm) is None


def test_two_processes_killed_and_started_again_write_the_same_bytes(folder, straight, tmp_path):
    words = ("--config", folder / "run.yaml", "--runs", tmp_path)
    process = start("extract", *words, processes=2)
    until(process, (tmp_path / "extract/arrays.json").exists)
    kill(process)
    done = json.loads((tmp_path / "extract/arrays.json").read_text())["done"]
    assert done > 0
    process = start("extract", *words, processes=2)
    assert process.wait(200) == 0, process.communicate()[1]
    for name in ("hidden.npy", "images.npy", "owners.npy", "index.json"):
        assert (tmp_path / "extract" / name).read_bytes() == (straight / name).read_bytes(), name


def test_bad_input_is_one_sentence_and_nothing_is_lost(folder, straight, tmp_path, monkeypatch):
    faults = {
        "run `python -m training.train_mllm` first": "mllm.lora={rank: 2}",
        "900 are needed": "extract.users=900",
        "is no CLIP folder": f"clip_vision.path={tmp_path}",
        "another configuration": "extract.histories=3",
    }
    before = (straight / "hidden.npy").read_bytes()
    for number, (sentence, change) in enumerate(faults.items()):
        runs = folder / "runs" if "configuration" in sentence else tmp_path / str(number)
        with pytest.raises(SystemExit, match=sentence) as error:
            main(monkeypatch, folder, runs, change)
        assert "\n" not in str(error.value)
    assert (straight / "hidden.npy").read_bytes() == before
    with pytest.raises(SystemExit, match="run `python -m training.extract` first"):
        ExtractedUsers(tmp_path)


def test_a_damaged_shard_is_named(folder, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(folder / "agents", tmp_path / "agents")
    for shard in (tmp_path / "agents/pictures").glob("*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="is damaged or missing: delete it"):
        main(monkeypatch, folder, tmp_path / "runs", f"data.path={tmp_path / 'agents'}")
