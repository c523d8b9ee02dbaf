"""Load Preference MLLM inside ComfyUI: folders, precision, memory, and what leaves the device."""

import inspect
import json
import os
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import folder_paths
import pytest
import torch

from tests.prefgen.tiny_mllms import memory_bytes, write_folder


@pytest.fixture(scope="module")
def folders(pack):
    return pack("prefgen.comfy.folders")


@pytest.fixture(scope="module")
def memory(pack):
    return pack("prefgen.comfy.memory")


@pytest.fixture(scope="module")
def node(pack):
    return pack("nodes").LoadPreferenceMLLM


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm") / "smol", "SmolVLM2")


def sentence(raised):
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 300, text
    return text


def test_folders_of_extra_model_paths_are_listed(folders, tmp_path):
    """By ComfyUI's own reader of extra_model_paths.yaml."""
    # By its file: what other tests compile may leave another module of the name `utils`.
    file = Path(folder_paths.__file__).parent / "utils" / "extra_config.py"
    spec = spec_from_file_location("extra_config", file)
    extra_config = module_from_spec(spec)
    spec.loader.exec_module(extra_config)

    for place in ("models/prefgen/mllm/far", "models/words/near"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    lora = tmp_path / "models/prefgen/mllm_lora/taste"
    lora.mkdir(parents=True)
    (lora / "adapter_config.json").write_text("{}")
    (lora / "adapter_model.safetensors").write_bytes(b"")
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text(f"elsewhere:\n  base_path: {tmp_path}/models\n  prefgen: prefgen\n  LLM: words\n")
    extra_config.load_extra_path_config(str(config))
    assert folders.mllm_path("far") == tmp_path / "models/prefgen/mllm/far"
    assert folders.mllm_path("near") == tmp_path / "models/words/near"
    assert folders.mllm_lora_path("taste") == lora
    assert folders.mllm_lora_path("none") is None
    assert not any("adapter_model" in name for name in folders.adapters())


def test_names_that_were_not_offered_are_refused_before_anything_is_loaded(node):
    assert node.validate_inputs("atelier") is True
    assert "There is no preference MLLM named '../x'" in node.validate_inputs("../x")
    for wrong in ({"lora": "../x"}, {"precision": "int3"}, {"device": "tpu"}):
        with pytest.raises(ValueError, match="There is no") as raised:
            node.execute("atelier", **wrong)
        sentence(raised)


def test_graphs_saved_before_the_lora_still_load(node):
    names = list(inspect.signature(node.execute).parameters)
    assert names == ["mllm", "precision", "device", "lora"]
    assert node.define_schema().inputs[-1].id == "lora" and node.define_schema().inputs[-1].optional
    managed = node.execute("atelier").result[0]
    assert managed.mllm.fingerprint["lora"] is None


def test_nf4_is_offered_only_with_bitsandbytes(memory, node):
    needed = [find_spec(name) for name in ("bitsandbytes", "accelerate")]
    assert ("nf4" in memory.precisions()) == all(needed)
    if not all(needed):
        with pytest.raises(ValueError, match="bitsandbytes") as raised:
            node.execute("atelier", "nf4")
        sentence(raised)


@pytest.fixture
def nf4(memory):
    if "nf4" not in memory.precisions():
        pytest.skip("packing into 4 bits needs bitsandbytes and accelerate")


def test_nf4_on_the_cpu_is_refused_before_anything_is_loaded(node, nf4):
    with pytest.raises(ValueError, match="graphics card") as raised:
        node.execute("atelier", "nf4", "cpu")
    sentence(raised)


def test_nf4_reads_under_comfyuis_memory_management(memory, node, pack, nf4):
    """Packed, read, taken off the device and read again, as on a card: without what CPUs alone repack."""
    import comfy.model_management as management

    encode, histories = pack("prefgen.comfy.encoding").encode_history, pack("prefgen.comfy.histories")
    read = pack("prefgen.history").PreferenceHistory.from_images
    unpacked = node.execute("atelier", "fp32", "cpu").result[0]
    folder = pack("prefgen.atelier.models").MLLM_FOLDER
    mllm = pack("prefgen.mllm.model").PreferenceMLLM.load(folder, nf4=True)
    for module in mllm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    packed = memory.ManagedMLLM(mllm, torch.device("cpu"))
    assert mllm.fingerprint["precision"] == "nf4"
    assert packed.patcher.model_size() < unpacked.patcher.model_size() / 2
    for user in pack("prefgen.atelier.users").EXAMPLE_USERS.values():
        history = read(*histories.load(user)[:2])
        expected, actual = encode(history, unpacked).hidden, encode(history, packed).hidden
        assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.99
        assert not torch.equal(actual, expected)
        assert packed.patcher not in [loaded.model for loaded in management.current_loaded_models]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_every_precision_holds_its_weights_so(memory, smol, name):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    managed = memory.load_mllm(smol, name, "cpu")
    assert managed.mllm.dtype == dtype
    assert managed.mllm.fingerprint["precision"] == str(dtype).removeprefix("torch.")


def sparse(folder, smol, tensors):
    """A folder whose weights are huge on paper: holes on the disk, never read."""
    folder.mkdir()
    (folder / "config.json").write_bytes((smol / "config.json").read_bytes())
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return folder


@pytest.mark.parametrize(("precision", "advice"), [("fp32", "precision bf16"), ("bf16", "a smaller MLLM")])
def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(memory, smol, tmp_path, precision, advice):
    """1 TiB of bf16 weights; nothing of ComfyUI or the disk is played."""
    huge = sparse(tmp_path / "huge", smol, {f"layer.{i}": (2**18, 2**17) for i in range(16)})
    with pytest.raises(ValueError, match="huge needs") as raised:
        memory.load_mllm(huge, precision, "cpu")
    text = sentence(raised)
    assert advice in text and ("2048.0 GiB in fp32" in text or "1024.0 GiB in bf16" in text)
    assert ("bf16, or" in text) == (precision == "fp32")


def test_the_estimate_is_what_the_weights_take(memory, smol, pack):
    loaded = memory.load_mllm(smol, "bf16", "cpu").mllm
    estimate = pack("prefgen.mllm.files").weight_bytes(smol, 2)
    assert 0.9 * memory_bytes(loaded) < estimate < 1.1 * memory_bytes(loaded)


NO_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA later": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "ROCm": RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1.2 GB)."),
    "XPU": RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "DirectML": RuntimeError("Could not allocate tensor with 8388608 bytes. There is not enough GPU video memory!"),
    "Linux": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    "Windows": RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8."),
    "a Windows file": OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("backend", NO_MEMORY)
