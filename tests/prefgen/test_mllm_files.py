"""MLLM folders that are half there: told from names and headers, before any weight is read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.mllm.files import missing_shards, read_header, weight_bytes
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from tests.prefgen.tiny_mllms import write_folder


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm") / "whole", "SmolVLM2")


@pytest.fixture
def sharded(unsharded, tmp_path):
    """The same model in two shards with an index, as large models are released."""
    folder = tmp_path / "tasty mllm"
    shutil.copytree(unsharded, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_a_sharded_model_loads(sharded, unsharded):
    ours, theirs = (PreferenceMLLM.load(folder).model.state_dict() for folder in (sharded, unsharded))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_macos_and_browsers_leave_behind_is_no_shard(sharded, unsharded):
    for name in ("._model-00001-of-00002.safetensors", ".model.safetensors.crdownload", "Thumbs.db"):
        (sharded / name).write_bytes(b"\x00\x05\x16\x07 no weights")
    test_a_sharded_model_loads(sharded, unsharded)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_shard_is_named(sharded, refused_mllm, index, number):
    gone = f"model-{number:05d}-of-00002.safetensors"
    (sharded / gone).unlink()
    if not index:
        (sharded / "model.safetensors.index.json").unlink()
    assert gone in refused_mllm(sharded, "lacks")
    assert missing_shards(sharded) == [gone]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": [1]}', b"\xff\xfe"])
def test_a_damaged_index(sharded, refused_mllm, content):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    assert "index.json" in refused_mllm(sharded, "download it again")


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_shard_is_named(sharded, refused_mllm, share):
    file = sharded / "model-00002-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert file.name in refused_mllm(sharded, "not fully downloaded")


@pytest.mark.parametrize("header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"shape": [1]}}', b'{"a": {"data_offsets": []}}'])
def test_headers_that_are_none(sharded, refused_mllm, header):
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    refused_mllm(sharded, "damaged")


def test_a_header_that_claims_to_be_endless_is_not_read(sharded, refused_mllm):
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused_mllm(sharded, "damaged")


def test_a_tokenizer_that_asks_for_code(sharded, refused_mllm):
    file = sharded / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (sharded / "evil.py").write_text("raise SystemExit('code was run')")
    refused_mllm(sharded, "code of its own")


def test_a_damaged_preprocessor_file_is_named(sharded, refused_mllm):
    (sharded / "preprocessor_config.json").write_text("{")
    refused_mllm(sharded, "preprocessor_config.json")


def test_bytes_are_told_from_headers(unsharded, sharded):
    numbers = sum(tensor.numel() for tensor in load_file(unsharded / "model.safetensors").values())
    assert weight_bytes(unsharded, 2) == weight_bytes(sharded, 2) == 2 * numbers
    assert numbers * 0.56 < weight_bytes(unsharded, 2, nf4=True) < 2 * numbers
    assert set(read_header(unsharded / "model.safetensors")[0]) == set(load_file(unsharded / "model.safetensors"))


def test_a_file_of_a_header_alone_is_read_and_one_byte_less_is_damage(tmp_path):
    folder = tmp_path / "empty mllm"
    folder.mkdir()
    save_file({}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") and read_header(folder / "model.safetensors")[0] == {}
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(MLLMError, match="damaged or not fully downloaded"):
        read_header(folder / "model.safetensors")
