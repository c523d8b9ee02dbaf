"""4-bit weights without bitsandbytes: how many bytes they will take, and where the model is asked to go."""

import pytest
import torch
from safetensors.torch import save_file

from prefgen import compat
from prefgen.mllm import loading
from prefgen.mllm.files import weight_bytes
from prefgen.mllm.model import PreferenceMLLM
from tests.prefgen.tiny_mllms import write_folder

PACKED = 0.5 + 4 / 64  # bytes a weight: 4 bits, and a 32-bit scale for each 64 weights
DECODER = {
    "model.text_model.layers.0.self_attn.q_proj.weight": (64, 48),
    "model.text_model.layers.0.mlp.down_proj.weight": (40, 64),
}
PLAIN = {
    "model.text_model.embed_tokens.weight": (100, 64),
    "lm_head.weight": (100, 64),
    "model.vision_model.layers.0.mlp.fc1.weight": (32, 16),
    "model.visual.blocks.0.attn.qkv.weight": (32, 16),
    "model.vision_tower.layers.0.mlp.fc1.weight": (32, 16),
    "model.connector.proj.weight": (64, 16),
    "model.multi_modal_projector.linear_1.weight": (64, 16),
    "model.text_model.layers.0.input_layernorm.weight": (64,),
    "model.text_model.layers.0.self_attn.q_proj.bias": (64,),
}


def numbers(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_the_estimate_counts_the_decoders_matrices_at_4_bits_and_nothing_else(tmp_path):
    for shard, shapes in enumerate((DECODER, PLAIN)):
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / f"model-{shard}.safetensors")
    assert weight_bytes(tmp_path, 2) == 2 * numbers(DECODER | PLAIN)
    for itemsize in (2, 4):
        packed = weight_bytes(tmp_path, itemsize, nf4=True) - itemsize * numbers(PLAIN)
        assert packed == pytest.approx(PACKED * numbers(DECODER), rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm"), "SmolVLM2")


def test_an_nf4_model_is_packed_on_its_device_and_another_is_moved_there(folder, monkeypatch):
    """transformers packs the weights where the loader is told; moving them afterwards would need the memory twice."""
    places = []
    load = loading.load_image_text_to_text

    def recorded(path, dtype, nf4_device=None):
        places.append(nf4_device)
        return load(path, dtype)

    monkeypatch.setattr(loading, "load_image_text_to_text", recorded)
    packed = PreferenceMLLM.load(folder, torch.bfloat16, "cuda:0", nf4=True)
    assert places == ["cuda:0"]
    assert packed.device == torch.device("cpu"), "it stays where the loader has put it"
    assert packed.fingerprint["precision"] == "nf4"
    places.clear()
    moved = PreferenceMLLM.load(folder, torch.bfloat16, "meta")
    assert places == [None] and moved.device == torch.device("meta")
    assert moved.fingerprint["precision"] == "bfloat16"


def test_transformers_is_asked_for_nf4_of_the_decoder_alone(folder, monkeypatch):
    import transformers

    asked = {}

    class Recorder(transformers.AutoModelForImageTextToText):
        @classmethod
        def from_pretrained(cls, path, **options):
            asked.update(options)
            for name in ("device_map", "quantization_config"):
                options.pop(name, None)
            return transformers.models.auto.modeling_auto.AutoModelForImageTextToText.from_pretrained(path, **options)

    monkeypatch.setattr(transformers, "AutoModelForImageTextToText", Recorder)
    model = compat.load_image_text_to_text(folder, torch.bfloat16, "cuda:1")
    assert not model.training and model.dtype == torch.bfloat16
    assert asked["device_map"] == {"": "cuda:1"}
    wanted = asked["quantization_config"]
    assert wanted.load_in_4bit and wanted.bnb_4bit_quant_type == "nf4"
    assert wanted.bnb_4bit_compute_dtype == torch.bfloat16
    skipped = wanted.llm_int8_skip_modules
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    packed = [name for name in linear if not any(part in name.split(".") for part in skipped)]
    assert packed and all("text_model.layers." in name for name in packed)
    assert len(packed) == sum("text_model.layers." in name for name in linear)
    asked.clear()
    compat.load_image_text_to_text(folder, torch.float32)
    assert "device_map" not in asked and "quantization_config" not in asked
