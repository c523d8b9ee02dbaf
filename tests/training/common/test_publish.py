"""The model card beside an export, and its upload: against a stub of the hub's calls."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest

from tests.prefgen.adapters import random_adapter
from training.common.config.command import load
from training.common.publish import NOT_SAID, PublishError, card, card_path, push


@pytest.fixture
def run(tmp_path):
    """(path of the adapter, its header, configuration, runs folder): models and data say their licences."""
    for name, head in (
        ("base", "---\nlicense: openrail++\ntags: [x]\n---\n# Base"),
        ("mllm", "no head"),
        ("clip", None),
    ):
        (tmp_path / name).mkdir()
        if head:
            (tmp_path / name / "README.md").write_text(head)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/manifest.json").write_text(json.dumps({"config": {"kind": "pamela"}}))
    (tmp_path / "set/card.md").write_text(
        "# Card\n\n## Licence notes\n\nCC BY 4.0: name\nits authors.\n\n## How to cite\n"
    )
    for stage, figures in (
        ("probe_layers", {"layer": 3}),
        ("train_alignment", {"retrieval_top1": 0.8125, "target": "traits"}),
    ):
        (tmp_path / "runs" / stage).mkdir(parents=True)
        (tmp_path / "runs" / stage / "done").write_text(json.dumps(figures))
    paths = {"base.path": "base", "mllm.path": "mllm", "clip_vision.path": "clip", "data.path": "set"}
    config = load("sd15_12gb", [f"{key}={tmp_path / name}" for key, name in paths.items()])
    mllm = {"name": "SmolVLM2", "revision": "abc", "lora": "f00d", "num_layers": 6, "hidden_size": 16}
    header = random_adapter([8], 8, mllm=mllm | {"sem_layers": [4, 5], "core_layer": 3}, base_family="sd15").header
    header.training.update(steps=40, batch=4)
    return tmp_path / "taste.safetensors", header, config, tmp_path / "runs"


def test_the_card_says_what_the_adapter_came_of(run):
    text = card(*run, ["--config", "sd15_12gb", "--out", "a taste.safetensors"])
    for said in (
        "# taste",
        "for SD1.5 (arXiv 2512.06020",
        "| base | base |",
        "| MLLM | SmolVLM2, revision abc |",
        "sha256 f00d",
        "| training | steps 40, batch 4 |",
        "| data | set, a set of kind pamela |",
        "| probe_layers | layer | 3 |\n| train_alignment | retrieval_top1 | 0.8125 |",
        "- base base: openrail++",
        f"- MLLM mllm: {NOT_SAID}",
        "- data: CC BY 4.0: name its authors.",
        "python -m training.export --config sd15_12gb --out 'a taste.safetensors'",
    ):
        assert said in text, said
    assert text.startswith("---\nlicense: other\n") and str(run[0].parent) not in text


def test_a_push_is_one_commit_to_a_private_repository(run, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def create_commit(self, repository, operations, commit_message):
            calls.append((repository, {each.path_in_repo: each.path_or_fileobj for each in operations}))
            return SimpleNamespace(commit_url="where it is")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    adapter = run[0]
    adapter.write_bytes(b"weights")
    card_path(adapter).write_text("# taste")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(b"lora")
    assert push("me/taste", adapter, tmp_path / "lora") == "where it is"
    files = {
        "taste.safetensors": str(adapter),
        "README.md": str(card_path(adapter)),
        "lora/adapter_model.safetensors": str(tmp_path / "lora/adapter_model.safetensors"),
    }
    assert calls == [("me/taste", {"private": True, "exist_ok": True}), ("me/taste", files)]


def test_what_the_hub_refuses_is_one_sentence(run, monkeypatch):
    class Api:
        def create_repo(self, *_, **__):
            raise ConnectionError("401\nno token")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run[0].write_bytes(b"weights")
    card_path(run[0]).write_text("# taste")
    with pytest.raises(
        PublishError, match="me/taste can't be uploaded to .401 no token.: .* is written, push it again"
    ):
        push("me/taste", run[0], None)
    assert len(NOT_SAID.splitlines()) == 1
