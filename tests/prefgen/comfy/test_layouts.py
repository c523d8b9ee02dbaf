"""The branch on tiny UNets with the blocks of every real family, in every precision, with one half and with two."""

import comfy.model_base
import pytest
import torch

from tests.prefgen.comfy import studio

FOUR = {"channel_mult": [1, 2, 4, 4], "num_res_blocks": [2] * 4}
SD2 = {"context_dim": 1024, "use_linear_in_transformer": True, "model_channels": 64}  # heads of 64 channels
SSD = {
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    "transformer_depth_middle": -1,
}
REFINER = FOUR | {
    "context_dim": 1280,
    "adm_in_channels": 2560,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_middle": 4,
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
}
LAYOUTS = {
    "SD1.5": ("SD15", "sd15", {}),
    "SD1.5 inpainting": ("SD15", "sd15", {"in_channels": 9}),
    "SD1.5 instruct-pix2pix": ("SD15_instructpix2pix", "sd15", {"in_channels": 8}),
    "SD2": ("SD20", "sd2", SD2),
    "SD2 v-prediction": ("SD20", "sd2", SD2 | {"model_type": comfy.model_base.ModelType.V_PREDICTION}),
    "SDXL": ("SDXL", "sdxl", {}),
    "SDXL inpainting": ("SDXL", "sdxl", {"in_channels": 9}),
    "SDXL EDM": ("SDXL", "sdxl", {"model_type": comfy.model_base.ModelType.EDM}),
    "SDXL refiner": ("SDXLRefiner", "sdxl_refiner", REFINER),
    "SSD-1B": ("SSD1B", "sdxl", SSD),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cross_attention_of_a_layout_is_reached_and_weight_0_is_the_plain_model(name, pack):
    family, base, shape = LAYOUTS[name]
    model = studio.build(family, **shape)
    patcher = pack("prefgen.comfy.patcher")
    unet = model.get_model_object("diffusion_model")
    there = {id(m.attn2) for m in unet.modules() if getattr(m, "attn2", None) is not None}
    blocks = list(patcher.unet_blocks(model.get_model_object("diffusion_model")))
    assert {id(attention) for _, attention in blocks} == there and len(blocks) == len(there) > 5
    (user,) = studio.users(pack, model, 1, base)
    plain, patched = studio.latents(model), patcher.apply_user(model, user)
    with_user = studio.latents(patched)
    assert torch.isfinite(with_user).all() and studio.far(with_user, plain)
    assert torch.equal(studio.latents(patched), with_user) and torch.equal(studio.latents(model), plain)
    assert patcher.apply_user(model, user, 0.0) is model
    one = patcher.apply_user(model, user, blocks="all", block_weights="all=0, out=1")
    assert studio.far(studio.latents(one), plain) and studio.far(studio.latents(one), with_user)


@pytest.mark.parametrize("sampler", ["lcm", "euler"])
def test_at_cfg_1_only_the_half_with_the_prompt_is_painted_and_both_halves_make_no_difference(sampler, pack):
    """LCM, Lightning and Turbo."""
    model = studio.build()
    (user,) = studio.users(pack, model, 1)
    apply_user = pack("prefgen.comfy.patcher").apply_user
    positive, both, plain = (
        studio.latents(m, cfg=1.0, sampler=sampler)
        for m in (apply_user(model, user), apply_user(model, user, apply_to="both"), model)
    )
    assert torch.equal(positive, both) and studio.far(positive, plain)
    guided = [studio.latents(apply_user(model, user, apply_to=side), sampler=sampler) for side in ("positive", "both")]
    assert studio.far(*guided)


PRECISIONS = {
    "fp16": (torch.float16, None, 0.05),
    "bf16": (torch.bfloat16, None, 0.3),
    "fp8 weights": (torch.float8_e4m3fn, torch.float32, 1.0),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_in_every_precision_the_user_does_about_the_same(name, pack):
    """The user's own effect is compared, so that what the precision does to the plain model doesn't count."""
    dtype, compute, tolerance = PRECISIONS[name]
    apply_user, effects = pack("prefgen.comfy.patcher").apply_user, []
    for options in ({}, {"dtype": dtype, "compute": compute}):
        model = studio.build(**options)
        (user,) = studio.users(pack, model, 1)
        effects.append(studio.latents(apply_user(model, user), steps=1) - studio.latents(model, steps=1))
    exact, other = effects
    assert torch.isfinite(other).all()
    assert (exact - other).abs().mean() < tolerance * exact.abs().mean()


def test_a_model_without_unet_cross_attention_is_named(pack):
    model = studio.build()
    users = studio.users(pack, model, 1)
    model.model.diffusion_model = torch.nn.Identity()
    adapter_error = pack("prefgen.errors").AdapterError
    with pytest.raises(adapter_error, match=r"needs a UNet with cross-attention .* has none.*Describe Preference"):
        pack("prefgen.comfy.patcher").apply_user(model, users[0])
