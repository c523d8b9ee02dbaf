"""The CLIP image encoder that training reads with: the same as the nodes', or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from prefgen.image_encoder import described
from training.common.clip_vision import ClipVision, ClipVisionError

TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER, projection_dim=16)).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_it_tells_which_encoder_it_is_and_a_copy_at_half_precision_is_the_same(folder):
    about = ClipVision(folder).about
    assert about["architecture"] == "CLIP" and about["hidden_size"] == 32 and len(about["digest"]) == 64
    rewrite(folder, lambda tensors: {key: value.half() for key, value in tensors.items()})
    assert ClipVision(folder).about == about
    rewrite(folder, lambda tensors: {key: value * 1.01 for key, value in tensors.items()})
    assert ClipVision(folder).about["digest"] != about["digest"]


@pytest.mark.parametrize("kind", ["bare tower", "SigLIP"])
def test_an_encoder_whose_weights_would_be_drawn_at_random_is_refused(folder, kind):
    if kind == "SigLIP":
        SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder)
    else:
        rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if "projection" not in key})
    with pytest.raises(ClipVisionError) as raised:
        ClipVision(folder)
    text = str(raised.value)
    assert "clip" in text and "\n" not in text and "download it whole" not in text, text


def test_its_digest_is_that_of_the_model_it_reads_with(folder):
    vision = ClipVision(folder)
    assert vision.about == described(vision.model.state_dict())
