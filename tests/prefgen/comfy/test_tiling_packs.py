"""Beside the real ComfyUI-TiledDiffusion and ComfyUI-ppm (attention couple): how many tiles go at once, and regions
that all have the same prompt, change nothing."""

import importlib
import sys
import types

import comfy.gligen
import comfy.samplers
import pytest
import torch

from tests.closeness import SAMPLED, difference
from tests.neighbours import checkout, needs, whole_pack
from tests.prefgen.comfy import studio

TILED, PPM = "ComfyUI-TiledDiffusion", "ComfyUI-ppm"
pytestmark = needs(TILED, PPM)
SIZE = (16, 40)
METHODS = ("MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion")


@pytest.fixture(scope="module")
def model():
    return studio.build()


@pytest.fixture(scope="module")
def user(pack, model):
    return studio.users(pack, model, 1)[0]


@pytest.fixture
def apply_user(pack):
    return pack("prefgen.comfy.patcher").apply_user


@pytest.fixture(scope="module")
def tiled_diffusion():
    """Its node class; what it puts in the place of ComfyUI's functions is taken back at the end."""
    import comfy_extras.nodes_sag

    changed = [
        (comfy.samplers.KSampler, "sample"),
        (comfy.samplers.KSAMPLER, "sample"),
        (comfy.samplers, "get_area_and_mult"),
        (comfy.samplers, "pre_run_control"),
        (comfy_extras.nodes_sag, "create_blur_map"),
        (comfy.gligen.Gligen, "_set_position"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in changed]
    yield whole_pack(TILED).NODE_CLASS_MAPPINGS["TiledDiffusion"]
    for owner, name, value in before:
        setattr(owner, name, value)


@pytest.fixture(scope="module")
def couple_functions():
    """ppm's functions for UNets. Its node can't be imported where ComfyUI lacks a model that it also knows."""
    for name, folder in (("ppm", "src"), ("ppm.attention_couple", "src/attention_couple")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(checkout(PPM) / folder)]
    return importlib.import_module("ppm.attention_couple.unet_couple")


def close(one, other):
    """Whether two latents agree within what another order of sums makes of them."""
    return difference(one, other).item() <= SAMPLED * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("side", ["positive", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_how_many_tiles_go_at_once_changes_nothing(tiled_diffusion, apply_user, model, user, method, side):
    mask = torch.zeros(1, 64, 160)
    mask[..., :80] = 1

    def paint(at_once, **options):
        chain = tiled_diffusion().apply(model, method, 128, 128, 32, at_once)[0]
        return studio.latents(apply_user(chain, user, apply_to=side, **options) if options else chain, 2, size=SIZE)

    for options in ({"weight": 1.0}, {"weight": 1.0, "item_weights": "0=1, 1=0"}, {"weight": 1.0, "attn_mask": mask}):
        plain, one, two, four = paint(1), *(paint(n, **options) for n in (1, 2, 4))
        assert close(two, one) and close(four, one) and studio.far(one[0], plain[0])
        if "item_weights" in options:
            assert close(two[1], plain[1])
        if "attn_mask" in options and method != "SpotDiffusion":  # which turns the picture at every step
            assert (two - plain)[..., 32:].abs().max() < 1e-3 * (two - plain).abs().max()


@pytest.mark.parametrize("side", ["positive", "both"])
@pytest.mark.parametrize("regions", [2, 3, 4, 5])
def test_the_same_prompt_in_every_region_is_no_regions(couple_functions, apply_user, model, user, regions, side):
    positive, _ = studio.conditions(model)

    def couple(chain):
        masks = torch.ones(regions, 1, 16, 16) / regions
        chain = chain.clone()
        others = [positive] * (regions - 1)
        chain.set_model_attn2_patch(
            couple_functions.unet_attn2_couple_wrapper(positive, others, regions, False, "cpu", torch.float32)
        )
        chain.set_model_attn2_output_patch(couple_functions.unet_attn2_output_couple_wrapper(masks))
        return chain

    for options in ({}, {"attn_mask": torch.rand(2, 32, 32), "item_weights": "0=1, 1=0.3"}):
        expected = studio.latents(apply_user(model, user, apply_to=side, **options), 2)
        assert studio.far(expected, studio.latents(model, 2))
        for chain in (
            apply_user(couple(model), user, apply_to=side, **options),
            couple(apply_user(model, user, apply_to=side, **options)),
        ):
            assert close(studio.latents(chain, 2), expected)
