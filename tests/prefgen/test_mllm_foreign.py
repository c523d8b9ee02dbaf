"""Folders that hold something else than a preference MLLM: each is named for what it is, with advice that helps."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.history import PreferenceHistory
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from tests.prefgen.tiny_mllms import write_folder

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0123456789abcdef' * 4}\nsize 4967\n"
WEB_PAGE = "<!DOCTYPE html>\n<html><head><title>Access to model is restricted</title></head></html>\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm") / "sound", "SmolVLM2")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "tasty mllm")


def edit(folder, name="config.json", **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def rewrite(folder, change, metadata=None):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata=metadata or {"format": "pt"})


class TestALoraInAModelsFolder:
    """transformers applies it where peft is installed and not elsewhere."""

    def write(self, folder):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")

    def test_beside_the_weights_it_is_sent_to_its_place(self, folder, refused_mllm):
        self.write(folder)
        assert "models/prefgen/mllm_lora" in refused_mllm(folder, "LoRA beside its weights")
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_model.safetensors").unlink()
        assert PreferenceMLLM.load(folder).fingerprint["lora"] is None

    def test_alone_it_is_told_from_a_model(self, folder, tmp_path, refused_mllm):
        alone = tmp_path / "taste lora"
        alone.mkdir()
        self.write(alone)
        assert "models/prefgen/mllm_lora/taste lora" in refused_mllm(alone, "LoRA alone")
        shutil.copy(folder / "config.json", alone)  # some trainers put the base's config beside it
        refused_mllm(alone, "LoRA alone")


QUANTISED = {
    "awq": ({"quant_method": "awq", "bits": 4}, "awq"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
    "bitsandbytes 8": ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
    "fp8": ({"quant_method": "fp8"}, "fp8"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "modelopt": ({"quant_algo": "NVFP4"}, "NVFP4"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_folder_is_named_by_its_method(folder, refused_mllm, kind):
    settings, method = QUANTISED[kind]
    edit(folder, quantization_config=settings)
    text = refused_mllm(folder, "quantised")
    assert method in text and "choose the unquantised one" in text and "download" not in text


def test_a_quantised_decoder_alone_and_one_for_mlx(folder, refused_mllm):
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text_config | {"quantization_config": {"quant_method": "awq"}})
    refused_mllm(folder, "quantised .awq.")
    edit(folder, text_config=text_config, quantization={"group_size": 64, "bits": 4})
    refused_mllm(folder, "quantised .MLX.")


@pytest.mark.parametrize(
    ("ending", "tensor"),
    [
        ("qweight", torch.zeros(4, 4, dtype=torch.int32)),
        ("SCB", torch.zeros(4)),
        ("weight.absmax", torch.zeros(4)),
        ("weight.quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8)),
        ("weight_scale_inv", torch.zeros(1, 1)),
        ("weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
        ("weight", torch.zeros(4, 4, dtype=torch.float8_e4m3fn)),
        ("weight", torch.zeros(4, 4, dtype=torch.int8)),
    ],
)
def test_quantised_weights_are_known_without_their_config(folder, refused_mllm, ending, tensor):
    rewrite(folder, lambda tensors: tensors | {f"model.text_model.layers.0.self_attn.q_proj.{ending}": tensor})
    assert "unquantised" in refused_mllm(folder, "quantised")


def test_weights_for_another_framework(folder, refused_mllm):
    rewrite(folder, lambda tensors: tensors, {"format": "mlx"})
    refused_mllm(folder, "converted for mlx")


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["q4_k_m.gguf", "mmproj.gguf"], "GGUF"),
        (["onnx/decoder.onnx"], "ONNX"),
        (["openvino_model.xml"], "another program"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_folders_of_other_programs(folder, refused_mllm, names, word, config):
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"GGUF")
    assert "choose the folder of the unquantised transformers model" in refused_mllm(folder, word)


def test_other_files_beside_sound_weights_are_no_matter(folder):
    (folder / "onnx").mkdir()
    (folder / "onnx" / "decoder.onnx").write_bytes(b"")
    (folder / "old.safetensors.part").write_bytes(b"")
    assert PreferenceMLLM.load(folder)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "clip", "gemma3", "qwen3_vl_text"])
def test_models_of_other_kinds_are_named(folder, refused_mllm, kind):
    edit(folder, model_type=kind)
    assert "SmolVLM2" in refused_mllm(folder, f"holds a {kind}")


def test_diffusers_folders(folder, tmp_path, refused_mllm):
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.4"})
    )
    refused_mllm(folder, "part of a diffusers model")
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text("{}")
    refused_mllm(folder, "diffusers pipeline")


@pytest.mark.parametrize("inner", ["SmolVLM2-500M", "snapshots/0123abc", "models--x--y/snapshots/0123abc"])
def test_a_folder_one_level_too_high_names_the_right_one(sound, tmp_path, refused_mllm, inner):
    shutil.copytree(sound, tmp_path / "high" / inner)
    assert inner in refused_mllm(tmp_path / "high", "subfolder")


def test_a_file_in_place_of_a_folder(tmp_path, refused_mllm):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused_mllm(tmp_path / "model.safetensors", "is a file")


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SILENT = ["chat_template.jinja", "preprocessor_config.json", "generation_config.json"]  # a folder may lack them


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("content", "word"), [(LFS, "Git LFS pointer"), (WEB_PAGE, "web page")])
def test_a_pointer_or_a_page_in_place_of_a_file(folder, refused_mllm, name, content, word):
    (folder / name).write_text(content)
    assert name in refused_mllm(folder, word)


@pytest.mark.parametrize("name", FILES + SILENT)
def test_a_link_to_nowhere_is_named(folder, refused_mllm, name):
    """Hugging Face's cache copied without what its links name."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "blobs" / "0123abc")
    assert name in refused_mllm(folder, "link to a file that isn't there")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_the_system_does_not_hand_out_is_not_called_damaged(folder, refused_mllm, name, monkeypatch):
    """As a file that belongs to somebody else; whoever runs the tests may be root, who may read all."""
    import pathlib

    opened = pathlib.Path.open

    def refuse(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path, **options: refuse(path, **options).read())
    text = refused_mllm(folder, "may not be read")
    assert name in text and "download" not in text


