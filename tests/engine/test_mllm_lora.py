"""A LoRA merged into a preference MLLM: the same weights as peft's own merge, and a sentence for what doesn't fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prefgen.history import PreferenceHistory
from prefgen.mllm.lora import canonical, merge_lora
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from tests.engine.tiny_mllms import write_folder

RANK, ALPHA = 2, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("mllm") / "base", "SmolVLM2")


@pytest.fixture
def model(folder):
    return PreferenceMLLM.load(folder).model


def adapted(model):
    """The decoder's attention and MLP, as training adapts them."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "text_model.layers" in path and path.endswith(("q_proj", "down_proj"))
    }


def write_lora(folder, model, change=lambda tensors: tensors, **config):
    folder.mkdir(exist_ok=True)
    draw, tensors = torch.Generator().manual_seed(3), {}
    for path, module in adapted(model).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=draw) / 4
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=draw) / 4
    save_file(change(tensors), folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "models/tasty-mllm"}))
    return folder


def history():
    draw = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    return PreferenceHistory.from_images(list(draw[:2]), [draw[2]])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"down_proj": 1}}, {"down_proj": 1 / RANK, "q_proj": ALPHA / RANK}),
    ],
)
def test_every_weight_gets_scale_times_b_a(model, tmp_path, config, scale):
    lora = write_lora(tmp_path / "taste", model, **config)
    before = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    merge_lora(model, lora)
    tensors, modules = load_file(lora / "adapter_model.safetensors"), dict(model.named_modules())
    for path, weight in before.items():
        change = modules[path].weight - weight
        if path in adapted(model):
            key = f"base_model.model.{path}.lora_"
            factor = scale[path.split(".")[-1]] if isinstance(scale, dict) else scale
            assert torch.allclose(change, factor * tensors[key + "B.weight"] @ tensors[key + "A.weight"], atol=1e-5)
        else:
            assert not change.any()


def test_the_encoding_and_the_fingerprint_tell_of_the_lora(folder, model, tmp_path):
    lora = write_lora(tmp_path / "taste", model)
    plain, adapted_ = PreferenceMLLM.load(folder), PreferenceMLLM.load(folder, lora=lora)
    assert (plain.encode(history()) - adapted_.encode(history())).abs().max() > 1e-3
    told = adapted_.fingerprint["lora"]
    assert plain.fingerprint["lora"] is None and len(told) == 64
    assert plain.fingerprint | {"lora": told} == adapted_.fingerprint
    stronger = write_lora(tmp_path / "stronger", model, lora_alpha=ALPHA + 1)
    assert PreferenceMLLM.load(folder, lora=stronger).fingerprint["lora"] != told


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}}])
def test_it_is_what_peft_itself_merges(folder, model, tmp_path, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=r".*text_model\.layers\.\d+\.(self_attn\.[qv]|mlp\.down)_proj",
        **options,
    )
    wrapped = peft.get_peft_model(PreferenceMLLM.load(folder).model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = wrapped.merge_and_unload().state_dict()
    merge_lora(model, tmp_path / "theirs")
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        ("language_model.model.layers.3.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"),
        ("visual.blocks.1.attn.qkv", "model.visual.blocks.1.attn.qkv"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    ],
)
def test_paths_of_other_transformers_versions_are_the_same_layer(old, new):
    assert canonical(old) == canonical(new)


def without_last(tensors):
    return dict(list(tensors.items())[:-1])


DAMAGE = {
    "another MLLM": ({}, lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()}, "another MLLM"),
    "another width": ({}, lambda t: {k: v.repeat(1, 2) if "_A" in k else v for k, v in t.items()}, "another MLLM"),
    "half a pair": ({}, without_last, "damaged"),
    "not numbers": ({}, lambda t: {k: v * float("nan") for k, v in t.items()}, "damaged"),
    "nothing": ({}, lambda t: {}, "empty"),
    "dora": ({"use_dora": True}, None, "DoRA"),
    "dora keys": ({}, lambda t: t | {"base_model.model.x.lora_magnitude_vector": torch.ones(3)}, "no LoRA"),
    "biases": ({"bias": "all"}, None, "biases"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, None, "whole layers"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, None, "base weights"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, None, "not a LoRA"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(model, tmp_path, one_sentence, kind):
    config, change, word = DAMAGE[kind]
    lora = write_lora(tmp_path / "taste", model, change or (lambda tensors: tensors), **config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MLLMError, match=word) as raised:
        merge_lora(model, lora)
    assert "taste" in one_sentence(raised)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"words"])
def test_a_lora_folder_that_lacks_or_holds_broken_files(model, tmp_path, one_sentence, name, content):
    lora = write_lora(tmp_path / "taste", model)
    (lora / name).unlink()
    if content is not None:
        (lora / name).write_bytes(content)
    with pytest.raises(MLLMError) as raised:
        merge_lora(model, lora)
    assert "taste" in one_sentence(raised)


def test_a_lora_is_not_merged_into_four_bits(folder, model, tmp_path, one_sentence):
    with pytest.raises(MLLMError, match="nf4") as raised:
        PreferenceMLLM.load(folder, lora=write_lora(tmp_path / "taste", model), nf4=True)
    one_sentence(raised)
