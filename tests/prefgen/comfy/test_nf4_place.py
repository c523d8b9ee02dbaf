"""Where a 4-bit model goes in ComfyUI, told without packing one: on its device at once, others wait off it."""

import pytest
import torch

from tests.prefgen.tiny_mllms import write_folder


@pytest.fixture(scope="module")
def memory(pack):
    return pack("prefgen.comfy.memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm") / "smol", "SmolVLM2")


@pytest.mark.parametrize(("precision", "nf4", "place"), [("nf4", True, "meta"), ("bf16", False, "cpu")])
def test_an_nf4_model_is_loaded_where_it_will_read_and_another_in_main_memory(
    memory, folder, monkeypatch, precision, nf4, place
):
    asked, freed = [], []
    load = memory.PreferenceMLLM.load

    def recorded(path, dtype, device="cpu", lora=None, nf4=False):
        asked.append((dtype, device, nf4))
        return load(path, dtype)

    monkeypatch.setattr(memory, "has_nf4", lambda: True)
    monkeypatch.setattr(memory, "pick_device", lambda choice: torch.device("meta"))
    monkeypatch.setattr(memory.model_management, "should_use_bf16", lambda *a, **k: True)
    monkeypatch.setattr(
        memory.model_management, "free_memory", lambda size, device, *a, **k: freed.append((size, device))
    )
    monkeypatch.setattr(memory.PreferenceMLLM, "load", recorded)
    monkeypatch.setattr(memory, "TINY", 0)
    monkeypatch.setattr(memory, "check_memory", lambda *_: None)
    memory.load_mllm(folder, precision, "auto")
    assert asked == [(torch.bfloat16, place, nf4)]
    if nf4:  # what it will take is free before it is packed, on that device
        assert (memory.weight_bytes(folder, 2, True), torch.device("meta")) in freed
    else:
        assert not freed
