"""CLIP outside ComfyUI: an encoder of transformers or open_clip, told from another by what it makes of one picture."""

import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from prefgen.adapter_checks import check_encoded
from prefgen.clip import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, ClipError, ClipText, ClipVision
from prefgen.encoded import EncodedPreference
from prefgen.errors import AdapterError
from prefgen.image_encoder import described, fixed_picture, likeness
from tests.prefgen.adapters import random_adapter
from training.common.bases import load_base
from training.common.config.command import load
from training.evaluation.scores import Clip, ScoreError, open_clip_names

TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40 + n, 60, 3), np.uint8)) for n in range(3)]
TEXTS = ["a photo of a cat", "an oil painting, thick outline " * 20]


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
    assert len(about["fixed_picture"]) == 16
    rewrite(folder, lambda tensors: {key: value.half() for key, value in tensors.items()})
    assert ClipVision(folder).about["digest"] == about["digest"]
    assert likeness(ClipVision(folder).about["fixed_picture"], about["fixed_picture"]) > 0.9999


@pytest.mark.parametrize("kind", ["bare tower", "SigLIP", "DINOv2"])
def test_an_encoder_whose_weights_would_be_drawn_at_random_is_refused(folder, kind):
    if kind == "SigLIP":
        SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder)
    elif kind == "DINOv2":
        tower = TOWER | {"mlp_ratio": 1}
        Dinov2Model(Dinov2Config(**tower)).save_pretrained(folder)
    else:
        rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if "projection" not in key})
    with pytest.raises(ClipError) as raised:
        ClipVision(folder)
    text = str(raised.value)
    assert "clip" in text and "\n" not in text and "download it whole" not in text, text


def test_its_digest_is_that_of_the_model_it_reads_with(folder):
    vision = ClipVision(folder)
    assert vision.about.items() >= described(vision.model.state_dict()).items()


# open_clip


# ViT-H-14 has heads of 80 and GELU, ViT-bigG-14 heads of 104 and an inner width that is no whole multiple.
SHAPES = {
    "ViT-H": {"width": 80, "head": 40, "ratio": 4.0, "embed": 48, "text": 64, "text_heads": 4},
    "bigG": {"width": 104, "head": 52, "ratio": 4.9231, "embed": 40, "text": 40, "text_heads": 2},
}


@pytest.fixture(scope="module", params=SHAPES)
def both(request, tmp_path_factory):
    """(a transformers folder, an open_clip folder) of the same random weights."""
    shape = SHAPES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    inner = int(shape["width"] * shape["ratio"])
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": shape["embed"]}
    vision = shared | {"hidden_size": shape["width"], "intermediate_size": inner, "image_size": 56, "patch_size": 14}
    text = shared | {"hidden_size": shape["text"], "intermediate_size": 4 * shape["text"], "vocab_size": 49408}
    vision["num_attention_heads"] = shape["width"] // shape["head"]
    text["num_attention_heads"] = shape["text_heads"]
    text |= {"bos_token_id": 49406, "eos_token_id": 49407}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=shape["embed"]))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(root / "transformers")
    write_tokenizer(root / "transformers")
    config = {
        "embed_dim": shape["embed"],
        "vision_cfg": {
            "image_size": 56,
            "layers": 2,
            "width": shape["width"],
            "head_width": shape["head"],
            "mlp_ratio": shape["ratio"],
            "patch_size": 14,
        },
        "text_cfg": {"vocab_size": 49408, "width": shape["text"], "heads": shape["text_heads"], "layers": 2},
    }
    write_open_clip(root / "open_clip", config, open_clip_weights(model))
    return root / "transformers", root / "open_clip"


def write_tokenizer(folder):
    """open_clip's own vocabulary as a folder of transformers."""
    tokenizer = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(w, w): i for w, i in tokenizer.encoder.items()}))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)


def open_clip_weights(model):
    """A transformers CLIPModel's weights under open_clip's names."""
    state = model.state_dict()
    weights = {"logit_scale": state["logit_scale"], "visual.proj": state["visual_projection.weight"].T.contiguous()}
    weights["text_projection"] = state["text_projection.weight"].T.contiguous()
    for side, prefix in (("vision_model.", "visual."), ("text_model.", "")):
        tower = {key.removeprefix(side): value for key, value in state.items() if key.startswith(side)}
        weights |= {prefix + name: value for name, value in open_clip_names(tower).items()}
    weights["token_embedding.weight"] = weights.pop("embeddings.token_embedding.weight")
    for end in ("weight", "bias"):
        weights[f"ln_final.{end}"] = weights.pop(f"final_layer_norm.{end}")
    return weights


def write_open_clip(folder, config, weights):
    folder.mkdir(parents=True)
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / OPEN_CLIP_WEIGHTS)


def test_the_same_weights_give_the_same_embeddings_in_both_libraries(both):
    theirs, ours = both
    one, other = ClipVision(theirs), ClipVision(ours)
    torch.testing.assert_close(one(PICTURES), other(PICTURES), atol=1e-5, rtol=1e-5)
    assert (one.width, one.side) == (other.width, other.side) and other.about["hidden_size"] == one.about["hidden_size"]
    assert likeness(one.about["fixed_picture"], other.about["fixed_picture"]) > 0.99999
    torch.testing.assert_close(ClipText(theirs)(TEXTS), ClipText(ours)(TEXTS), atol=1e-5, rtol=1e-5)
    judges = [Clip(path) for path in both]
    torch.testing.assert_close(judges[0].images(PICTURES), judges[1].images(PICTURES), atol=1e-5, rtol=1e-5)
    prompts = [*TEXTS, ""]
    torch.testing.assert_close(
        judges[0].pickscore(PICTURES, prompts), judges[1].pickscore(PICTURES, prompts), rtol=1e-5, atol=1e-4
    )
    # The control: another text and another picture are another embedding.
    assert (judges[0].texts(["a dog"]) - judges[0].texts(["a cat"])).abs().max() > 1e-2


