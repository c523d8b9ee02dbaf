"""Every weight of an adapter file: what precision it may have, and that each one can be used."""

import dataclasses
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefgen.adapter_file import load_adapter, save_adapter
from prefgen.errors import AdapterError
from tests.prefgen import ip_adapter_files as files

KEY = "ip_adapter.3.to_v_ip.weight"
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOATS += [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
OTHERS = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e8m0fnu]


def ours(path, new_adapter):
    save_adapter(new_adapter(), path)


def public(path, _):
    save_file(files.tensors("ip-adapter_sd15"), path)


@pytest.fixture(params=[ours, public])
def path(request, tmp_path, new_adapter):
    """An adapter file in fp32: a PrefGen export, and a public IP-Adapter."""
    request.param(tmp_path / "taste.safetensors", new_adapter)
    return tmp_path / "taste.safetensors"


def rewrite(path, change):
    """Write the file again with change(tensors) in place of its tensors, and its own metadata."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file(change(tensors), path, metadata=metadata)


def change_header(path, key, **entry):
    """Rewrite one tensor's entry of the safetensors header, the bytes stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[key] |= entry
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def weights(adapter) -> list[torch.Tensor]:
    """K and V of every block, fp32."""
    return [getattr(weight, "weight", weight).float() for weight in (*adapter.to_k_ip, *adapter.to_v_ip)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_adapter_in_any_float_loads_with_the_values_of_that_float(path, dtype):
    exact = [weight.to(dtype).float() for weight in weights(load_adapter(path))]
    rewrite(path, lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})
    read = weights(load_adapter(path))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(read, exact, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_value_that_is_no_number_is_found_in_any_float(path, dtype, refused):
    def change(tensors):
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
        bad = tensors[KEY].float()
        bad[1, 2] = float("nan")
        return tensors | {KEY: bad.to(dtype)}

    rewrite(path, change)
    assert KEY in refused(path)


def test_a_value_too_large_for_fp32_is_found(path, refused):
    rewrite(path, lambda tensors: tensors | {KEY: tensors[KEY].double() * 1e300})
    assert KEY in refused(path)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_what_is_not_stored_as_floats_is_named_with_its_type_and_never_cast(path, dtype, refused):
    rewrite(path, lambda tensors: tensors | {KEY: tensors[KEY].to(dtype)})
    text = refused(path)
    assert KEY in text and "fp16 or fp32" in text and "Download" not in text


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "Q8_0", "", "NF4"])
def test_a_dtype_that_nobody_here_knows_is_named(path, dtype, refused):
    change_header(path, KEY, dtype=dtype)
    text = refused(path)
    assert KEY in text and dtype in text and "damaged" not in text


@pytest.mark.parametrize("shape", [(0, 24), (24, 0), (0,)])
def test_a_weight_without_values_is_named(path, shape, refused):
    rewrite(path, lambda tensors: tensors | {KEY: torch.zeros(shape)})
    text = refused(path)
    assert KEY in text and "damaged" in text


@pytest.mark.parametrize("change", ["missing", "transposed", "longer", "flat"])
@pytest.mark.parametrize("key", [KEY, "ip_adapter.1.to_k_ip.weight"])
def test_a_weight_that_is_missing_or_of_another_shape_is_named(path, key, change, refused):
    def changed(tensors):
        value = tensors.pop(key)
        shapes = {"transposed": value.T.contiguous(), "longer": torch.cat([value, value]), "flat": value.flatten()}
        # A PrefGen header says how wide a block is, an IP-Adapter's K alone does: its V is then the one that differs.
        return tensors if change == "missing" else tensors | {key: shapes[change]}

    rewrite(path, changed)
    text = refused(path)
    assert key.replace("_k_", "_v_") in text.replace("_k_", "_v_") and "damaged" in text


@pytest.mark.parametrize(
    "key", ["image_proj.proj.9.weight", "ip_adapter.3.to_q_ip.weight", "ip_adapter.3.to_k_ip.bias"]
)
def test_a_weight_with_no_place_is_not_passed_over(path, key, refused):
    """A bias of a projection would count, so leaving it out would be another adapter."""
    rewrite(path, lambda tensors: tensors | {key: torch.ones(2)})
    refused(path)


@pytest.mark.parametrize(
    "key",
    ["scaled_fp8", "ip_adapter.3.to_v_ip.scale_weight", "image_proj.norm.weight_scale", "ip_adapter.1.comfy_quant"],
)
def test_fp8_with_scales_is_not_read_without_them(path, key, refused):
    def change(tensors):
        return {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()} | {key: torch.ones(1)}

    rewrite(path, change)
    text = refused(path)
    assert "quantised" in text and key in text and "fp16 or fp32" in text


def test_what_a_later_version_adds_may_have_any_dtype(path):
    rewrite(path, lambda tensors: tensors | {"prefgen.later.ids": torch.arange(3), "later": torch.zeros(0)})
    load_adapter(path)


def test_a_file_that_is_written_over_does_not_change_what_was_read(path):
    adapter = load_adapter(path)
    before = [weight.clone() for weight in weights(adapter)]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\1" * (size - size // 2))
    assert all(torch.equal(now, then) for now, then in zip(weights(adapter), before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_export_that_would_be_refused_is_not_written(tmp_path, new_adapter, value, one_sentence):
    adapter, path = new_adapter(), tmp_path / "taste.safetensors"
    save_adapter(adapter, path)
    before = path.read_bytes()
    adapter.to_v_ip[1].weight.data[0, 0] = value
    with pytest.raises(AdapterError) as raised:
        save_adapter(adapter, path)
    assert KEY in one_sentence(raised) and path.name in str(raised.value)
    assert path.read_bytes() == before


def test_nothing_is_drawn_at_random_while_a_file_is_read(path):
    state = torch.get_rng_state()
    load_adapter(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_read_inside_the_nodes_is_used_outside_of_them(path):
    with torch.inference_mode():
        adapter = load_adapter(path)
    assert not any(weight.is_inference() or weight.requires_grad for weight in weights(adapter))


def test_the_header_of_an_adapter_survives_its_weights_precision(path):
    header = load_adapter(path).header
    rewrite(path, lambda tensors: {key: value.half() for key, value in tensors.items()})
    assert dataclasses.asdict(load_adapter(path).header) == dataclasses.asdict(header)


@pytest.mark.parametrize(
    "change",
    [
        {"clip_vision": None},
        {"clip_vision": []},
        {"training": 3},
        {"mllm": ["tiny"]},
        {"kind": "ip_adapter"},
        {"kind": None},
        {"base_family": ["sdxl"]},
    ],
)
def test_a_header_whose_parts_are_something_else_is_refused_when_it_is_read(tmp_path, new_adapter, change, refused):
    path = tmp_path / "taste.safetensors"
    save_adapter(new_adapter(), path)
    header = dataclasses.asdict(new_adapter().header) | change
    save_file(load_file(path), path, metadata={"prefgen": json.dumps(header)})
    assert "header" in refused(path)


def test_a_newer_format_is_told_before_the_dtypes_that_it_may_bring(tmp_path, new_adapter, refused):
    path = tmp_path / "taste.safetensors"
    save_adapter(new_adapter(), path)
    tensors = load_file(path) | {"image_proj.scale_weight": torch.ones(1, dtype=torch.int8)}
    save_file(tensors, path, metadata={"prefgen": json.dumps({"format_version": 2})})
    assert "update PrefGen" in refused(path)
