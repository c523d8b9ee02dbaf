"""Adapter files, every way they can be wrong: refused in one sentence that names the file, and never opened as code."""

import dataclasses
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.adapter import FORMAT_VERSION
from prefgen.adapter_checks import check_compatible
from prefgen.adapter_file import load_adapter, save_adapter
from prefgen.errors import AdapterError
from tests.prefgen.adapters import header_of, rewrite


@pytest.fixture
def saved(tmp_path, new_adapter):
    path = tmp_path / "taste.safetensors"
    save_adapter(new_adapter(), path)
    return path


def test_a_header_of_any_length_is_read(tmp_path, new_adapter):
    path = tmp_path / "taste.safetensors"
    for length in range(0, 256, 8):
        save_adapter(new_adapter(training={"note": "x" * length}), path)
        load_adapter(path)


def test_the_keys_are_those_of_an_ip_adapter_beside_our_own(saved, new_adapter):
    tensors, header = load_file(saved), new_adapter().header
    ip = {f"ip_adapter.{i}.to_{s}_ip.weight" for i in (1, 3, 5) for s in "kv"}
    projection = {f"image_proj.{m}.{p}" for m in ("proj.0", "proj.2", "norm") for p in ("weight", "bias")}
    norms = {f"prefgen.{n}.{s}" for n in ("sem_norm", "core_norm") for s in ("mean", "std")}
    assert ip | projection | norms <= set(tensors)
    assert all(key.startswith("prefgen.aligner.") for key in set(tensors) - ip - projection - norms)
    assert tensors["ip_adapter.3.to_k_ip.weight"].shape == (48, header.cross_attention_dim)
    assert tensors["image_proj.proj.0.weight"].shape[0] % header.user_width == 0  # diffusers asks for a whole multiple


def test_every_weight_comes_back(saved, new_adapter):
    loaded = load_adapter(saved).state_dict()
    original = new_adapter().state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[key], value) for key, value in original.items())


def test_half_precision_files_are_read_as_fp32(saved):
    rewrite(saved, {key: value.half() for key, value in load_file(saved).items()})
    assert {value.dtype for value in load_adapter(saved).state_dict().values()} == {torch.float32}


def test_a_file_is_known_by_its_bytes(saved, new_adapter):
    digest = load_adapter(saved).digest
    assert load_adapter(saved).digest == digest
    save_adapter(new_adapter(seed=1), saved)
    assert load_adapter(saved).digest != digest


def test_entries_that_a_later_version_adds_are_passed_over(saved):
    rewrite(saved, {"prefgen.later": torch.ones(2)}, {"later": "a word"})
    load_adapter(saved)


def test_a_folder_under_an_adapters_name(tmp_path, refused):
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_truncated_anywhere_and_whole_again(saved, share, refused):
    content = saved.read_bytes()
    saved.write_bytes(content[: max(1, int(len(content) * share))])
    assert "damaged" in refused(saved)
    saved.write_bytes(content)
    load_adapter(saved)


@pytest.mark.parametrize("content", [b"<html>404</html>" * 10, b"\0" * 64, struct.pack("<Q", 2**62) + b"{}"])
def test_a_download_that_is_something_else(saved, content, refused):
    saved.write_bytes(content)
    refused(saved)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_pickle_is_never_opened(saved, how, refused):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    if how == "pickle":
        saved.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"bomb": Bomb()}, saved, _use_new_zipfile_serialization=how == "torch")
    assert "pickle" in refused(saved)


def test_an_export_without_its_header_reads_as_the_ip_adapter_that_it_looks_like(saved, refused):
    save_file({k: v for k, v in load_file(saved).items() if not k.startswith("prefgen.")}, saved)
    assert "FaceID" in refused(saved)


@pytest.mark.parametrize("entry", ["", "{", "null", "[]", "3", "{}", '{"format_version": 1}'])
def test_a_mangled_header(saved, entry, refused):
    rewrite(saved, metadata={"prefgen": entry})
    assert "header" in refused(saved)


@pytest.mark.parametrize("version", [None, "one", [1]])
def test_a_format_version_that_is_no_number(saved, version, refused):
    rewrite(saved, header={"format_version": version})
    assert "header" in refused(saved)


def test_a_newer_format_whose_header_has_other_fields(saved, refused):
    rewrite(saved, metadata={"prefgen": json.dumps({"format_version": FORMAT_VERSION + 1, "parts": [1, 2]})})
    assert "update PrefGen" in refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"sem_layers": None},
        {"sem_layers": [1, 2]},
        {"sem_layers": [3, 4, 5, 6]},
        {"core_layer": 6},
        {"core_layer": "3"},
    ],
)
def test_a_header_that_names_layers_which_do_not_exist(saved, change, refused):
    rewrite(saved, header={"mllm": header_of(saved)["mllm"] | change})
    assert "header" in refused(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["ip_adapter.3.to_v_ip.weight", "image_proj.norm.bias", "prefgen.sem_norm.std"])
def test_one_weight_that_is_not_a_number_is_found(saved, bad, key, refused):
    tensor = load_file(saved)[key]
    tensor.view(-1)[1] = bad
    rewrite(saved, {key: tensor})
    assert key in refused(saved)


@pytest.mark.parametrize(
    "key",
    [
        "image_proj.proj.0.weight",
        "image_proj.proj.2.bias",
        "image_proj.norm.weight",
        "ip_adapter.1.to_k_ip.weight",
        "ip_adapter.5.to_v_ip.weight",
        "prefgen.aligner.mlp.0.weight",
        "prefgen.aligner.mlp.2.weight",
        "prefgen.sem_norm.mean",
        "prefgen.core_norm.std",
    ],
)
@pytest.mark.parametrize("replacement", [None, torch.zeros(3, 5), torch.zeros(7), torch.zeros(())])
def test_a_weight_that_is_missing_or_of_another_shape(saved, key, replacement, refused):
    rewrite(saved, {key: replacement})
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"semantic_width": 13},
        {"core_width": 15},
        {"image_width": "8"},
        {"cross_attention_dim": 23},
        {"tokens": 5},
        {"tokens": -1},
        {"block_widths": [32, 48, 33]},
        {"block_widths": [32, 48, 32, 32]},
        {"block_widths": 3},
        {"block_widths": None},
        {"block_widths": [32, 48]},
    ],
)
def test_a_header_that_speaks_of_other_weights(saved, change, refused):
    rewrite(saved, header=change)
    assert "damaged" in refused(saved)


@pytest.mark.parametrize(
    ("family", "widths", "text_width", "hint", "words"),
    [
        ("sdxl", (32, 48), 16, "SD1.5", ("for SDXL", "SD1.5")),
        ("sdxl", (32, 48), 16, "sd15", ("for SDXL", "SD1.5")),
        ("sd15", (64, 48, 32), 24, "SDXL", ("for SD1.5", "SDXL")),
        ("atelier", (32, 48), 24, "SD1.5", ("the atelier", "SD1.5")),
        ("sd15", (32,), 99, "", ("for SD1.5", "99")),
        ("somebody's own", (32,), 24, "SDXL", ("somebody's own", "SDXL")),
        ("sdxl", (32, 48), 24, "SDXL", ("SDXL", "variant")),
    ],
)
def test_a_model_that_it_was_not_made_for_is_named(new_adapter, family, widths, text_width, hint, words, one_sentence):
    header = dataclasses.replace(new_adapter().header, base_family=family)
    check_compatible(header, (32, 48, 32), 24, hint)
    with pytest.raises(AdapterError) as raised:
        check_compatible(header, widths, text_width, hint)
    text = one_sentence(raised)
    assert all(word in text for word in words), text