def test_what_e_sem_is_aligned_with_may_be_an_open_clip_tower(both):
    _, folder = both
    base = load_base(load("atelier", [f"clip_text.path={folder}"]))
    assert torch.equal(base.text_bank(TEXTS), ClipText(folder)(TEXTS))


def test_a_tokenizer_without_words_is_refused(both, tmp_path):
    """transformers would make one to which every text is the same."""
    shutil.copytree(both[0], tmp_path / "clip")
    ClipText(tmp_path / "clip")
    for name in ("tokenizer.json", "merges.txt"):
        (tmp_path / "clip" / name).unlink(missing_ok=True)
    for read in (ClipText, Clip):
        with pytest.raises((ClipError, ScoreError), match="has no tokenizer of a CLIP"):
            read(tmp_path / "clip")


def test_a_built_in_architecture_takes_its_weights_by_path(both, tmp_path, monkeypatch):
    _, folder = both
    config = json.loads((folder / OPEN_CLIP_CONFIG).read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-tiny": config}.get)
    file = folder / OPEN_CLIP_WEIGHTS
    assert torch.equal(ClipVision(file, architecture="ViT-tiny")(PICTURES), ClipVision(folder)(PICTURES))
    for path, architecture, sentence in (
        (file, None, "no architecture is none of open_clip's: name one, such as ViT-H-14"),
        (file, "ViT-huge", "ViT-huge is none of open_clip's"),
        (folder, "ViT-tiny", "says itself what it is: leave the architecture ViT-tiny out"),
    ):
        with pytest.raises(ClipError, match=sentence):
            ClipVision(path, architecture=architecture)


def test_open_clips_own_names_of_architectures_are_plain_ones():
    for name, widths in {"ViT-H-14": (1024, 1280), "ViT-bigG-14": (1280, 1664)}.items():
        config = open_clip.get_model_config(name)
        assert (config["embed_dim"], config["vision_cfg"]["width"]) == widths
        with torch.device("meta"):
            open_clip.CLIP(**config)


@pytest.mark.parametrize("fault", ["pickle", "two files", "another tower", "cut short", "other weights", "no json"])
def test_an_open_clip_folder_that_is_broken_or_foreign_is_one_sentence(both, tmp_path, fault):
    _, folder = both
    config = json.loads((folder / OPEN_CLIP_CONFIG).read_text())
    weights = load_file(folder / OPEN_CLIP_WEIGHTS)
    if fault == "another tower":
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = "convnext_base"
    if fault == "other weights":
        weights.pop("ln_final.bias")
    broken = tmp_path / "broken"
    write_open_clip(broken, config["model_cfg"], weights)
    file = broken / OPEN_CLIP_WEIGHTS
    if fault == "pickle":
        file.rename(broken / "open_clip_pytorch_model.bin")
    if fault == "two files":
        (broken / "a.safetensors").write_bytes(file.read_bytes())
        file.rename(broken / "b.safetensors")
    if fault == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    if fault == "no json":
        (broken / OPEN_CLIP_CONFIG).write_text("{")
    for kind in (ClipVision, ClipText):
        with pytest.raises(ClipError) as raised:
            kind(broken)
        assert "broken" in str(raised.value) and len(str(raised.value).splitlines()) == 1


# Another encoder


def encoded(about):
    liked = torch.zeros(1, about["width"])
    return EncodedPreference(None, liked, None, clip_vision=about)


def test_another_encoder_is_known_by_what_it_makes_of_the_fixed_picture(both):
    """Of equal width, and with the digest of the right one: neither counts."""
    theirs, ours = (ClipVision(path) for path in both)
    trained = {"name": "the right one", "width": theirs.width} | theirs.about
    header = replace(random_adapter([8], 8).header, image_width=theirs.width, clip_vision=trained, mllm=None)
    check_encoded(header, encoded({"width": ours.width} | ours.about | {"digest": "of a file that was saved anew"}))
    torch.manual_seed(5)
    for parameter in theirs.model.parameters():
        parameter.data = 0.05 * torch.randn_like(parameter)
    other = {"width": theirs.width} | theirs.about | {"fixed_picture": theirs._of_fixed_picture()}
    with pytest.raises(AdapterError, match=r"embeds the same picture otherwise \(cosine -?0\.\d\d\)") as raised:
        check_encoded(header, encoded(other))
    assert "Connect the right one in Encode" in str(raised.value)
    # A file of before has no such entry: its digest is what there is.
    old = replace(header, clip_vision={key: value for key, value in trained.items() if key != "fixed_picture"})
    check_encoded(old, encoded({"width": ours.width} | ours.about))


def test_the_fixed_picture_is_fixed():
    for side in (28, 224):
        picture = fixed_picture(side)
        assert picture.shape == (side, side, 3) and picture.min() >= 0 and picture.max() <= 1
        assert torch.equal((picture * 255).round() / 255, picture) and picture.std() > 0.2
    assert fixed_picture(28)[3, 5].mul(255).round().tolist() == [3, 32, 111]
