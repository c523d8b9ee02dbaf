"""Stages are chained by content: what was made from something else than there is now is named by every later one."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.training import tiny_bases
from training import export
from training.common import chain, checkpoints
from training.common.config.command import load, stage_args
from training.common.config.schema import STAGES, section_kinds
from training.common.errors import exit_with_message
from training.common.folder import RunFolder
from training.data.open_world import open_world


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A data set, models of a few bytes, and the folders that every stage leaves, each written by the stages' own
    record of what it was made from."""
    folder = tmp_path_factory.mktemp("chain")
    tiny_bases.write_data(folder / "agents")
    for name in ("mllm", "vision", "base/unet", "base/text_encoder"):
        (folder / name).mkdir(parents=True)
        save_file({"weight": torch.rand(4)}, folder / name / "model.safetensors")
    content = {
        "hardware": "a test",
        "data": {"path": "agents"},
        "base": {"family": "sd15", "path": "base", "pixels": 64},
        "mllm": {"path": "mllm", "lora": {"rank": 2}},
        "clip_vision": {"path": "vision"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder


class Lab:
    """A lab's folder: its configuration, and stages that are done in an instant."""

    def __init__(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        self.runs = folder / "runs"
        self.config = load(folder / "run.yaml")

    def digest(self):
        return open_world(self.config, self.runs).digest

    def begin(self, stage, config=None):
        """A stage's folder, as its command takes it."""
        config = config or self.config
        args = stage_args(section_kinds()[stage], config, self.runs)
        return RunFolder(args, made_of=chain.made_of(config, self.runs, stage, self.digest()))

    def run(self, stage, content=0, config=None):
        """The record and the outputs of one stage."""
        folder = self.begin(stage, config)
        if stage == "train_mllm":
            (folder.folder / "lora").mkdir(exist_ok=True)
            save_file({"lora": torch.full((2,), float(content))}, folder.folder / "lora/adapter_model.safetensors")
        if stage == "extract":
            index = {"world": str(self.config.data.path), "made_of": folder.made_of}
            (folder.folder / "index.json").write_text(json.dumps(index))
            np.save(folder.folder / "owners.npy", np.arange(4))
        if stage == "probe_layers":
            layers = {"sem_layers": [2, 3], "core_layer": content}
            (folder.folder / "layers.json").write_text(json.dumps(layers))
        if stage in ("train_alignment", "train_user_attention"):
            checkpoints.write(folder.checkpoints, 1, {"weight": torch.full((2,), float(content)), "step": 1})
        folder.finish()

    def refusal(self, stage):
        with pytest.raises(SystemExit) as error:
            self.begin(stage)
        return str(error.value)


@pytest.fixture
def lab(template, tmp_path, monkeypatch):
    """All stages done, in order."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    done = Lab(tmp_path, monkeypatch)
    for stage in STAGES:
        done.run(stage)
    return done


def overwrite(path):
    save_file({"weight": torch.rand(4) + 2}, path)


def remake_data(lab):
    manifest = lab.config.data.path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"versions": {"other": "1"}}))


# What changes, in whose name, and the first stage that is stale by it.
CHANGES = {
    "remade data set": (remake_data, "data set", "train_mllm"),
    "another MLLM": (lambda lab: overwrite("mllm/model.safetensors"), "MLLM", "train_mllm"),
    "retrained LoRA": (lambda lab: overwrite("runs/train_mllm/lora/adapter_model.safetensors"), "LoRA", "extract"),
    "another CLIP": (lambda lab: overwrite("vision/model.safetensors"), "CLIP vision model", "extract"),
    "another text encoder": (
        lambda lab: overwrite("base/text_encoder/model.safetensors"),
        "text encoder",
        "train_alignment",
    ),
    "another UNet": (lambda lab: overwrite("base/unet/model.safetensors"), "UNet", "train_user_attention"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_told_by_every_later_stage_and_by_the_export(lab, change, monkeypatch):
    apply, name, first = CHANGES[change]
    for stage in STAGES:
        lab.begin(stage)  # the control: nothing is stale
    apply(lab)
    for stage in STAGES[STAGES.index(first) :]:
        said = lab.refusal(stage)
        assert f"{first} was made from another {name}" in said and "delete that folder" in said and "\n" not in said
    for stage in STAGES[: STAGES.index(first)]:
        lab.begin(stage)
    monkeypatch.setattr(sys, "argv", ["export", "--config", "run.yaml", "--runs", "runs", "--out", "x.safetensors"])
    with pytest.raises(SystemExit, match=f"{first} was made from another {name}"), exit_with_message():
        export.main()


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_stage_that_is_done_again_makes_those_after_it_stale(lab, stage):
    shutil.rmtree(lab.runs / stage)
    lab.run(stage, content=1)
    stale = {"train_mllm": "extract", "probe_layers": "train_user_attention", "train_alignment": "train_user_attention"}
    if stage == "extract":
        # The same models and pictures give the same arrays.
        lab.begin("train_user_attention")
        return
    assert f"{stale[stage]} was made from another" in lab.refusal("train_user_attention")
    for again in STAGES[STAGES.index(stage) + 1 :]:
        shutil.rmtree(lab.runs / again)
        lab.run(again)


def test_layers_that_were_changed_by_hand_make_the_aligner_stale(lab):
    (lab.runs / "probe_layers/layers.json").write_text(json.dumps({"sem_layers": [0, 1], "core_layer": 0}))
    said = lab.refusal("train_user_attention")
    assert "train_alignment was made from another choice of layers" in said


@pytest.mark.parametrize(
    ("missing", "stage", "words"),
    [
        ("extract", "train_alignment", "run `python -m training.extract` first"),
        ("probe_layers", "train_alignment", "run `python -m training.probe_layers` first"),
        ("train_alignment", "train_user_attention", "run `python -m training.train_alignment` first"),
    ],
)
def test_the_wrong_order_is_told_before_anything_is_written(lab, missing, stage, words):
    shutil.rmtree(lab.runs / missing)
    shutil.rmtree(lab.runs / stage)
    assert words in lab.refusal(stage)
    assert not (lab.runs / stage).exists()


def test_an_unfinished_aligner_is_not_taken(lab):
    (lab.runs / "train_alignment/done").unlink()
    assert "train_alignment isn't finished" in lab.refusal("train_user_attention")


def test_an_image_adapter_depends_on_no_mllm(lab):
    image = load("run.yaml", ["train_user_attention.parts=[image]"])
    assert [stage for stage in STAGES if image.needs(stage)] == ["extract", "train_user_attention"]
    assert lab.config.reads_mllm and not image.reads_mllm
    for stage in STAGES:
        shutil.rmtree(lab.runs / stage)
    for stage in ("extract", "train_user_attention"):
        lab.run(stage, config=image)
    made_of = json.loads((lab.runs / "train_user_attention/config.json").read_text())["made_of"]
    assert made_of.keys() == {"data", "extract", "unet"}
    overwrite("mllm/model.safetensors")
    chain.check_chain(image, lab.runs, lab.digest())
    # And an extraction of pictures alone isn't taken for one with an MLLM.
    said = lab.refusal("extract")
    assert "another configuration" in said and "mllm" in said


def test_a_command_that_fails_before_its_first_step_claims_nothing(lab, monkeypatch):
    for stage in STAGES:
        shutil.rmtree(lab.runs / stage)
    args = stage_args(section_kinds()["train_mllm"], lab.config, lab.runs)
    RunFolder(args)
    assert not (lab.runs / "train_mllm/config.json").exists()
    other = load("run.yaml", ["train_mllm.lr=0.5"])
    lab.run("train_mllm", config=other)
    assert json.loads((lab.runs / "train_mllm/config.json").read_text())["lr"] == 0.5


def test_a_key_that_is_newer_than_a_run_has_its_default_there(lab):
    path = lab.runs / "train_alignment/config.json"
    content = json.loads(path.read_text())
    del content["hidden"]
    path.write_text(json.dumps(content))
    lab.run("train_alignment")
    assert "hidden (512 there, 8 now)" in _refused(lab, "train_alignment.hidden=8")


def _refused(lab, change):
    path = lab.runs / "train_alignment/config.json"
    content = json.loads(path.read_text())
    content.pop("hidden")
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as error:
        lab.run("train_alignment", config=load("run.yaml", [change]))
    return str(error.value)


def test_a_finished_stage_says_that_it_is_skipped(lab, capsys):
    from training.common.run import Run

    args = stage_args(section_kinds()["train_alignment"], lab.config, lab.runs)
    run = Run(args, made_of=chain.made_of(lab.config, lab.runs, "train_alignment", lab.digest()))
    run.unlock()
    assert run.finished and "train_alignment: finished already, skipped" in capsys.readouterr().out
