"""Beside what ComfyUI itself brings: in either order the same picture with both effects, again and again."""

import importlib

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tests.prefgen.comfy import studio
from tests.prefgen.comfy.tiny_models import COMFY, CPU

QUEUES = 5
SIZE = (16, 16)


def core(module, name):
    """A core node's function, whether it is an old or a new one: (model, ...) -> model."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)

    def run(*arguments):
        if hasattr(node, "execute"):
            output = node.execute(*arguments)
            return getattr(output, "result", output)[0]
        return node().patch(*arguments)[0]

    return run


def random_lora(model):
    """A LoRA file's tensors for every cross-attention's query and value, strong enough to be seen."""
    generator, lora = torch.Generator().manual_seed(9), {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if name.endswith(("attn2.to_q.weight", "attn2.to_v.weight")):
            key = "diffusion_model." + name.removesuffix(".weight")
            lora[f"{key}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.1
            lora[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.5
    return lora


class Attn2Replace:
    """What InstantID, PuLID and IPAdapter put into a block's one slot: a list of functions whose results are added."""

    def __init__(self, tokens):
        self.tokens = [tokens]

    def __call__(self, q, k, v, extra):
        from comfy.ldm.modules.attention import optimized_attention

        out = optimized_attention(q, k, v, extra["n_heads"])
        for tokens in self.tokens:
            own = tokens[..., : q.shape[2]].expand(len(q), -1, -1)
            out = out + 0.5 * optimized_attention(q, own, own, extra["n_heads"])
        return out


def with_slots(model, seed=1):
    """Both ways of naming a slot are used: with the transformer's number and without."""
    tokens = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(seed))
    model = model.clone()
    for number in (1, 4, 7):
        model.set_model_patch_replace(Attn2Replace(tokens), "attn2", "input", number, 0)
    for number in (5, 8):
        model.set_model_patch_replace(Attn2Replace(tokens), "attn2", "output", number)
    return model


PATCHES = {
    "LoRA": lambda model: comfy.sd.load_lora_for_models(model, None, random_lora(model), 1.0, 0.0)[0],
    "FreeU": lambda model: core("nodes_freelunch", "FreeU_V2")(model, 1.3, 1.4, 0.9, 0.2),
    "PAG": lambda model: core("nodes_pag", "PerturbedAttentionGuidance")(model, 3.0),
    "SAG": lambda model: core("nodes_sag", "SelfAttentionGuidance")(model, 0.5, 2.0),
    "HyperTile": lambda model: core("nodes_hypertile", "HyperTile")(model, 64, 2, 0, False),
    "ToMe": lambda model: core("nodes_tomesd", "TomePatchModel")(model, 0.3),
    "InstantID- and PuLID-like slots": with_slots,
}
RANDOM_TILES = ("HyperTile",)  # it draws the tiles anew in every call, from Python's own generator


@pytest.fixture(scope="module")
def model():
    return studio.build(model_channels=64)


@pytest.fixture(scope="module")
def with_user(pack, model):
    (user,) = studio.users(pack, model, 1)
    return lambda other: pack("prefgen.comfy.patcher").apply_user(other, user, 0.8)


def paint(model, conds=None):
    import random

    random.seed(0)
    torch.manual_seed(0)
    return studio.latents(model, cfg=3.0, conds=conds, size=SIZE)


@pytest.mark.parametrize("name", PATCHES)
def test_either_order_paints_the_same_with_both_effects_and_nothing_stays(name, model, with_user, pack):
    patch, key = PATCHES[name], pack("prefgen.comfy.patcher").KEY
    plain, options = paint(model), repr(model.model_options)
    upstream = patch(model)
    first, then = with_user(upstream), patch(with_user(model))
    both = paint(first)
    assert torch.equal(paint(then), both)
    for alone in (plain, paint(upstream), paint(with_user(model))):
        assert studio.far(both, alone)
    for _ in range(QUEUES):  # the upstream model stays in ComfyUI's cache, the nodes behind it run again
        again = with_user(upstream)
        assert torch.equal(paint(again), both) and len(again.get_wrappers(WrappersMP.APPLY_MODEL, key)) == 1
    assert torch.equal(paint(model), plain) and repr(model.model_options) == options


def test_all_of_them_together_in_two_orders(model, with_user):
    names = [name for name in PATCHES if name not in RANDOM_TILES]
    one, other = with_user(model), model
    for name in names:
        one, other = PATCHES[name](one), PATCHES[name](other)
    assert torch.equal(paint(one), paint(with_user(other)))


def controlnet():
    shape = {k: v for k, v in COMFY["sd15"].items() if k not in ("out_channels", "transformer_depth_output")}
    shape |= {"model_channels": 64, "num_heads": 8, "hint_channels": 3}
    net = comfy.cldm.cldm.ControlNet(**shape, dtype=torch.float32, operations=comfy.ops.disable_weight_init).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            flat = torch.full(parameter.shape, float(name.endswith("weight")))
            scaled = torch.randn(parameter.shape, generator=generator) * max(1, parameter[0].numel()) ** -0.5
            parameter.copy_(scaled if parameter.ndim > 1 else flat)
    control = comfy.controlnet.ControlNet(net, load_device=CPU)
    hint = torch.rand(1, 3, 8 * SIZE[0], 8 * SIZE[1], generator=generator)
    return control.set_cond_hint(hint, 0.5)


def test_a_controlnet_in_the_conditions(model, with_user):
    conds = studio.conditions(model, control=controlnet(), control_apply_to_uncond=True)
    both = paint(with_user(model), conds)
    for alone in (paint(model, conds), paint(with_user(model)), paint(model)):
        assert studio.far(both, alone)
    assert torch.equal(paint(with_user(model), conds), both)


def test_a_hooked_lora_in_one_condition(model, with_user):
    """Hooks change the weights between the halves of one step; the user stays in both calls."""
    group = comfy.hooks.create_hook_lora(lora=random_lora(model), strength_model=1.0, strength_clip=0.0)
    conds = studio.conditions(model)
    conds[0][0][1]["hooks"] = group
    both = paint(with_user(model), conds)
    for alone in (paint(model, conds), paint(with_user(model)), paint(model)):
        assert studio.far(both, alone)
    assert torch.equal(paint(with_user(model), conds), both)


def test_regional_conditions_all_get_the_user(model, with_user):
    """Areas crop what the model sees; the user counts in each of them."""
    conds = studio.conditions(model)
    states, options = conds[0][0]
    conds[0] = [[states, options | {"area": (16, 8, 0, x), "strength": 1.0}] for x in (0, 8)]
    assert studio.far(paint(with_user(model), conds), paint(model, conds))


def test_clones_share_no_state(model, with_user):
    one = with_user(model)
    two = with_user(one)
    before = paint(one)
    paint(two)
    assert torch.equal(paint(one), before) and studio.far(paint(two), before)