@pytest.mark.parametrize(
    "waiting",
    [
        "model.safetensors.part",
        "model.safetensors.crdownload",
        "model.safetensors.incomplete",
        ".cache/huggingface/download/Cz0b.4d7a2146.incomplete",
    ],
)
def test_a_download_that_has_not_ended(folder, refused_mllm, waiting):
    (folder / "model.safetensors").unlink()
    (folder / waiting).parent.mkdir(parents=True, exist_ok=True)
    (folder / waiting).write_bytes(b"\0" * 100)
    refused_mllm(folder, "isn't downloaded yet")


def test_a_file_that_aria2_is_still_filling(folder, refused_mllm):
    """It is as long as it will be from the start."""
    (folder / "model.safetensors.aria2").write_bytes(b"\0")
    refused_mllm(folder, "isn't downloaded yet")


def test_weights_under_a_name_that_transformers_does_not_look_for(folder, refused_mllm):
    (folder / "model.safetensors").rename(folder / "smolvlm.safetensors")
    text = refused_mllm(folder, "has no model.safetensors")
    assert "smolvlm.safetensors" in text


class TestConfigsAndWeightsThatDoNotBelongTogether:
    def test_more_layers_than_the_config_says(self, folder, refused_mllm):
        """transformers reads with the first ones, in silence."""
        text = json.loads((folder / "config.json").read_text())["text_config"]
        edit(folder, text_config=text | {"num_hidden_layers": 3})
        assert "layers.3" in refused_mllm(folder, "no place for")

    def test_more_layers_that_see_than_the_config_says(self, folder, refused_mllm):
        vision = json.loads((folder / "config.json").read_text())["vision_config"]
        edit(folder, vision_config=vision | {"num_hidden_layers": 1})
        refused_mllm(folder, "no place for")

    def test_another_width(self, folder, refused_mllm):
        text = json.loads((folder / "config.json").read_text())["text_config"]
        edit(folder, text_config=text | {"intermediate_size": 48})
        assert "download it again" not in refused_mllm(folder, "can't be loaded")

    def test_what_is_computed_may_stand_in_the_file(self, folder):
        rewrite(folder, lambda t: t | {"model.text_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
        assert PreferenceMLLM.load(folder)

    def test_without_a_language_head_histories_are_read_and_questions_refused(self, folder, sound, one_sentence):
        rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("lm_head")})
        headless, read = PreferenceMLLM.load(folder), PreferenceHistory.from_images([torch.rand(16, 16, 3)])
        assert torch.equal(headless.encode(read), PreferenceMLLM.load(sound).encode(read))
        with pytest.raises(MLLMError, match="no language head") as raised:
            headless.answer(read)
        one_sentence(raised)

    def test_a_head_that_is_shared_with_the_words_is_none_that_is_missing(self, tmp_path):
        folder = write_folder(tmp_path / "shared", "SmolVLM2", text={"tie_word_embeddings": True})
        edit(folder, tie_word_embeddings=True)
        rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("lm_head")})
        assert isinstance(
            PreferenceMLLM.load(folder).answer(PreferenceHistory.from_images([torch.rand(16, 16, 3)])), str
        )

    def test_an_image_token_that_the_tokenizer_lacks(self, folder, refused_mllm):
        edit(folder, image_token_id=10**6)
        refused_mllm(folder, "from one release")

    def test_without_a_generation_config_it_still_answers(self, folder):
        (folder / "generation_config.json").unlink(missing_ok=True)
        answer = PreferenceMLLM.load(folder).answer(PreferenceHistory.from_images([torch.rand(16, 16, 3)]), limit=3)
        assert isinstance(answer, str)


def test_memory_that_runs_out_while_loading_is_not_called_damage(folder, refused_mllm, monkeypatch):
    from prefgen.mllm import loading

    def load(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 1 TB")

    monkeypatch.setattr(loading, "load_image_text_to_text", load)
    assert "download" not in refused_mllm(folder, "Memory ran out")


TOKENIZER_FAULTS = {
    "data did not match any variant of untagged enum ModelWrapper": "newer than the installed tokenizers can read",
    "unknown variant `Fuse`": "update transformers",
    "it is not what it was": r"missing or damaged \(it is not what it was\): download them again",
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_tokenizer_that_cannot_be_read_is_told_with_what_helps(folder, refused_mllm, monkeypatch, fault):
    from transformers import AutoTokenizer

    def refuse(*_, **__):
        raise ValueError(fault)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    refused_mllm(folder, TOKENIZER_FAULTS[fault])


def test_a_tokenizer_that_needs_a_package_names_it(folder, refused_mllm, monkeypatch):
    from transformers import AutoTokenizer

    def refuse(*_, **__):
        raise ImportError("LlamaTokenizer requires the SentencePiece library but it was not found in your environment.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    refused_mllm(
        folder, "lack tokenizer.json: put it there from where the model comes from, or pip install sentencepiece"
    )


@pytest.mark.parametrize("settings", ["awq", ["awq"]])
def test_a_quantisation_that_is_no_object_is_named_as_it_stands(folder, refused_mllm, settings):
    edit(folder, quantization_config=settings)
    refused_mllm(folder, r"is quantised \(")
