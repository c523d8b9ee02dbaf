"""Public IP-Adapter files: known by what is in them, whatever their names; refused when they are something else."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.adapter_file import load_adapter
from prefgen.errors import AdapterError
from prefgen.ip_adapter import EMBEDDING, STATES, ImageAdapter
from tests.closeness import assert_close
from tests.prefgen import ip_adapter_files as files

EACH_KIND = ["ip-adapter_sd15", "ip-adapter-plus_sd15", "ip-adapter-full-face_sd15"]


@pytest.mark.parametrize("name", files.LAYOUTS)
def test_a_file_is_known_by_its_keys_and_shapes_under_any_name(tmp_path, name):
    layout, path = files.LAYOUTS[name], tmp_path / "prefgen sdxl faceid.safetensors"
    save_file(files.tensors(name), path)
    adapter = load_adapter(path)
    assert isinstance(adapter, ImageAdapter) and adapter.header.mllm is None
    assert adapter.header.base_family == layout.family
    assert adapter.header.block_widths == files.WIDTHS[layout.family]
    assert adapter.header.cross_attention_dim == files.TEXT[layout.family]
    assert adapter.reads == (EMBEDDING if layout.kind == "base" else STATES)
    assert adapter.header.tokens == {"base": 4, "plus": 16, "full": 0}[layout.kind]
    assert adapter.header.image_width == layout.width and adapter.header.clip_vision["name"] == layout.encoder


@pytest.mark.parametrize("name", EACH_KIND)
def test_half_precision_weights_stay_as_they_are_and_are_computed_with_in_fp32(tmp_path, name):
    layout, path = files.LAYOUTS[name], tmp_path / "half.safetensors"
    halves = {key: value.half() for key, value in files.tensors(name).items()}
    save_file(halves, path)
    adapter = load_adapter(path)
    assert {weight.dtype for weight in (*adapter.to_k_ip, *adapter.to_v_ip)} == {torch.float16}
    pictures = torch.ones((1, 1, layout.width) if layout.kind == "base" else (1, 1, 9, layout.width))
    k, _ = adapter.keys_values(pictures)[3]
    assert k.dtype == torch.float32
    assert_close(k, adapter.user_tokens(pictures) @ halves["ip_adapter.7.to_k_ip.weight"].float().T)


def test_the_other_name_of_the_branch_is_known(tmp_path):
    path = files.write(tmp_path, "ip-adapter_sd15")
    renamed = {key.replace("ip_adapter.", "adapter_modules."): value for key, value in load_file(path).items()}
    assert set(renamed) != set(load_file(path))
    save_file(renamed, tmp_path / "renamed.safetensors")
    pictures = torch.ones(1, 1, 1024)
    pairs = zip(*(load_adapter(p).keys_values(pictures) for p in (path, tmp_path / "renamed.safetensors")), strict=True)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def base():
    return files.tensors("ip-adapter_sd15")


def branch(numbers, width=1280, text=768):
    return {f"ip_adapter.{n}.to_{side}_ip.weight": torch.zeros(width // 10, text) for n in numbers for side in "kv"}


FACE_ID = {"image_proj.proj.0.weight": torch.zeros(1024, 512), "image_proj.proj.2.weight": torch.zeros(3072, 1024)}
FACE_ID |= {"image_proj.norm.weight": torch.zeros(768)}
OTHERS = {
    "FaceID": (FACE_ID | branch(range(1, 33, 2)), "IP-Adapter FaceID"),
    "FaceID with its LoRA": (base() | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(8, 320)}, "IP-Adapter FaceID"),
    "FaceID plus": (
        FACE_ID | {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(768, 1280)} | branch([1]),
        "IP-Adapter FaceID",
    ),
    "InstantID": (
        {"image_proj.latents": torch.zeros(1, 16, 1280), "image_proj.proj_in.weight": torch.zeros(1280, 512)}
        | branch([1, 3], text=2048),
        "InstantID",
    ),
    "something new": ({"image_proj.gate": torch.zeros(1)} | branch([1, 3]), "unknown kind"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_ip_adapter_of_another_kind_is_named(tmp_path, kind, one_sentence):
    tensors, words = OTHERS[kind]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError) as raised:
        load_adapter(tmp_path / "other.safetensors")
    text = one_sentence(raised)
    assert "other.safetensors" in text and words in text and "base, plus or full-face" in text


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", EACH_KIND)
def test_a_download_that_was_cut_off_is_refused(tmp_path, name, share, one_sentence):
    path = files.write(tmp_path, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(AdapterError) as raised:
        load_adapter(path)
    assert "damaged" in one_sentence(raised)


NEEDED = {
    "ip-adapter_sd15": ["proj.weight", "proj.bias", "norm.weight"],
    "ip-adapter-plus_sd15": ["proj_in.weight", "layers.2.1.3.weight", "norm_out.weight"],
    "ip-adapter-full-face_sd15": ["proj.0.weight", "proj.3.bias"],
}
MISSING = [(name, f"image_proj.{key}") for name, keys in NEEDED.items() for key in keys]
MISSING += [("ip-adapter_sd15", "ip_adapter.9.to_v_ip.weight"), ("ip-adapter_sd15", "ip_adapter.31.to_k_ip.weight")]


@pytest.mark.parametrize("replacement", [None, torch.zeros(3, 5), torch.zeros(7), torch.zeros(0), torch.zeros(())])
@pytest.mark.parametrize(("name", "key"), MISSING)
def test_a_weight_that_is_missing_or_of_another_shape_is_refused(tmp_path, name, key, replacement, one_sentence):
    tensors = {k: v for k, v in (files.tensors(name) | {key: replacement}).items() if v is not None}
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(AdapterError) as raised:
        load_adapter(tmp_path / "broken.safetensors")
    assert "broken.safetensors" in one_sentence(raised)


def test_a_weight_that_is_not_a_number_is_found(tmp_path, one_sentence):
    tensors = base()
    tensors["ip_adapter.31.to_k_ip.weight"][5, 5] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterError) as raised:
        load_adapter(tmp_path / "nan.safetensors")
    assert "ip_adapter.31.to_k_ip.weight" in one_sentence(raised)


def test_a_resampler_whose_heads_do_not_come_out_even_is_refused(tmp_path, one_sentence):
    tensors = files.tensors("ip-adapter-plus_sd15")
    for i in range(4):
        tensors[f"image_proj.layers.{i}.0.to_q.weight"] = torch.zeros(100, 768)
        tensors[f"image_proj.layers.{i}.0.to_kv.weight"] = torch.zeros(200, 768)
        tensors[f"image_proj.layers.{i}.0.to_out.weight"] = torch.zeros(768, 100)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError) as raised:
        load_adapter(tmp_path / "odd.safetensors")
    assert "damaged" in one_sentence(raised)
