"""Configurations: every shipped one loads and plans, known counts come out, and bad input is one clear sentence."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from training.common.config import plan, shapes
from training.common.config.command import ConfigError, fingerprint, load, section_of

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "training" / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
MLLMS = sorted(path.stem for path in (CONFIGS / "mllm").glob("*.yaml"))
REAL = [name for name in SHIPPED if name != "atelier"]


@cache
def planned(name):
    return plan.plan(name, load(name))


def test_the_configurations_are_named_by_base_and_memory():
    assert {"atelier", "sd15_12gb", "sdxl_24gb", "sdxl_8x80gb"} <= set(SHIPPED)
    assert {"smolvlm2_2b", "idefics2_8b", "qwen25_vl_7b", "qwen3_vl_4b"} == set(MLLMS)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_loads_plans_and_says_what_it_is_for(name):
    config, header = load(name), (CONFIGS / f"{name}.yaml").read_text()
    assert header.startswith("#") and f"--config {name}" in header or name == "atelier"
    assert config.expected == "not run by us" or name == "atelier"
    text = planned(name)
    stages = ("train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention")
    for stage in (*stages, *(("export",) if name in REAL else ("atelier.vae",))):
        assert f"-m training.{stage} --config {name}" in text
    assert config.hardware in text and config.expected in text and "no estimate" not in text


@pytest.mark.parametrize("name", MLLMS)
def test_every_mllm_goes_with_every_real_base(name):
    header = (CONFIGS / "mllm" / f"{name}.yaml").read_text()
    assert "Licence: Apache-2.0" in header and f"mllm={name}" in header and "not run by us" in header
    for base in REAL:
        config = load(base, [f"mllm={name}"])
        assert config.mllm.lora.rank == config.mllm.lora.alpha == 8 and config.train_mllm.lr == 1e-5
        assert not config.train_mllm.batch % (config.train_mllm.accumulate * config.devices)


@pytest.mark.parametrize("name", REAL)
def test_a_plan_fits_the_memory_that_the_configuration_is_named_for(name):
    room = int(re.search(r"(\d+)gb", name)[1])
    needs = [float(found) for found in re.findall(r"([\d.]+) GiB a device", planned(name))]
    assert len(needs) == 5 and 1 < max(needs) < 0.85 * room


@pytest.mark.slow
def test_gradient_checkpointing_lower_batches_and_4_bit_weights_need_less_memory():
    def needs(stage, *changes):
        config = load("sd15_12gb", list(changes))
        facts = getattr(plan, f"_{stage}")(config, plan._reader(config))
        return float(re.match(r"[\d.]+", facts[1])[0])

    assert needs("train_user_attention", "base.gradient_checkpointing=true") < needs("train_user_attention")
    assert needs("train_user_attention", "train_user_attention.accumulate=16") < needs("train_user_attention")
    assert needs("train_mllm", "mllm.gradient_checkpointing=false") > needs("train_mllm")
    assert needs("train_mllm", "mllm.nf4=true") < needs("train_mllm") - 1.5


@pytest.mark.parametrize("name, millions", [("sd15_12gb", 859.52), ("sdxl_24gb", 2567.46)])
def test_the_unets_have_their_published_number_of_weights(name, millions):
    assert shapes.parameters(shapes.unet(load(name))) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name, millions", [("sd15_12gb", 83.65), ("sdxl_24gb", 83.65)])
def test_the_vae_has_its_published_number_of_weights(name, millions):
    assert shapes.parameters(shapes.vae(load(name))) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    "name, billions, modules",
    [
        ("smolvlm2_2b", 2.246785, 7 * 24),
        ("idefics2_8b", 8.402768, 7 * 32),
        ("qwen25_vl_7b", 8.292167, 7 * 28),
        ("qwen3_vl_4b", 4.437816, 7 * 36),
    ],
)
def test_the_mllms_have_their_published_number_of_weights(name, billions, modules):
    reader = plan._reader(load("sdxl_24gb", [f"mllm={name}"]))
    assert reader.parameters / 1e9 == pytest.approx(billions, abs=1e-6)
    assert reader.modules == modules, "LoRA on every linear layer of the decoder, on none of the vision tower"


def test_the_branch_has_as_many_weights_as_public_ip_adapters():
    from tests.prefgen.ip_adapter_files import TEXT, WIDTHS

    for name, family in (("sd15_12gb", "sd15"), ("sdxl_24gb", "sdxl")):
        wanted = 2 * TEXT[family] * sum(10 * width for width in WIDTHS[family])  # that file's widths are a tenth
        assert plan.branch_parameters(shapes.unet(load(name))) == wanted


def test_a_forward_pass_counts_its_operations_and_what_it_keeps():
    import torch
    from torch import nn

    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
        x = torch.empty(5, 8, requires_grad=True)
    cost = plan.cost_of(lambda: layers(x), layers)
    assert cost.flops == 2 * 5 * (8 * 16 + 16 * 4)
    assert cost.saved == 5 * 16, "frozen linear layers keep no input, GELU keeps its own"


def test_a_folders_own_configuration_goes_before_the_published_shape(tmp_path):
    (tmp_path / "sdxl/unet").mkdir(parents=True)
    small = shapes.SD15 | {"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    small |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    (tmp_path / "sdxl/unet/config.json").write_text(json.dumps(small | {"_class_name": "UNet2DConditionModel"}))
    unet = shapes.unet(load("sdxl_24gb", [f"base.path={tmp_path / 'sdxl'}"]))
    assert shapes.parameters(unet) < 10e6


def test_an_unknown_mllm_is_said_to_have_no_estimate():
    text = plan.plan("x", load("sdxl_24gb", ["mllm.path=models/another-7b"]))
    assert "models/another-7b isn't there" in text and "no estimate" in text


def test_an_mllm_of_an_unknown_family_is_said_to_be_one(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    one_layer = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlavaConfig(vision_config=CLIPVisionConfig(**one_layer), text_config=LlamaConfig(**one_layer))
    config.save_pretrained(tmp_path / "llava")
    text = plan.plan("x", load("sdxl_24gb", [f"mllm.path={tmp_path / 'llava'}"]))
    assert "llava is of a family that PrefGen doesn't know: no estimate" in text


def test_set_reaches_every_kind_of_value():
    config = load(
        "sdxl_24gb",
        [
            "train_mllm.steps=5",
            "train_mllm.lr=1.5e-4",
            "data.path=some/where",
            "base.ip_adapter=null",
            "base.gradient_checkpointing=false",
            "train_user_attention.parts=[image]",
            "mllm.lora.rank=16",
            "mllm=smolvlm2_2b",
        ],
    )
    assert config.train_mllm.steps == 5 and config.train_mllm.lr == 1.5e-4
    assert config.data.path == Path("some/where") and config.base.ip_adapter is None
    assert not config.base.gradient_checkpointing and config.train_user_attention.parts == ("image",)
    assert config.mllm.lora.rank == 16 and config.mllm.path.name == "SmolVLM2-2.2B-Instruct"
    assert load("atelier", ["atelier.vae.steps=7"]).atelier.vae.steps == 7


def test_a_file_of_ones_own_may_name_an_mllm(tmp_path):
    own = yaml.safe_load((CONFIGS / "sdxl_24gb.yaml").read_text()) | {"train_mllm": {"steps": 3}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    config = load(tmp_path / "own.yaml")
    assert config.train_mllm.steps == 3, "what the file says goes before its MLLM's"
    assert config.train_mllm.lr == 1e-5 and config.mllm.lora is not None


FAULTS = {
    "an unknown section": (["trian_mllm.steps=1"], "no key trian_mllm (did you mean train_mllm?)"),
    "an unknown key": (["train_mllm.step=1"], "no key train_mllm.step (did you mean train_mllm.steps?)"),
    "an unknown inner key": (["mllm.lora.rang=4"], "no key mllm.lora.rang (did you mean mllm.lora.rank?)"),
    "a wrong type": (["train_mllm.steps=many"], "train_mllm.steps:"),
    "a fraction of a step": (["train_mllm.batch=1.5"], "train_mllm.batch:"),
    "a negative count": (["extract.batch=-1"], "extract.batch:"),
    "a share above one": (["train_user_attention.drop_text=2"], "train_user_attention.drop_text:"),
    "an unknown part": (["train_user_attention.parts=[imge]"], "train_user_attention.parts"),
    "an unknown base": (["base.family=flux"], "base.family:"),
    "pixels that the VAE can't halve": (["base.pixels=1000"], "multiple of 64"),
    "4-bit weights without LoRA": (["mllm.nf4=true", "mllm.lora=null"], "nf4"),
    "no value": (["train_mllm.steps"], "section.key=value"),
    "no section": (["=4"], "section.key=value"),
    "an empty key": (["train_mllm.=4"], "section.key=value"),
    "a value that is no YAML": (["train_mllm.steps=[1"], "can't be read as a value"),
    "an unknown MLLM": (["mllm=gpt"], "smolvlm2_2b"),
    "too few users to probe": (["probe_layers.users=1"], "probe_layers.users:"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_a_configuration_is_one_sentence(fault):
    changes, words = FAULTS[fault]
    with pytest.raises(ConfigError) as error:
        load("sdxl_24gb", changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_real_base_without_data_an_mllm_or_a_path_is_refused(tmp_path):
    for section, words in (("data", "data.path"), ("mllm", "mllm.path"), ("clip_vision", "clip_vision.path")):
        content = yaml.safe_load((CONFIGS / "sdxl_24gb.yaml").read_text())
        del content[section]
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=words):
            load(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match="atelier"):
        load("atelier", ["data.path=somewhere"])


def test_files_that_are_none_are_one_sentence(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for name, words in (("list.yaml", "no configuration"), ("broken.yaml", "no YAML"), ("gone.yaml", "sdxl_24gb")):
        with pytest.raises(ConfigError, match=words) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_probe_belongs_to_the_mllm_that_it_read_with():
    before, after = (fingerprint(load("sdxl_24gb", changes), "probe_layers") for changes in ([], ["mllm=smolvlm2_2b"]))
    assert before != after and section_of(load("atelier"), "atelier.vae").steps == 5500


def command(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "training.train_alignment", *words]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_command_prints_the_plan_and_leaves_nothing_behind(tmp_path):
    result = command("--config", "sdxl_24gb", "--plan", "--runs", tmp_path / "runs")
    assert result.returncode == 0 and "train_user_attention" in result.stdout, result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_command_ends_with_one_sentence(tmp_path):
    result = command("--config", "sdxl_24gb", "--set", "train_alignment.stepps=1", "--runs", tmp_path / "runs")
    assert result.returncode and result.stderr.strip().count("\n") == 0 and "did you mean" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.distributed_type.value in ("MULTI_GPU", "FSDP")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_the_pipeline_scripts_start_every_stage_in_the_papers_order(tmp_path):
    order = ["train_mllm", "extract", "probe_layers", "train_alignment", "train_user_attention"]
    said = {}
    for name, script, words in (
        ("atelier", "atelier", []),
        ("shipped", "atelier", []),
        ("sdxl", "sdxl", ["sdxl_24gb"]),
    ):
        line = ["sh", ROOT / f"training/runs/{script}.sh", *words, "--set", "train_mllm.steps=1"]
        environment = os.environ | {"PYTHON": "echo", "BASE": name}
        result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr
        said[name] = [line for line in result.stdout.splitlines() if line.startswith("-m training.")]
        started = [line.split()[1].removeprefix("training.") for line in said[name]]
        assert [stage for stage in started if stage in order] == order
        assert all(find_spec(f"training.{stage}") for stage in started)
        assert all("train_mllm.steps=1" in line for line in said[name] if line.split()[1][9:] in order)
    kept = [line for line in said["shipped"] if "--start-from prefgen/atelier/weights" in line]
    assert [line.split()[1] for line in kept] == ["training.atelier.mllm_vision", "training.train_mllm"]
    assert kept[1].endswith("--set train_mllm.steps=1"), "what the caller sets counts last"
    assert not any(
        f"training.atelier.{stage} " in line for line in said["shipped"] for stage in ("vae", "clip", "unet")
    )
    assert "training.atelier.tokenizers" in said["atelier"][0] and "training.data.agents" in said["sdxl"][0]
    assert "training.export" in said["sdxl"][-1]
    stopped = {**os.environ, "PYTHON": "false"}
    result = subprocess.run(["sh", ROOT / "training/runs/atelier.sh"], env=stopped, capture_output=True, text=True)
    assert result.returncode and "goes on from there" in result.stderr
