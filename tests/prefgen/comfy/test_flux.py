"""Public IP-Adapter files on Flux.1: what diffusers' own Flux IP-Adapter gives, and all options of Apply."""

import json
from collections import Counter
from dataclasses import replace

import comfy.clip_vision
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.flux.layers import apply_mod
from comfy.ldm.flux.math import attention
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from prefgen.flux_adapter import build_flux_adapter
from tests.closeness import assert_close, assert_far
from tests.prefgen import flux_files as files
from tests.prefgen.comfy import studio
from tests.prefgen.comfy.tiny_flux import (
    SIZE,
    TEXT_TOKENS,
    BothFlux,
    build,
    conditions,
    latents,
    seen_after_block_0,
    user_of,
)
from tests.prefgen.comfy.tiny_models import clip_vision

WEIGHT = 0.8
GRID = tuple(side // 2 for side in SIZE)
TOKENS = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def both():
    return BothFlux()


@pytest.fixture(scope="module")
def user(pack, tmp_path_factory):
    """user(kind, seed) -> a user of a random file of that kind."""
    return lambda kind="xlabs-v1", seed=0: user_of(pack, tmp_path_factory.mktemp("flux"), kind, seed)


@pytest.fixture(scope="module")
def apply_user(pack):
    return pack("prefgen.comfy.patcher").apply_user


@pytest.mark.parametrize("kind", ["xlabs-v1", "diffusers"])
def test_xlabs_layout_gives_what_diffusers_gives_on_both_halves(kind, both, user, apply_user):
    someone = user(kind)
    weights = files.tensors("diffusers") if kind == "diffusers" else in_diffusers(files.tensors(kind))
    plain = both.theirs()
    assert_close(both.ours(both.patcher), plain)
    expected = both.theirs(weights, torch.stack([someone.vector, someone.no_user]), WEIGHT)
    ours = both.ours(apply_user(both.patcher, someone, WEIGHT, apply_to="both"))
    for half in range(2):
        assert_close(ours[half], expected[half], unlike=plain[half])
    only = both.ours(apply_user(both.patcher, someone, WEIGHT))
    assert_close(only[0], expected[0], unlike=plain[0])
    assert_close(only[1], plain[1], unlike=expected[1])


def with_instantx(block, k, v, weight, rows, text=False):
    """The forward of a double or single block with InstantX' addition, in plain words. k, v: [N, width]."""
    heads = block.num_heads

    def added(out, q, start, end):
        of_rows = [x.unflatten(-1, (heads, -1)).transpose(0, 1)[None].expand(len(rows), -1, -1, -1) for x in (k, v)]
        user = F.scaled_dot_product_attention(q[rows, :, start:end], *of_rows).transpose(1, 2).flatten(2)
        out[rows, start:end] += weight * user

    def split(x):
        return x.view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)

    def double(img, txt, vec, pe, attn_mask=None, transformer_options=None, **_):
        parts = []
        for x, mod, norm, attn in (
            (txt, block.txt_mod, block.txt_norm1, block.txt_attn),
            (img, block.img_mod, block.img_norm1, block.img_attn),
        ):
            mod1, mod2 = mod(vec)
            q, key, value = split(attn.qkv(apply_mod(norm(x), 1 + mod1.scale, mod1.shift)))
            parts.append((*attn.norm(q, key, value), value, mod1, mod2))
        (tq, tk, tv, *tmod), (iq, ik, iv, *imod) = parts
        joint = [torch.cat(pair, 2) for pair in ((tq, iq), (tk, ik), (tv, iv))]
        out = attention(*joint, pe=pe, mask=attn_mask)
        length = txt.shape[1]
        added(out, joint[0], length, length + TOKENS)
        img = img + imod[0].gate * block.img_attn.proj(out[:, length:])
        img = img + imod[1].gate * block.img_mlp(apply_mod(block.img_norm2(img), 1 + imod[1].scale, imod[1].shift))
        txt = txt + tmod[0].gate * block.txt_attn.proj(out[:, :length])
        txt = txt + tmod[1].gate * block.txt_mlp(apply_mod(block.txt_norm2(txt), 1 + tmod[1].scale, tmod[1].shift))
        return img, txt

    def single(x, vec, pe, attn_mask=None, transformer_options=None, **_):
        mod, _ = block.modulation(vec)
        inner = block.linear1(apply_mod(block.pre_norm(x), 1 + mod.scale, mod.shift))
        qkv, mlp = inner.split([3 * block.hidden_size, block.mlp_hidden_dim_first], -1)
        q, key, value = split(qkv)
        q, key = block.norm(q, key, value)
        out = attention(q, key, value, pe=pe, mask=attn_mask)
        added(out, q, 0 if text else TEXT_TOKENS, TEXT_TOKENS + TOKENS)
        return x + mod.gate * block.linear2(torch.cat([out, block.mlp_act(mlp)], 2))

    return double if hasattr(block, "img_attn") else single


