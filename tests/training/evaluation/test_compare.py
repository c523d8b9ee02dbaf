"""Methods side by side on a tiny SD1.5 pipeline: the real command, from a data set to the table."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.prefgen import tiny_mllms
from tests.prefgen.adapters import random_adapter
from tests.training import tiny_bases, tiny_clip, warm
from training.common.errors import exit_with_message
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.evaluation.compare import __main__ as compare_command
from training.evaluation.compare.score import MEASURES

ROOT = Path(__file__).parents[3]
PROJECTION = 16
SETTING = ["--users", "3", "--prompts", "2", "--seeds", "2", "--history", "3", "--steps", "2", "--device", "cpu"]


def write_adapter(path, unet, mllm, seed, family="sd15"):
    from prefgen.adapter_file import save_adapter

    torch.manual_seed(seed)
    names = [n.removesuffix(".processor") for n in unet.attn_processors if n.endswith("attn2.processor")]
    widths = [unet.get_submodule(name).to_k.out_features for name in names]
    adapter = random_adapter(
        widths,
        unet.config.cross_attention_dim,
        (8, tiny_mllms.WIDTH, PROJECTION),
        aligner_hidden=16,
        base_family=family,
        mllm=mllm.fingerprint | {"sem_layers": [2, 3], "core_layer": 1},
    )
    for linear in (*adapter.to_k_ip, *adapter.to_v_ip):
        torch.nn.init.normal_(linear.weight, std=1.0)
    save_adapter(adapter, path)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with a data set, a base, an MLLM, CLIP vision, a CLIP judge, two adapters and the configuration."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from prefgen.mllm.model import PreferenceMLLM

    folder = tmp_path_factory.mktemp("compare")
    make(Population(40, 800, 3, 16, Atelier(32), None), folder / "set", processes=1)
    tiny_bases.write_base(folder / "base", "sd15")
    unet = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
    tiny_mllms.write_folder(folder / "mllm", "SmolVLM2")
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        **tiny_clip.TOWER, image_size=tiny_clip.SIDE, patch_size=tiny_clip.PATCH, projection_dim=PROJECTION
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "vision")
    tiny_clip.write(folder / "judge", seed=4)
    mllm = PreferenceMLLM.load(folder / "mllm")
    write_adapter(folder / "prefgen.safetensors", unet, mllm, 5)
    write_adapter(folder / "image.safetensors", unet, mllm, 6)
    write_adapter(folder / "large.safetensors", unet, mllm, 7, "sdxl")
    config = {
        "hardware": "a test",
        "data": {"path": str(folder / "set")},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": 64, "precision": "fp32"},
        "mllm": {"path": str(folder / "mllm"), "precision": "fp32"},
        "clip_vision": {"path": str(folder / "vision")},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def words_of(folder, out, *options, adapter="prefgen"):
    words = ["--config", folder / "tiny.yaml", "--adapter", folder / f"{adapter}.safetensors"]
    words += ["--image-only", folder / "image.safetensors", "--clip", folder / "judge", "--pickscore", folder / "judge"]
    words += ["--weights", "0.5"]
    return [str(word) for word in (*words, *SETTING, "--out", out, *options)]


def compare(folder, out, *options):
    line = [sys.executable, "-m", "training.evaluation.compare", *words_of(folder, out, *options)]
    return warm.run(line)


@pytest.fixture(scope="module")
def compared(studio):
    result = compare(studio, studio / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    (pictures,) = (path for path in (studio / "out").iterdir() if path.is_dir())
    return json.loads((studio / "out/compare.json").read_text()), pictures


def picture(folder, row, name):
    with Image.open(folder / row / name) as image:
        return image.tobytes()


def test_less_is_better_of_a_leak_and_of_a_distance_alone():
    assert {name for name, (_, more_is_better) in MEASURES.items() if not more_is_better} == {"leak", "cmmd"}


@pytest.mark.slow
def test_every_row_is_painted_and_scored_with_intervals(compared, studio):
    result, _ = compared
    assert list(result["rows"]) == [
        "none", "described", "described_both", "oracle", "mismatched", "prefgen", "image_only", "weight_0.5",
    ]  # fmt: skip
    assert len(result["users"]) == 3 and result["pictures"] == 12
    for row in result["rows"].values():
        for measure in ("clip_i", "cmmd", "clip_t", "pickscore", "diversity"):
            low, high = row[measure]["ci95"]
            assert low <= row[measure]["mean"] <= high and row[measure]["users"] == 3
        assert row["seconds_a_picture"] > 0
    assert result["rows"]["prefgen"]["clip_i"]["minus_prefgen"]["mean"] == 0
    weak = result["rows"]["weight_0.5"]
    assert result["rows"]["none"]["leak"]["minus_null"]["mean"] == 0 and weak["leak"]["minus_null"]["mean"] != 0
    page = (studio / "out/compare.md").read_text()
    assert page.count(f"{weak['label']} |") == 2 and "taste a leak" in page
    assert "PrefGen" in page and "python -m training.evaluation.compare" in page and "pickscore" in page


def test_rows_differ_where_the_method_does_and_share_the_noise(compared):
    _, folder = compared
    for name in ("0000-00-0.png", "0002-01-1.png"):
        none, prefgen, other = (picture(folder, row, name) for row in ("none", "prefgen", "mismatched"))
        assert len({none, prefgen, other, picture(folder, "image_only", name)}) == 4
        assert picture(folder, "oracle", name) != none
    assert picture(folder, "none", "0000-00-0.png") != picture(folder, "none", "0000-00-1.png")


@pytest.mark.slow
def test_the_same_command_paints_only_what_is_missing(compared, studio):
    _, folder = compared
    before = (studio / "out/compare.json").read_text()
    mtimes = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    gone = folder / "prefgen/0001-01-0.png"
    content = gone.read_bytes()
    gone.unlink()
    assert compare(studio, studio / "out", "--batch", "1").returncode == 0
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert {path for path in again if again[path] != mtimes[path]} == {gone}
    with Image.open(gone) as image:
        assert image.size == (64, 64)
    assert (
        len(content) > 0
        and json.loads(before)["rows"].keys() == json.loads((studio / "out/compare.json").read_text())["rows"].keys()
    )


@pytest.mark.parametrize(
    "options, adapter, sentence",
    [
        (["--users", "30"], "prefgen", "are needed"),
        (["--clip", "/nowhere"], "prefgen", "/nowhere is no CLIP folder"),
        (["--csd", "/nowhere.safetensors"], "prefgen", "holds no CSD weights"),
        ([], "large", "The adapter is for sdxl, the configuration's base is sd15."),
        (["--set", "base.path=/nowhere"], "prefgen", "/nowhere is no diffusers folder"),
        (["--set", "mllm.path=/nowhere"], "prefgen", "nowhere"),
        (["--set", "data.path=/nowhere"], "prefgen", "not a finished data set"),
        (["--config", "atelier"], "prefgen", "training.evaluation.evaluate"),
        (["--prompts", "5000"], "prefgen", "held-out prompts, 5000 are needed"),
    ],
)
def test_bad_input_is_one_sentence(studio, tmp_path, monkeypatch, options, adapter, sentence):
    from training.evaluation.compare.__main__ import main

    monkeypatch.setattr(sys, "argv", ["compare", *words_of(studio, tmp_path / "out", *options, adapter=adapter)])
    with pytest.raises(SystemExit) as stopped, exit_with_message():
        main()
    said = str(stopped.value)
    assert sentence in said and "\n" not in said
    assert not list(tmp_path.rglob("*.png"))


def test_what_is_not_said_is_48_users_and_8_pictures_each_of_30_steps(monkeypatch):
    needed = "--config sd15_24gb --adapter a.safetensors --clip clip --out out".split()
    monkeypatch.setattr(sys, "argv", ["compare", *needed])
    said = vars(compare_command.arguments())
    expected = {
        "users": 48,
        "prompts": 4,
        "seeds": 2,
        "history": 8,
        "guidance": 5.0,
        "steps": 30,
        "batch": 4,
        "seed": 0,
    }
    assert {name: said[name] for name in expected} == expected