def test_memory_that_runs_out_is_told_in_one_sentence_whatever_the_backend(memory, smol, backend):
    import comfy.model_management as management

    managed = memory.load_mllm(smol, "fp32", "cpu")
    with pytest.raises(ValueError, match="ran out of memory while smol was reading") as raised:
        with managed.on_device():
            raise NO_MEMORY[backend]
    assert "precision bf16" in sentence(raised)
    assert managed.patcher not in [loaded.model for loaded in management.current_loaded_models]


@pytest.mark.parametrize(
    "precision, place, choice",
    [
        ("float32", "cuda", "precision bf16, device cpu, or "),
        ("float32", "cpu", "precision bf16, or "),
        ("bfloat16", "cuda", "device cpu, or "),
        ("bfloat16", "cpu", ""),
    ],
)
def test_what_takes_less_memory_is_what_there_is(memory, precision, place, choice):
    from types import SimpleNamespace

    managed = SimpleNamespace(
        mllm=SimpleNamespace(fingerprint={"precision": precision}),
        patcher=SimpleNamespace(load_device=torch.device(place)),
    )
    assert memory.ManagedMLLM._instead(managed) == choice


def test_other_errors_are_not_taken_for_it(memory, smol):
    managed = memory.load_mllm(smol, "fp32", "cpu")
    for error in (RuntimeError("shapes cannot be multiplied"), KeyError("memory"), InterruptedError()):
        with pytest.raises(type(error)) as raised, managed.on_device():
            raise error
        assert raised.value is error