@pytest.mark.parametrize("text", [False, True])
def test_instantx_layout_is_its_own_plain_arithmetic(text, both, user, apply_user, monkeypatch):
    someone = user("instantx")
    weights = files.tensors("instantx")
    x = F.gelu(F.linear(someone.vector[0], *(weights[f"image_proj.proj.0.{end}"] for end in ("weight", "bias"))))
    x = F.linear(x, *(weights[f"image_proj.proj.2.{end}"] for end in ("weight", "bias")))
    norm = [weights[f"image_proj.norm.{end}"] for end in ("weight", "bias")]
    tokens = F.layer_norm(x.view(-1, len(norm[0])), norm[0].shape, *norm)
    plain = both.ours(both.patcher)
    more = "text=1" if text else ""
    ours = both.ours(apply_user(both.patcher, someone, WEIGHT, block_weights=more))
    transformer = both.patcher.model.diffusion_model
    for number, block in enumerate([*transformer.double_blocks, *transformer.single_blocks]):
        pair = []
        for side in "kv":
            projected = F.linear(tokens, weights[f"ip_adapter.{number}.to_{side}_ip.weight"]).unflatten(-1, (-1, 128))
            pair.append((projected / projected.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()).flatten(-2))
        monkeypatch.setattr(block, "forward", with_instantx(block, *pair, WEIGHT, [0], text), raising=False)
    expected = both.ours(both.patcher)
    assert_close(ours[0], expected[0], unlike=plain[0])
    assert_close(ours[1], plain[1], unlike=ours[0])


@pytest.mark.parametrize("kind", ["xlabs-v1", "instantx"])
def test_weight_0_and_masks_of_zeros_and_ones(kind, both, user, apply_user):
    someone = user(kind)
    assert apply_user(both.patcher, someone, 0.0) is both.patcher
    plain = both.ours(both.patcher)
    full = both.ours(apply_user(both.patcher, someone, WEIGHT))
    black = both.ours(apply_user(both.patcher, someone, WEIGHT, attn_mask=torch.zeros(1, 16, 16)))
    white = both.ours(apply_user(both.patcher, someone, WEIGHT, attn_mask=torch.ones(1, 16, 16)))
    assert torch.equal(white, full) and torch.equal(black, plain)
    assert_far(full[0], plain[0])


