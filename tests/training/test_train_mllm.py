"""`train_mllm` and what it leaves: questions that belong to the data, a LoRA that peft and the engine load alike."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from prefgen.mllm.files import MLLMError
from tests.closeness import assert_close, assert_learnt_alike
from tests.prefgen import tiny_mllms
from tests.training import tiny_bases
from tests.training.commands import FSDP, start
from training import train_mllm
from training.common.config.command import load
from training.common.errors import exit_with_message
from training.data.agents.make import Population, make
from training.data.agents.renderers import Atelier
from training.data.errors import DataError
from training.data.preference_questions import Questions
from training.data.readers import Reader
from training.data.vqa import make as vqa
from training.data.vqa.questions import ANSWERS
from training.data.worlds import DataSetWorld

TWO_PIECES = ("--set", "train_mllm.batch=24", "--set", "train_mllm.accumulate=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, its questions, and a tiny LLaVA-OneVision: a family that the whole pipeline's test leaves out."""
    folder = tmp_path_factory.mktemp("train_mllm")
    tiny_bases.write_data(folder / "agents")
    vqa.make(folder / "agents", folder / "vqa", 10, seed=0)
    tiny_mllms.write_folder(folder / "mllm", "LLaVA-OneVision")
    return folder


def configured(folder, path, **changes):
    """A configuration file of these sections, with changes in them."""
    sections = {
        "hardware": "a test",
        "data": {"path": str(folder / "agents"), "questions": str(folder / "vqa")},
        "base": {"family": "sd15", "path": str(folder / "base"), "pixels": 64},
        "mllm": {"path": str(folder / "mllm"), "precision": "fp32", "lora": {"rank": 2}},
        "clip_vision": {"path": str(folder / "vision")},
        "train_mllm": {"steps": 3, "batch": 8, "users": 20, "pictures": 3, "contrast": 1.0, "others": 0.25},
    }
    sections["train_mllm"] |= {"lr": 0.01, "warmup": 1}
    for name, change in changes.items():
        sections[name] = sections[name] | change
    path.write_text(yaml.safe_dump(sections))
    return path


def train(monkeypatch, config, runs):
    monkeypatch.setattr(sys, "argv", ["train_mllm", "--config", str(config), "--runs", str(runs)])
    with exit_with_message():
        train_mllm.main()


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = configured(folder, folder / "run.yaml", mllm={"gradient_checkpointing": True})
        train(monkeypatch, config, folder / "runs")
    return folder / "runs/train_mllm"


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["held whole", "spread"])
def test_two_processes_read_as_one(folder, tmp_path, environment):
    """Each reads its own samples: some of a kind may be all in one share. Losses and weights are those of one."""
    lora = {"rank": 2, "dropout": 0.0}  # each process would leave out others
    config = configured(folder, tmp_path / "run.yaml", mllm={"lora": lora, "gradient_checkpointing": True})
    states, logs = [], []
    for processes in (1, 2):
        runs = tmp_path / str(processes)
        words = ("--config", config, "--runs", runs, *TWO_PIECES, "--set", "train_mllm.heldout_every=2")
        process = start("train_mllm", *words, processes=processes, environment=environment)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        assert ("weights of its 4 layers on each of 2 processes" in errors) == (processes > 1 and environment == FSDP)
        states.append(load_file(runs / "train_mllm/lora/adapter_model.safetensors"))
        first, *rest = (json.loads(line) for line in (runs / "train_mllm/log.jsonl").read_text().splitlines())
        heldout = next(line for line in rest if "heldout_answer" in line)
        logs.append(first | {name: value for name, value in heldout.items() if name.startswith("heldout")})
    losses = ("answer", "identity", "contrast", "reading")
    for key in ("loss", "grad_norm", *losses, *(f"heldout_{name}" for name in losses)):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4), key
    assert_learnt_alike(*states, rate=load(config).train_mllm.lr)


