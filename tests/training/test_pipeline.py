"""The whole pipeline on real architectures at tiny sizes: from a data set and its questions to the artists' file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.closeness import assert_close
from tests.prefgen import tiny_mllms
from tests.training import tiny_bases, tiny_clip, warm
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier

ROOT = Path(__file__).parents[2]
IMAGE = 16
STAGES = ("train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention")
PAIRS = {"SmolVLM2": "sd15", "Idefics2": "sdxl", "Qwen2.5-VL": "sd15", "Qwen3-VL": "sdxl"}
SECTIONS = {
    "train_mllm": {"steps": 3, "batch": 8, "users": 20, "pictures": 3, "contrast": 1.0, "others": 0.25},
    "extract": {"users": 24, "histories": 3, "pictures": 3, "batch": 8},
    "probe_layers": {"users": 8, "histories": 2, "pictures": 2},
    "train_alignment": {"steps": 3, "batch": 16, "bank": 16, "hidden": 24},
    "train_user_attention": {"steps": 3, "batch": 4, "warmup": 2, "ema": 0.9, "users": 3, "min_snr": 5.0},
}
pytestmark = pytest.mark.slow


def started(*words):
    """Python with these words, as a lab starts a stage. One thread: their number moves the last bits."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def run(module, *words):
    return warm.run([sys.executable, "-m", f"training.{module}", *words])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Data set, questions, bases and CLIP vision, which all families share."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("shared")
    make(Population(140, 3360, 3, 40, Atelier(64), None), folder / "agents", processes=1)
    result = run("data.vqa", folder / "agents", folder / "vqa")
    assert result.returncode == 0, result.stderr[-2000:]
    for family in ("sd15", "sdxl"):
        tiny_bases.write_base(folder / family, family)
    torch.manual_seed(3)
    sizes = {"image_size": tiny_clip.SIDE, "patch_size": tiny_clip.PATCH, "projection_dim": IMAGE}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny_clip.TOWER, **sizes)).save_pretrained(folder / "vision")
    return folder


def write_config(folder, shared, family, base, **changes):
    content = {
        "hardware": "a test",
        "data": {"path": str(shared / "agents"), "questions": str(shared / "vqa")},
        "base": {"family": base, "path": str(shared / base), "pixels": tiny_bases.PIXELS, "precision": "fp32"},
        "mllm": {"path": str(folder / "mllm"), "precision": "fp32", "lora": {"rank": 2}},
        "clip_vision": {"path": str(shared / "vision")},
    }
    content |= {name: section | changes.get(name, {}) for name, section in SECTIONS.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    tiny_mllms.write_folder(folder / "mllm", family)


@pytest.fixture(scope="module", params=list(PAIRS))
def exported(request, shared, tmp_path_factory):
    """(folder, family of the base) after every stage and the export."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_config(folder, shared, request.param, PAIRS[request.param])
    common = ["--config", folder / "run.yaml", "--runs", folder / "runs"]
    for stage in STAGES:
        result = run(stage, *common)
        assert result.returncode == 0, f"{stage}: {result.stderr[-3000:]}"
    result = run("export", *common, "--out", folder / "prefgen.safetensors")
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, PAIRS[request.param]


def test_the_exported_file_says_what_it_was_made_with(exported):
    from prefgen.adapter_file import load_adapter
    from prefgen.mllm.model import PreferenceMLLM

    folder, family = exported
    header = load_adapter(folder / "prefgen.safetensors").header
    assert header.base_family == family and header.image_width == IMAGE
    mllm = PreferenceMLLM.load(folder / "mllm", lora=folder / "runs/train_mllm/lora")
    assert all(header.mllm[key] == mllm.fingerprint[key] for key in ("revision", "lora", "num_layers", "hidden_size"))
    layers = json.loads((folder / "runs/probe_layers/layers.json").read_text())
    assert header.mllm["core_layer"] == layers["core_layer"] and header.mllm["sem_layers"] == layers["sem_layers"]


def test_only_the_decoder_got_a_lora_and_it_learnt(exported):
    folder, _ = exported
    tensors = load_file(folder / "runs/train_mllm/lora/adapter_model.safetensors")
    assert tensors and not any(part in key for key in tensors for part in ("vision", "visual", "connector"))
    assert any(value.any() for key, value in tensors.items() if "lora_B" in key)
    lines = [json.loads(line) for line in (folder / "runs/train_mllm/log.jsonl").read_text().splitlines()]
    assert {"answer", "reading", "identity", "contrast"} <= lines[0].keys()


def test_stock_diffusers_and_the_engine_give_the_same_residuals(exported):
    """Both run the base's UNet beside the exported branch on the same user."""
    import diffusers

    from prefgen.adapter_file import load_adapter
    from tests.prefgen.test_diffusers_pipeline import UserAttention, cross_attentions

    folder, family = exported
    adapter = load_adapter(folder / "prefgen.safetensors")
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(adapter.header.user_width, generator=generator)
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    absent = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    base = yaml.safe_load((folder / "run.yaml").read_text())["base"]["path"]
    pipeline = kind.from_pretrained(base, **absent)
    unet = pipeline.unet
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    added = {}
    if family == "sdxl":
        added = {"text_embeds": torch.randn(1, 1280, generator=generator), "time_ids": torch.ones(1, 6) * 64}

    def predict(**more):
        conditions = added | more
        with torch.no_grad():
            return unet(latents, 500, states, added_cond_kwargs=conditions or None).sample

    plain = predict()
    processors = dict(unet.attn_processors)
    ours = {name: UserAttention(()) for name in processors}
    pairs = adapter.keys_values(vector[None])
    for (k, v), name in zip(pairs, cross_attentions(unet), strict=True):
        ours[name] = UserAttention([(k.detach(), v.detach(), 1.0)])
    unet.set_attn_processor(ours)
    engine = predict()
    unet.set_attn_processor(processors)
    pipeline.load_ip_adapter(str(folder), subfolder="", weight_name="prefgen.safetensors", image_encoder_folder=None)
    stock = predict(image_embeds=[vector[None, None]])
    assert_close(engine, stock, ulps=64, unlike=plain)


@pytest.mark.parametrize("exported", ["Idefics2"], indirect=True)
def test_a_killed_stage_goes_on_to_the_same_bytes(exported, shared, tmp_path):
    """The MLLM's stage, whose core test is elsewhere: straight and killed after its first checkpoint."""
    folder, _ = exported
    common = ["--config", folder / "run.yaml", "--runs", tmp_path / "runs"]
    straight = load_file(folder / "runs/train_mllm/lora/adapter_model.safetensors")
    assert started("-c", STOP, *common).returncode == -signal.SIGKILL
    assert not (tmp_path / "runs/train_mllm/done").exists()
    result = run("train_mllm", *common)
    assert result.returncode == 0, result.stderr[-2000:]
    again = load_file(tmp_path / "runs/train_mllm/lora/adapter_model.safetensors")
    assert straight.keys() == again.keys() and all(straight[k].equal(again[k]) for k in straight)


# Saves after every step and is killed in the second.
STOP = """
import os, signal, sys
from training import train_mllm
from training.common.run import Run
steps = Run.steps
def short(self, total, save_seconds=120):
    for step in steps(self, total, 0):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step
Run.steps = short
sys.argv = ["train_mllm", *sys.argv[1:]]
train_mllm.main()
"""
