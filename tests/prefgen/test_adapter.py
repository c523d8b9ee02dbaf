"""The adapter file: what is written comes back, what is broken is refused in one sentence, diffusers loads it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefgen.adapter import FORMAT_VERSION
from prefgen.adapter_checks import check_compatible
from prefgen.adapter_file import load_adapter, save_adapter
from prefgen.branch import user_residual
from prefgen.encoded import EncodedPreference
from prefgen.errors import AdapterError
from prefgen.fusion import fuse_user_vector
from tests.closeness import assert_close
from tests.prefgen.adapters import random_adapter

WIDTHS = [32, 64, 64, 64, 32, 32, 64]


def make_adapter(widths=WIDTHS, seed=0):
    torch.manual_seed(seed)
    return random_adapter(
        widths, 16, (8, 12, 6), base_family="atelier", mllm={"name": "tiny", "sem_layers": [2, 3], "core_layer": 1}
    )


def encoded(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return EncodedPreference(torch.randn(4, 12, generator=generator), torch.randn(3, 6, generator=generator), None)


@pytest.fixture
def saved(tmp_path):
    save_adapter(make_adapter(), tmp_path / "taste.safetensors")
    return tmp_path / "taste.safetensors"


def test_what_is_saved_comes_back(saved):
    adapter, loaded = make_adapter(), load_adapter(saved)
    assert loaded.header == adapter.header and loaded.name == "taste.safetensors"
    for (k, v), (k2, v2) in zip(
        adapter.keys_values(torch.ones(2, 26)), loaded.keys_values(torch.ones(2, 26)), strict=True
    ):
        assert torch.equal(k, k2) and torch.equal(v, v2)
    assert torch.equal(fuse_user_vector(adapter, encoded()), fuse_user_vector(loaded, encoded()))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_user_vector_is_three_parts_of_about_unit_length_each_with_its_weight():
    adapter = make_adapter()
    full = fuse_user_vector(adapter, encoded())
    parts = full.split([8, 12, 6])
    assert all(0.3 < part.norm() < 2 for part in parts)
    for i, name in enumerate(("semantic", "core", "image")):
        off = fuse_user_vector(adapter, encoded(), **{name: 0.0}).split([8, 12, 6])
        half = fuse_user_vector(adapter, encoded(), **{name: 0.5}).split([8, 12, 6])
        assert not off[i].any()
        assert_close(half[i], parts[i] / 2, ulps=4)
        assert all(torch.equal(a, b) for j, (a, b) in enumerate(zip(off, parts, strict=True)) if j != i)


def test_a_part_that_was_not_encoded_is_zero():
    blind = fuse_user_vector(make_adapter(), EncodedPreference(encoded().hidden, None, None))
    deaf = fuse_user_vector(make_adapter(), EncodedPreference(None, encoded().image_embed_liked, None))
    assert blind[:20].any() and not blind[20:].any()
    assert deaf[20:].any() and not deaf[:20].any()


def change_header(path, **changes):
    raw = asdict(make_adapter().header) | changes
    save_file(load_file(path), path, metadata={"prefgen": json.dumps(raw)})


def change_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"prefgen": json.dumps(asdict(make_adapter().header))})


BROKEN = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "damaged"),
    "words": (lambda p: p.write_text("not weights at all"), "damaged"),
    "pickle": (lambda p: torch.save({"a": torch.ones(1)}, p), "pickle"),
    "old pickle": (lambda p: torch.save({"a": torch.ones(1)}, p, _use_new_zipfile_serialization=False), "pickle"),
    "missing": (lambda p: p.unlink(), "not there any more"),
    "other model": (lambda p: save_file({"lora.weight": torch.ones(2)}, p), "not a PrefGen adapter"),
    "ip-adapter": (lambda p: save_file({"image_proj.proj.weight": torch.ones(2)}, p), "damaged"),
    "mangled header": (
        lambda p: save_file(load_file(p), p, metadata={"prefgen": "{"}),
        "mangled",
    ),
    "header of another kind": (lambda p: save_file(load_file(p), p, metadata={"prefgen": "[1]"}), "mangled"),
    "newer": (lambda p: change_header(p, format_version=FORMAT_VERSION + 1), "newer than this PrefGen"),
    "wrong widths": (lambda p: change_header(p, block_widths=[32] * 7), "damaged"),
    "too many blocks": (lambda p: change_header(p, block_widths=[*WIDTHS, 32]), "damaged"),
    "missing part": (lambda p: change_tensors(p, lambda t: t.pop("prefgen.sem_norm.mean")), "damaged"),
    "not a number": (
        lambda p: change_tensors(p, lambda t: t["image_proj.norm.bias"].fill_(float("nan"))),
        "not numbers",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(saved, kind):
    damage, message = BROKEN[kind]
    damage(saved)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(saved)
    assert "taste.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_an_interrupted_save_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr("prefgen.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save_adapter(make_adapter(seed=1), saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_model_of_another_family_is_named():
    header = replace(make_adapter().header, base_family="sdxl")
    check_compatible(header, WIDTHS, 16, "SDXL")
    with pytest.raises(AdapterError, match="This adapter is for SDXL; the model you connected is SD1.5"):
        check_compatible(header, [320] * 16, 768, "SD1.5")


def tiny_pipeline():
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text = CLIPTextModel(CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10))
    return StableDiffusionPipeline(
        AutoencoderKL(block_out_channels=(32,)),
        text,
        None,
        unet,
        DDIMScheduler(),
        None,
        None,
        requires_safety_checker=False,
    )


def test_stock_diffusers_loads_the_file_and_gives_the_same_picture(tmp_path):
    """load_ip_adapter with precomputed embeddings = text attention + our residual, on both halves of the guidance."""
    pipeline = tiny_pipeline()
    names = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    widths = [pipeline.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in names]
    adapter = make_adapter(widths)
    save_adapter(adapter, tmp_path / "taste.safetensors")

    vector = fuse_user_vector(adapter, encoded())
    both = torch.stack([torch.zeros_like(vector), vector])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    states = torch.randn(2, 5, 16)

    original = dict(pipeline.unet.attn_processors)

    class WithUser:
        def __init__(self, plain, k, v):
            self.plain, self.k, self.v = plain, k, v

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            output_layers = attn.to_out
            attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
            base = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            attn.to_out = output_layers
            query = attn.to_q(hidden_states)
            residual = user_residual(query, self.k, self.v, attn.heads, weight=0.7)
            return output_layers[1](output_layers[0](base + residual))

    with torch.no_grad():
        plain = pipeline.unet(x, t, states).sample
        keys_values = iter(adapter.keys_values(both))
        pipeline.unet.set_attn_processor(
            {n: WithUser(p, *next(keys_values)) if "attn2" in n else p for n, p in original.items()}
        )
        ours = pipeline.unet(x, t, states).sample

        pipeline.unet.set_attn_processor(original)
        pipeline.load_ip_adapter(
            str(tmp_path), subfolder="", weight_name="taste.safetensors", image_encoder_folder=None
        )
        pipeline.set_ip_adapter_scale(0.7)
        theirs = pipeline.unet(x, t, states, added_cond_kwargs={"image_embeds": [both[:, None]]}).sample
    assert_close(ours, theirs, unlike=plain)
