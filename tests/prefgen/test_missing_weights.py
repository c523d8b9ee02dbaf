"""What files lack is said in a sentence, and encoders are called by their names."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.ip_adapter import EMBEDDING, STATES, encoder_name
from prefgen.mllm.files import MLLMError
from prefgen.mllm.model import PreferenceMLLM
from tests.prefgen.tiny_mllms import write_folder


def test_an_mllm_without_one_of_its_weights_is_not_read_with_random_ones(tmp_path, one_sentence):
    folder = write_folder(tmp_path / "smol", "SmolVLM2")
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "layers.0.self_attn.q_proj" in name and "text" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MLLMError) as raised:
        PreferenceMLLM.load(folder)
    assert "1 weights are missing" in one_sentence(raised) and "q_proj" in str(raised.value)
    without_head = {k: v for k, v in weights.items() if not k.startswith("lm_head")}
    save_file(without_head, folder / "model.safetensors", {"format": "pt"})
    assert isinstance(PreferenceMLLM.load(folder).device, torch.device), "histories are read without it"


@pytest.mark.parametrize(
    ("reads", "width", "name"),
    [
        (EMBEDDING, 768, "CLIP ViT-L"),
        (EMBEDDING, 1024, "CLIP ViT-H"),
        (EMBEDDING, 1280, "CLIP ViT-bigG"),
        (STATES, 1024, "CLIP ViT-L"),
        (STATES, 1280, "CLIP ViT-H"),
        (STATES, 1664, "CLIP ViT-bigG"),
        (STATES, 768, "a CLIP vision model of width 768"),
        (EMBEDDING, 512, "a CLIP vision model of width 512"),
    ],
)
def test_an_encoder_is_called_by_its_name_or_by_its_width(reads, width, name):
    assert encoder_name(reads, width) == name
