"""A step of every stage on the pretend card, which has no float64. Run by tests/test_pretend_card.py in a process of
its own."""

import importlib
import json
import sys

import pytest
import torch
import yaml

from tests import pretend_card
from tests.prefgen import tiny_mllms
from tests.training import tiny_bases, tiny_clip
from training.common.errors import exit_with_message
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.vqa import make as vqa

pretend_card.insert()

STAGES = {
    "train_mllm": {"steps": 1, "batch": 8, "users": 10, "pictures": 3, "contrast": 1.0, "others": 0.25, "warmup": 0},
    "probe_layers": {"users": 3, "histories": 2, "pictures": 2},
    "extract": {"users": 20, "histories": 2, "pictures": 3, "batch": 10},
    "train_alignment": {"steps": 1, "batch": 16, "bank": 16, "hidden": 24},
    "train_user_attention": {"steps": 1, "batch": 2, "warmup": 0, "ema": 0.9, "users": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, its questions, and tiny models of every kind that a stage loads."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("world")
    make(Population(40, 800, 3, 40, Atelier(80), None), folder / "agents", processes=1)
    vqa.make(folder / "agents", folder / "vqa", 10, seed=0)
    tiny_mllms.write_folder(folder / "mllm", "SmolVLM2")
    tiny_bases.write_base(folder / "base", "sd15")
    torch.manual_seed(3)
    sizes = {"image_size": tiny_clip.SIDE, "patch_size": tiny_clip.PATCH, "projection_dim": 12}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny_clip.TOWER, **sizes)).save_pretrained(folder / "vision")
    return folder


def configuration(folder, precision):
    path = folder / f"{precision}.yaml"
    sections = {
        "hardware": "a test",
        "data": {"path": str(folder / "agents"), "questions": str(folder / "vqa")},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": 64, "precision": precision},
        "mllm": {"path": str(folder / "mllm"), "precision": precision, "lora": {"rank": 2}},
        "clip_vision": {"path": str(folder / "vision")},
    }
    path.write_text(yaml.safe_dump(sections | STAGES))
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_every_stage(folder, monkeypatch, precision):
    config = configuration(folder, precision)
    runs = folder / f"runs-{precision}"
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "card")
    for name in STAGES:
        stage = importlib.import_module(f"training.{name}")
        monkeypatch.setattr(sys, "argv", [name, "--config", str(config), "--runs", str(runs)])
        with pretend_card.Record(refuse=[torch.float64]) as record, exit_with_message():
            stage.main()
        assert record.uploads, f"{name} didn't compute on the card"
        # A stage's times are right only if every one waits for the card.
        assert ("steps" in STAGES[name]) == any("synchronize" in where for where in record.where)
        assert json.loads((runs / name / "done").read_text()) is not None