def test_peft_and_the_engine_read_a_history_alike_with_the_lora(folder, trained):
    from peft import PeftModel

    from prefgen.mllm.model import PreferenceMLLM

    world = DataSetWorld(folder / "agents")
    user = world.users("train")[0]
    history = world.history(user, np.random.default_rng(0), 3, 3)
    merged = Reader(PreferenceMLLM.load(folder / "mllm", lora=trained / "lora"), world).states([history])
    plain = PreferenceMLLM.load(folder / "mllm")
    untuned = Reader(plain, world).states([history])
    PeftModel.from_pretrained(plain.model, str(trained / "lora"))
    beside = Reader(plain, world).states([history])
    assert_close(merged, beside, unlike=untuned)


def test_every_loss_is_logged_and_the_folder_holds_only_the_lora(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert {"answer", "reading", "identity", "contrast"} <= lines[0].keys()
    assert {file.name for file in (trained / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {"same_user_top1", "users"} <= json.loads((trained / "done").read_text()).keys()


def test_bad_input_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_mllm, "has_nf4", lambda: False)
    make(Population(20, 240, 3, 40, Atelier(48), None), tmp_path / "other", processes=1)
    vqa.make(tmp_path / "other", tmp_path / "questions", 5, seed=0)
    faults = {
        "made of another set": {"data": {"questions": str(tmp_path / "questions")}},
        "holds no questions of training.data.vqa": {"data": {"questions": str(tmp_path)}},
        "data.questions is missing": {"data": {"questions": None}},
        "is not a finished data set": {"data": {"path": str(tmp_path)}},
        "5000 are needed": {"train_mllm": {"users": 5000}},
        "qkv match nothing": {"mllm": {"lora": {"rank": 2, "targets": ["q_proj", "qkv"]}}},
        "bitsandbytes": {"mllm": {"nf4": True}},
        "MLLM": {"mllm": {"path": str(tmp_path)}},
    }
    for number, (sentence, changes) in enumerate(faults.items()):
        config = configured(folder, tmp_path / "run.yaml", **changes)
        with pytest.raises(SystemExit, match=sentence) as error:
            train(monkeypatch, config, tmp_path / f"runs{number}")
        assert "\n" not in str(error.value)
        assert not (tmp_path / f"runs{number}/train_mllm/lora").exists()


def test_fsdp_and_nf4_are_refused_together(folder, monkeypatch, tmp_path):
    config = load(configured(folder, tmp_path / "run.yaml", mllm={"nf4": True}))
    monkeypatch.setattr(train_mllm, "has_nf4", lambda: True)
    run = SimpleNamespace(uses_fsdp=True, accelerator=SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(MLLMError, match="FSDP can't cut nf4 weights: set mllm.nf4=false"):
        train_mllm.open_mllm(SimpleNamespace(config=config), None, run)


def test_a_damaged_table_of_questions_is_one_sentence(folder, tmp_path):
    shutil.copytree(folder / "vqa", tmp_path / "vqa")
    (tmp_path / "vqa/train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="run it on"):
        Questions(DataSetWorld(folder / "agents"), tmp_path / "vqa")


@pytest.mark.parametrize("family", ["Idefics2", "Qwen2.5-VL"])
def test_answers_begin_with_a_word_of_their_own(family, tmp_path):
    """SentencePiece writes a space of its own where a text begins: no answer may begin with that."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from prefgen.mllm.model import PreferenceMLLM

    tiny_mllms.write_folder(tmp_path, family)
    words = ["▁", "▁yes", "▁no", "▁first", "▁second", "▁Assistant:", "\n", "yes", "no", "first", "second"]
    vocabulary = {piece: -float(len(words) - i) for i, piece in enumerate(words)}
    pieces = [("<unk>", -50.0), *vocabulary.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    end = "<|im_end|>" if family == "Qwen2.5-VL" else "<end_of_utterance>"
    mllm = PreferenceMLLM.load(tmp_path)
    mllm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    mllm.tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    reader = Reader(mllm, None)
    for pair in ANSWERS.values():
        first, second = (reader.answer_ids(answer) for answer in pair)
        assert first[0] != second[0] and first[-1] == second[-1] == mllm.tokenizer.convert_tokens_to_ids(end)
        assert mllm.tokenizer.decode(first[:-1]).strip() == pair[0]