@pytest.fixture
def small_card(memory, smol, monkeypatch):
    """A card with less free than the model takes: "meta" is no CPU, and moving there costs nothing."""
    import comfy.model_management as management

    card, half = torch.device("meta"), memory.load_mllm(smol, "fp32", "cpu").patcher.model_size() // 2
    free_memory = management.get_free_memory

    def free(dev=None, torch_free_too=False):
        if dev != card:
            return free_memory(dev, torch_free_too)
        return (half, half) if torch_free_too else half

    monkeypatch.setattr(management, "get_free_memory", free)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "lowvram_available", True)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "current_loaded_models", [])
    return lambda: memory.ManagedMLLM(memory.load_mllm(smol, "fp32", "cpu").mllm, card)


def places(managed):
    return {str(tensor.device) for tensor in (*managed.mllm.model.parameters(), *managed.mllm.model.buffers())}


def test_all_of_it_goes_to_a_card_that_comfyui_would_fill_in_part(memory, small_card):
    """transformers' layers don't fetch weights that stay behind."""
    import comfy.model_management as management

    by_itself, ours = small_card(), small_card()
    management.load_models_gpu([by_itself.patcher])
    assert places(by_itself) == {"cpu", "meta"}
    management.current_loaded_models.clear()
    memory.load_whole(ours.patcher)
    assert places(ours) == {"meta"}


def test_one_that_comfyui_leaves_in_part_elsewhere_is_refused_before_it_reads(small_card, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "load_models_gpu", lambda models, force_full_load: None)
    with pytest.raises(ValueError, match="ComfyUI left .* of smol off the graphics card") as raised:
        with small_card().on_device():
            pytest.fail("it read")
    assert "device cpu" in sentence(raised)


def test_what_comfyui_can_free_on_the_card_counts_and_what_sampling_needs_does_not(memory, smol, tmp_path, monkeypatch):
    """2 GiB of weights, and 1.5 GiB free."""
    import comfy.model_management as management

    large, card, cpu = sparse(tmp_path / "large", smol, {"layer.0": (2**15, 2**15)}), torch.device("meta"), "cpu"
    free = {"cpu": 2**50, "meta": 3 * 2**29}
    monkeypatch.setattr(management, "get_free_memory", lambda dev=None: free[dev.type])
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 2**28)

    def loaded(device, size):
        model = type("Loaded", (), {"device": device, "model_loaded_memory": lambda self: size})
        monkeypatch.setattr(management, "current_loaded_models", [model()])

    for there, size, fits in ((card, 0, False), (card, 2**29, False), (card, 3 * 2**28, True)):
        loaded(there, size)
        if fits:
            memory.check_memory(large, card, torch.bfloat16, False)
            continue
        with pytest.raises(ValueError, match="the graphics card has") as raised:
            memory.check_memory(large, card, torch.bfloat16, False)
        assert "device cpu" in sentence(raised)
    free["cpu"] = 2**30
    loaded(torch.device(cpu), 2**40)  # what lies in main memory can't be freed from it
    with pytest.raises(ValueError, match="main memory has 1.0 GiB") as raised:
        memory.check_memory(large, torch.device(cpu), torch.bfloat16, False)
    assert "device cpu" not in sentence(raised)


def test_directml_which_tells_one_gib_whatever_there_is_is_not_asked(memory, smol, tmp_path, monkeypatch):
    import comfy.model_management as management

    large, card = sparse(tmp_path / "large", smol, {"layer.0": (2**15, 2**15)}), torch.device("meta")
    monkeypatch.setattr(management, "get_free_memory", lambda dev=None: 2**30 if dev == card else 2**50)
    with pytest.raises(ValueError, match="large needs 2.0 GiB") as raised:
        memory.check_memory(large, card, torch.bfloat16, False)
    sentence(raised)
    monkeypatch.setattr(management, "directml_enabled", True)
    memory.check_memory(large, card, torch.bfloat16, False)