def test_a_mask_reaches_its_tokens_and_reference_pictures_are_left_alone(user, apply_user):
    model, mask = build(), torch.zeros(1, *SIZE)
    mask[..., SIZE[1] // 2 :] = 1
    conds = conditions(reference_latents=[torch.randn(1, 16, 6, 6)])
    plain = seen_after_block_0(model, conds=conds)
    masked = seen_after_block_0(apply_user(model, user(), WEIGHT, attn_mask=mask), conds=conds)
    # Two conditions run as one call or as two: the half with the prompt is the last row of the first.
    change = (masked[1] - plain[1]).abs().amax((0, 2))
    picture, reference = change[:TOKENS].view(GRID), change[TOKENS:]
    assert len(reference) == 9 and not reference.any()
    assert not picture[:, : GRID[1] // 2].any() and (picture[:, GRID[1] // 2 :] > 0).all()
    assert_far(masked[0], plain[0])


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("Flux", "xlabs-v1"),
        ("Flux", "instantx"),
        ("FluxSchnell", "xlabs-v1"),
        ("Fill", "xlabs-v1"),
        ("Chroma", "xlabs-v1"),
        ("Chroma", "instantx"),
    ],
)
def test_every_base_is_reached_on_the_prompts_half_alone(family, kind, user, apply_user):
    model = build(family)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    plain = latents(model)
    patched = apply_user(model, user(kind), WEIGHT)
    first = latents(patched)
    assert_far(first, plain)
    for _ in range(5 if family == "Flux" else 1):
        assert torch.equal(latents(patched), first)
    assert torch.equal(latents(model), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    assert not model.model_options["transformer_options"].get("patches_replace")
    # Of guidance of 0 only the unconditional half is left.
    assert_close(latents(patched, cfg=0.0), latents(model, cfg=0.0), unlike=first)


def test_fp8_weights_stay_as_they_are(user, apply_user):
    model = build(dtype=torch.float8_e4m3fn)
    plain = latents(model)
    assert_far(latents(apply_user(model, user(), WEIGHT)), plain)
    assert {p.dtype for p in model.model.diffusion_model.double_blocks.parameters()} == {torch.float8_e4m3fn}


def test_start_end_schedule_and_items(user, apply_user):
    model, one, other = build(), user(seed=0), user(seed=1)
    plain = latents(model, steps=4)
    late = latents(apply_user(model, one, WEIGHT, start_at=0.5), steps=4)
    faded = latents(apply_user(model, one, WEIGHT, weight_schedule="0=0, 0.5=0, 0.6=1"), steps=4)
    full = latents(apply_user(model, one, WEIGHT), steps=4)
    for changed in (late, faded):
        assert_far(changed, plain)
        assert_far(changed, full)
    shared = apply_user(apply_user(model, one, WEIGHT, item_weights="0=1, 1=0"), other, WEIGHT, item_weights="0=0, 1=1")
    both_items = latents(shared, batch=2)
    for item, someone in enumerate((one, other)):
        alone = latents(apply_user(model, someone, WEIGHT), batch=2)
        assert_close(both_items[item], alone[item], unlike=latents(model, batch=2)[item], ulps=2048)


def louder(args, extra):
    return {key: value * 1.05 for key, value in extra["original_block"](args).items()}


def skipped(args, extra):
    return {"img": args["img"], "txt": args["txt"]}


def test_any_order_with_what_else_sits_on_the_blocks(user, apply_user):
    model = build()

    def others(model):
        model = model.clone()
        model.set_model_patch_replace(louder, "dit", "double_block", 1)
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda func, q, *args, **kwargs: func(q * 1.1, *args, **kwargs)
        key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
        model.add_patches({key: (torch.full_like(model.model.state_dict()[key], 0.01),)})
        return model

    for kind in ("xlabs-v1", "instantx"):
        someone = user(kind)
        one = latents(apply_user(others(model), someone, WEIGHT))
        other = latents(others(apply_user(model, someone, WEIGHT)))
        assert torch.equal(one, other)
        assert_far(one, latents(others(model)))
        assert_far(one, latents(apply_user(model, someone, WEIGHT)))


@pytest.mark.parametrize("kind", ["xlabs-v1", "instantx"])
def test_nag_of_newer_comfyui_goes_with_it_in_any_order(kind, user, apply_user):
    nag = pytest.importorskip("comfy_extras.nodes_nag").NAGuidance
    model, someone = build(), user(kind)
    guided = nag.execute(model, 5.0, 0.5, 1.5)[0]
    one = latents(apply_user(guided, someone, WEIGHT))
    assert torch.equal(one, latents(nag.execute(apply_user(model, someone, WEIGHT), 5.0, 0.5, 1.5)[0]))
    assert_far(one, latents(guided))
    assert_far(one, latents(apply_user(model, someone, WEIGHT)))


def test_two_layouts_on_one_model_add_up_in_any_order(user, apply_user):
    model, one, other = build(), user(), user("instantx")
    first = latents(apply_user(apply_user(model, one, WEIGHT), other, WEIGHT))
    second = latents(apply_user(apply_user(model, other, WEIGHT), one, WEIGHT))
    assert_close(first, second, unlike=latents(apply_user(model, one, WEIGHT)), ulps=2048)


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(model):
    totals = []
    for steps in (2, 3):
        with Counted() as counted:
            latents(model, steps=steps)
        totals.append(counted.counts)
    return totals[1] - totals[0]


@pytest.mark.parametrize("kind", ["xlabs-v1", "instantx"])
def test_a_step_projects_nothing_and_reads_and_copies_nothing(kind, user, apply_user):
    model = build()
    more = operators_of_a_step(apply_user(model, user(kind), WEIGHT)) - operators_of_a_step(model)
    blocks = files.TINY.doubles + (files.TINY.singles if kind == "instantx" else 0)
    attentions = [name for name in more if name.startswith("_scaled_dot_product")]
    assert sum(more[name] for name in attentions) == more["add_"] == blocks
    assert not {"mm", "addmm", "bmm", "_local_scalar_dense", "_to_copy", "copy_"} & set(more)


def test_a_skipped_block_skips_its_users(user, apply_user):
    def skipping(model):
        model = model.clone()
        model.set_model_patch_replace(skipped, "dit", "double_block", 1)
        return model

    model = build()
    weights = {"block_weights": "double1=0"}
    expected = latents(skipping(apply_user(model, user(), WEIGHT, **weights)))
    assert torch.equal(latents(skipping(apply_user(model, user(), WEIGHT))), expected)


def test_clip_vit_l_reads_a_black_picture_for_none(pack, tmp_path):
    theirs, ours = clip_vision("CLIP ViT-L", tmp_path)
    history = pack("prefgen.history").PreferenceHistory.from_images([torch.rand(1, 56, 56, 3)], [])
    encoded = pack("prefgen.comfy.encoding").encode_history(history, None, ours)
    black = comfy.clip_vision.clip_preprocess(torch.zeros(1, 56, 56, 3), 56)
    with torch.no_grad():
        expected = theirs(black).image_embeds[0]
    assert_close(encoded.image_embed_none, expected, unlike=encoded.image_embed_liked[0])


def test_siglip_is_read_through_the_head_in_its_file(pack, tmp_path, monkeypatch):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    size = {"hidden_size": 1152, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = SiglipVisionConfig(**size, image_size=28, patch_size=14)
    torch.manual_seed(0)
    theirs = SiglipVisionModel(config).eval()
    about = config.to_dict() | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(about))
    ours = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
    ours.dtype = torch.float32
    ours.model.float()
    weights = {
        key if key.startswith("vision_model.") else f"vision_model.{key}": value.contiguous()
        for key, value in theirs.state_dict().items()
    }
    ours.load_sd(weights)
    save_file(weights, tmp_path / "siglip.safetensors")
    encoding, folders = pack("prefgen.comfy.encoding"), pack("prefgen.comfy.folders")
    monkeypatch.setattr(folders, "clip_visions", lambda: {"atelier": None, "a": tmp_path / "siglip.safetensors"})
    picture = torch.rand(1, 28, 28, 3)
    encoded = encoding.encode_history(pack("prefgen.history").PreferenceHistory.from_images([picture], []), None, ours)
    with torch.no_grad():
        pixels = comfy.clip_vision.clip_preprocess(picture, 28, mean=[0.5] * 3, std=[0.5] * 3)
        expected = theirs(pixels).pooler_output
    assert_close(encoded.image_embed_liked, expected, unlike=encoded.image_embed_none[None])
    header = build_flux_adapter("x", {k: torch.empty(s) for k, s in published_but_small().items()}).header
    pack("prefgen.adapter_checks").check_encoded(header, encoded)


def published_but_small():
    """InstantX' shapes that read SigLIP so400m, of a tiny transformer."""
    return files.shapes("instantx", replace(files.TINY, siglip=1152))


def test_apply_taste_finds_the_file_and_knows_how_it_is_used(pack, tmp_path, monkeypatch):
    auto, apply_taste, folders = (pack(f"prefgen.comfy.{name}") for name in ("auto", "apply_taste", "folders"))
    model, path = build(), files.write(tmp_path, "xlabs-v2")
    monkeypatch.setattr(folders, "adapters", lambda: {"ipadapter/a.safetensors": path, "atelier": tmp_path / "gone"})
    ((name, header),) = auto.fitting(model)
    assert name == "ipadapter/a.safetensors" and apply_taste.defaults_of(header) == apply_taste.Defaults(0.7, "all")
    assert auto.model_name(model) == "Flux.1" and "flux-ip-adapter-v2" in auto.no_adapter(model)
    assert "No adapter for Chroma is here" in auto.no_adapter(build("Chroma"))
    assert auto.model_name(build("Chroma")) == "Chroma" and list(auto.fitting(studio.build())) == []


def test_what_does_not_fit_is_a_sentence(user, apply_user, pack, one_sentence):
    model = build()
    with pytest.raises(ValueError, match="has no block 'single0'; it has double0, double1"):
        apply_user(model, user(), block_weights="single0=1")
    with pytest.raises(ValueError, match="Nobody has found which blocks of Flux are those of style"):
        apply_user(model, user(), blocks="style")
    with pytest.raises(ValueError, match="for Flux.1; the model you connected is SD1.5"):
        apply_user(studio.build(), user())
    with pytest.raises(ValueError, match="for SD1.5; the model you connected is Flux.1"):
        apply_user(model, studio.users(pack, studio.build(), 1)[0])
    inner = type("QwenImage", (), {"model_config": None})()
    shell = type("Shell", (), {"model": inner, "get_model_object": lambda *_: torch.nn.Module()})()
    with pytest.raises(ValueError, match="no adapter is published for Qwen-Image.*Describe Preference") as raised:
        apply_user(shell, user())
    one_sentence(raised)


def in_diffusers(tensors):
    """XLabs' names as diffusers spells them."""
    names = {
        "ip_adapter_proj_model.": "image_proj.",
        "double_blocks.": "ip_adapter.",
        "processor.ip_adapter_double_stream_": "to_",
        "_proj.": "_ip.",
    }
    out = {}
    for key, value in tensors.items():
        name = key
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name.replace("image_ip.", "image_proj.")] = value
    return out
