"""Configurations: every shipped one loads, and bad input is one clear sentence."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from training.common.config.command import ConfigError, default_fingerprint, fingerprint, load, section_of
from training.data.errors import DataError
from training.data.open_world import open_world

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "training" / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
MLLMS = sorted(path.stem for path in (CONFIGS / "mllm").glob("*.yaml"))
REAL = [name for name in SHIPPED if name not in ("atelier", "world")]


def test_the_configurations_are_named_by_base_and_memory():
    assert {"atelier", "sd15_12gb", "sdxl_24gb", "sdxl_8x80gb"} <= set(SHIPPED)
    assert {"smolvlm2_2b", "idefics2_8b", "qwen25_vl_7b", "qwen3_vl_4b"} == set(MLLMS)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_loads_and_says_what_it_is_for(name):
    config, header = load(name), (CONFIGS / f"{name}.yaml").read_text()
    assert header.startswith("#") and f"--config {name}" in header or name == "atelier"
    assert config.expected == "not run by us" or name == "atelier"
    assert config.hardware and "--plan" not in header


@pytest.mark.parametrize("name", MLLMS)
def test_every_mllm_goes_with_every_real_base(name):
    header = (CONFIGS / "mllm" / f"{name}.yaml").read_text()
    assert "Licence: Apache-2.0" in header and f"mllm={name}" in header and "not run by us" in header
    for base in REAL:
        config = load(base, [f"mllm={name}"])
        assert config.mllm.lora.rank == config.mllm.lora.alpha == 8 and config.train_mllm.lr == 1e-5
        assert not config.train_mllm.batch % (config.train_mllm.accumulate * (8 if "8x" in base else 1))


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
    "an unknown base": (["base.family=sd3"], "base.family:"),
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
    with pytest.raises(ConfigError, match="trait tokens"):
        load("sdxl_24gb", ["train_user_attention.teacher=traits"])
    # The second edition's users are a set, so what a folder holds decides.
    with pytest.raises(DataError, match="no set of the atelier's users"):
        open_world(load("atelier", [f"data.path={tmp_path}"]), tmp_path)


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
    warm_starts = [line for line in said["shipped"] if "--start-from prefgen/atelier/weights" in line]
    assert [line.split()[1] for line in warm_starts] == ["training.atelier.mllm_vision", "training.train_mllm"]
    assert warm_starts[1].endswith("--set train_mllm.steps=1"), "what the caller sets counts last"
    assert not any(
        f"training.atelier.{stage} " in line for line in said["shipped"] for stage in ("vae", "clip", "unet")
    )
    assert "training.atelier.tokenizers" in said["atelier"][0] and "training.data.agents" in said["sdxl"][0]
    assert "training.export" in said["sdxl"][-1]
    stopped = {**os.environ, "PYTHON": "false"}
    result = subprocess.run(["sh", ROOT / "training/runs/atelier.sh"], env=stopped, capture_output=True, text=True)
    assert result.returncode and "goes on from there" in result.stderr


def test_a_stages_defaults_are_known_by_its_dotted_name_too():
    assert default_fingerprint("train_alignment")["stage"] == "train_alignment"
    assert default_fingerprint("atelier.world.unet")["steps"] == 6000 and default_fingerprint("another.unet") == {}