def test_a_folder_or_lora_that_has_changed_is_read_again(folders, node, smol, tmp_path, monkeypatch):
    """By what ComfyUI compares before it takes a node's last output for this one's."""
    import shutil

    roots = {"prefgen": [str(tmp_path)], "LLM": [], "ipadapter": []}
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: roots[kind])
    place, lora = tmp_path / "mllm" / "taste", tmp_path / "mllm_lora" / "mine"
    shutil.copytree(smol, place)
    lora.mkdir(parents=True)
    (lora / "adapter_config.json").write_text("{}")
    (lora / "adapter_model.safetensors").write_bytes(b"1")

    def fingerprint(lora="mine"):
        return node.fingerprint_inputs(mllm="taste", precision="auto", device="auto", lora=lora)

    seen = [fingerprint("none"), fingerprint()]
    assert fingerprint() == seen[-1] and fingerprint("none") == seen[0]
    (lora / "adapter_model.safetensors").write_bytes(b"2")
    os.utime(lora / "adapter_model.safetensors", ns=(1, 1))  # as long as before
    seen.append(fingerprint())
    (place / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(fingerprint())
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    seen.append(fingerprint())
    os.utime(place / "model.safetensors", ns=(1, 1))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    assert node.fingerprint_inputs(mllm="taste") == fingerprint(
        "none"
    )  # a graph that was saved before there were LoRAs


def test_low_vram_reads_on_the_cpu(memory, monkeypatch):
    import comfy.model_management as management

    for state in (management.VRAMState.LOW_VRAM, management.VRAMState.NO_VRAM):
        monkeypatch.setattr(management, "vram_state", state)
        assert memory.pick_device("auto") == torch.device("cpu")


def test_it_is_gone_from_the_device_when_it_has_read_also_after_an_interrupt(memory, smol, pack):
    import comfy.model_management as management

    managed = memory.load_mllm(smol, "fp32", "cpu")
    history = pack("prefgen.history").PreferenceHistory.from_images(list(torch.rand(3, 20, 20, 3)), [])
    encode = pack("prefgen.comfy.encoding").encode_history

    def loaded():
        return [m for m in management.current_loaded_models if m.model is managed.patcher]

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        encode(history, managed)
    assert not loaded()
    during = []
    managed.mllm.family.text.register_forward_pre_hook(lambda *_: during.append(len(loaded())))
    assert encode(history, managed).hidden.isfinite().all()
    assert during == [1] and not loaded()


def test_an_interrupt_is_heard_between_decoder_layers(memory, smol, pack):
    import comfy.model_management as management

    managed = memory.load_mllm(smol, "fp32", "cpu")
    history = pack("prefgen.history").PreferenceHistory.from_images(list(torch.rand(2, 20, 20, 3)), [])
    managed.mllm.family.text.layers[0].register_forward_hook(lambda *_: management.interrupt_current_processing(True))
    reached = []
    managed.mllm.family.text.layers[3].register_forward_hook(lambda *_: reached.append(True))
    with pytest.raises(management.InterruptProcessingException):
        pack("prefgen.comfy.encoding").encode_history(history, managed)
    assert not reached


@pytest.mark.parametrize("good, expected", [("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")])
def test_auto_takes_what_the_card_is_good_at(memory, monkeypatch, good, expected):
    import comfy.model_management as management

    monkeypatch.setattr(management, "should_use_bf16", lambda device: good == "bf16")
    monkeypatch.setattr(management, "should_use_fp16", lambda device: good == "fp16")
    card = torch.device("cuda")
    assert str(memory.pick_dtype("auto", card, False)) == f"torch.{expected}"
    assert (
        memory.pick_dtype("auto", card, True) == memory.pick_dtype("auto", torch.device("cpu"), False) == torch.float32
    )
