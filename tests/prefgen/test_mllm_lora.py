"""A LoRA merged into a preference MLLM: the same weights as peft's own merge, and a sentence for what doesn't fit."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prefgen.history import PreferenceHistory
from prefgen.mllm.lora import ANY_VALUE, PLAIN_VALUES, canonical, check_lora, merge_lora
from prefgen.mllm.model import MLLMError, PreferenceMLLM
from tests.closeness import assert_close, assert_far
from tests.prefgen.test_mllm_foreign import edit, rewrite
from tests.prefgen.tiny_mllms import write_folder

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
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "models/tasty-mllm"}))
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
            expected = factor * tensors[key + "B.weight"] @ tensors[key + "A.weight"]
            # What is left when the old weight is taken from the new one is rounded as they are.
            assert_close(change, expected, scale=weight.abs().max() + expected.abs().max(), ulps=32)
        else:
            assert not change.any()


def test_the_encoding_and_the_fingerprint_tell_of_the_lora(folder, model, tmp_path):
    lora = write_lora(tmp_path / "taste", model)
    plain, adapted_ = PreferenceMLLM.load(folder), PreferenceMLLM.load(folder, lora=lora)
    assert_far(plain.encode(history()), adapted_.encode(history()))
    digest = adapted_.fingerprint["lora"]
    assert plain.fingerprint["lora"] is None and len(digest) == 64
    assert plain.fingerprint | {"lora": digest} == adapted_.fingerprint
    stronger = write_lora(tmp_path / "stronger", model, lora_alpha=ALPHA + 1)
    assert PreferenceMLLM.load(folder, lora=stronger).fingerprint["lora"] != digest


PLAIN = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"v_proj": 3}},
    {"rank_pattern": {"v_proj": 4}},
    {"rank_pattern": {"layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"q_proj": 2.5}, "use_rslora": True},
    {"layers_to_transform": [0, 2], "layers_pattern": "layers", "target_modules": ["q_proj", "up_proj"]},
    {"exclude_modules": r".*layers\.1\..*"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": False},
    {"lora_dropout": 0.3, "task_type": "CAUSAL_LM", "revision": "main", "inference_mode": True},
]


@pytest.mark.parametrize("options", PLAIN, ids=lambda options: "-".join(options) or "default")
def test_it_is_what_peft_itself_merges(folder, model, tmp_path, options):
    peft = pytest.importorskip("peft")
    targets = {"target_modules": r".*text_model\.layers\.\d+\.(self_attn\.[qv]|mlp\.down)_proj"}
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **targets | options)
    wrapped = peft.get_peft_model(PreferenceMLLM.load(folder).model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "theirs")
    theirs = wrapped.merge_and_unload().state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_lora(model, tmp_path / "theirs")
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    changed = [key for key, weight in theirs.items() if not torch.equal(weight, before[key])]
    assert changed and set(changed) <= {name for name in theirs if ".layers." in name}
    for key, weight in theirs.items():
        assert_close(ours[key], weight, ulps=32, unlike=before[key] if key in changed else None)


# A value that peft takes for every field that isn't harmless at any value.
NOT_PLAIN = {
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "mica", "new"],
    "megatron_config": {"tensor_model_parallel_size": 1},
    "trainable_token_indices": [1, 2],
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "use_dora": True,
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1, 2, 3],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 4},
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "ensure_weight_tying": True,
    "a_key_of_tomorrow": True,
}


@pytest.mark.parametrize("key", NOT_PLAIN)
def test_what_is_not_known_to_be_plain_is_refused_by_name(model, tmp_path, one_sentence, key):
    values = NOT_PLAIN[key] if key == "init_lora_weights" else [NOT_PLAIN[key]]
    for value in values:
        with pytest.raises(MLLMError, match=key) as raised:
            merge_lora(model, write_lora(tmp_path / "taste", model, **{key: value}))
        assert "taste" in one_sentence(raised)


def test_no_field_of_the_installed_peft_passes_unnoticed(model, tmp_path):
    """Each is known to be plain at any value, or is tried above; peft's own defaults pass."""
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert not fields - ANY_VALUE - NOT_PLAIN.keys()
    assert not (fields & ANY_VALUE) & (NOT_PLAIN.keys() | PLAIN_VALUES.keys())
    peft.LoraConfig(r=RANK, lora_alpha=ALPHA).save_pretrained(tmp_path / "default")
    settings = json.loads((tmp_path / "default" / "adapter_config.json").read_text())
    assert check_lora(write_lora(tmp_path / "taste", model, **settings | {"target_modules": ["q_proj"]}))


def test_an_alora_acts_behind_its_words_alone_so_merging_it_would_be_wrong(folder, model, tmp_path):
    """What peft computes with one is neither the model without it nor with it merged."""
    peft = pytest.importorskip("peft")
    if "alora_invocation_tokens" not in {field.name for field in dataclasses.fields(peft.LoraConfig)}:
        pytest.skip("this peft has no aLoRA")
    config = peft.LoraConfig(
        r=RANK, task_type="CAUSAL_LM", target_modules=r".*text_model.*q_proj", alora_invocation_tokens=[3]
    )
    peft.get_peft_model(PreferenceMLLM.load(folder).model, config).save_pretrained(tmp_path / "alora")
    with pytest.raises(MLLMError, match="alora_invocation_tokens"):
        merge_lora(model, tmp_path / "alora")


def test_a_public_lora_of_ms_swift_is_plain(model, tmp_path):
    more = {"lora_dtype": "bfloat16", "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06, "model_key_mapping": None}
    assert merge_lora(model, write_lora(tmp_path / "taste", model, **more))


@pytest.mark.parametrize(
    "damage",
    [
        {"lora_alpha": "16"},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"(": 1}},
        {"rank_pattern": {"q_proj": "2"}},
    ],
)
def test_a_scale_that_is_none_is_refused(model, tmp_path, one_sentence, damage):
    with pytest.raises(MLLMError, match="damaged") as raised:
        merge_lora(model, write_lora(tmp_path / "taste", model, **damage))
    one_sentence(raised)


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
    "another rank": ({"r": RANK + 1}, None, "rank"),
    "a pair twice": (
        {},
        lambda t: t | {k.replace(".weight", ".default.weight"): v.clone() for k, v in t.items()},
        "twice",
    ),
    "nothing": ({}, lambda t: {}, "empty"),
    "dora": ({"use_dora": True}, None, "DoRA"),
    "dora keys": ({}, lambda t: t | {"base_model.model.x.lora_magnitude_vector": torch.ones(3)}, "isn't a LoRA"),
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


def test_a_whole_model_in_place_of_a_lora_is_named(folder, model, one_sentence):
    with pytest.raises(MLLMError, match="models/prefgen/mllm/") as raised:
        merge_lora(model, folder)
    assert "whole model" in one_sentence(raised)


def test_a_lora_of_a_picture_model_and_one_a_level_too_high(model, tmp_path, one_sentence):
    above = tmp_path / "above"
    write_lora(above, model)
    (above / "checkpoint-20").mkdir()
    for file in [*above.glob("adapter_*")]:
        file.rename(above / "checkpoint-20" / file.name)
    with pytest.raises(MLLMError, match="subfolder checkpoint-20") as raised:
        merge_lora(model, above)
    one_sentence(raised)
    painted = tmp_path / "painted"
    painted.mkdir()
    save_file({"lora_unet_down.lora_down.weight": torch.ones(2, 2)}, painted / "style.safetensors")
    with pytest.raises(MLLMError, match="picture models") as raised:
        merge_lora(model, painted)
    one_sentence(raised)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_place_of_a_file_is_named(model, tmp_path, one_sentence, name):
    lora = write_lora(tmp_path / "taste", model)
    (lora / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(MLLMError, match="Git LFS pointer") as raised:
        merge_lora(model, lora)
    assert name in one_sentence(raised)


def test_a_head_that_is_shared_with_the_words_is_not_changed(tmp_path, one_sentence):
    folder = write_folder(tmp_path / "tied", "SmolVLM2", text={"tie_word_embeddings": True})
    edit(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if "lm_head" not in key})
    model = PreferenceMLLM.load(folder).model
    words, width = model.get_input_embeddings().weight.shape

    def of_the_head(_):
        sides = {"A": torch.ones(RANK, width), "B": torch.ones(words, RANK)}
        return {f"base_model.model.lm_head.lora_{side}.weight": weight for side, weight in sides.items()}

    with pytest.raises(MLLMError, match="changes a language head that this MLLM shares with its words") as raised:
        merge_lora(model, write_lora(tmp_path / "taste", model, of_the_head))
    one_sentence(raised)


def test_a_pair_whose_ranks_differ_fits_nothing(model, tmp_path, one_sentence):
    def of_two_ranks(tensors):
        return {key: torch.cat([value, value]) if "_A" in key else value for key, value in tensors.items()}

    with pytest.raises(MLLMError, match="doesn't fit this one") as raised:
        merge_lora(model, write_lora(tmp_path / "taste", model, of_two_ranks))
    one_sentence(raised)


def test_a_folder_that_is_gone_is_told_from_one_without_its_config(model, tmp_path, one_sentence):
    with pytest.raises(MLLMError) as raised:
        merge_lora(model, tmp_path / "gone")
    assert one_sentence(raised) == "The LoRA folder gone isn't there: choose a folder that peft has saved, or none."
