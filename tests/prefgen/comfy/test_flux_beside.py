"""On Flux.1 beside what else a graph has: a ControlNet, torch.compile, a pack that replaces whole blocks."""

import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ldm.flux.math
import comfy.ops
import pytest
import torch
from comfy.ldm.modules import attention

from tests.closeness import SAMPLED, assert_close, assert_far
from tests.neighbours import modules_of, needs
from tests.prefgen.comfy.tiny_flux import SIZE, build, conditions, latents, parameters, seen_after_block_0, user_of
from tests.prefgen.comfy.tiny_models import CPU, draw_weights
from tests.prefgen.flux_files import TINY

WEIGHT = 0.8


@pytest.fixture(scope="module")
def user(pack, tmp_path_factory):
    """user(kind) -> a user of a random file of that kind."""
    return lambda kind="xlabs-v1": user_of(pack, tmp_path_factory.mktemp("flux"), kind)


@pytest.fixture(scope="module")
def apply_user(pack):
    return pack("prefgen.comfy.patcher").apply_user


def controlled():
    """Conditions with a random ControlNet of XLabs' kind, which adds to the picture after every double block."""
    net = comfy.ldm.flux.controlnet.ControlNetFlux(
        **parameters("Flux"), dtype=torch.float32, operations=comfy.ops.disable_weight_init
    ).eval()
    draw_weights(net, lambda name: "norm" in name)
    control = comfy.controlnet.ControlNet(net, load_device=CPU, extra_conds=["y", "guidance"])
    hint = torch.rand(1, 3, *(8 * side for side in SIZE), generator=torch.Generator().manual_seed(7))
    return conditions(control=control.set_cond_hint(hint, 0.5), control_apply_to_uncond=True)


def test_a_user_is_the_same_beside_a_controlnet(user, apply_user):
    model, conds = build(), controlled()
    both = apply_user(model, user(), WEIGHT)
    painted = latents(both, conds=conds)
    for alone in (latents(both), latents(model, conds=conds)):
        assert_far(painted, alone)
    # The first block's inputs don't know of the ControlNet yet, which adds after the block and its users.
    assert torch.equal(*(seen_after_block_0(both, conds=each)[1] for each in (conds, None)))
    assert torch.equal(latents(both, conds=conds), painted)


def compiled(model):
    """(latents of two steps, graph breaks, graphs after two runs, graphs after three) of the compiled transformer."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager")
    try:
        painted = latents(model)
        latents(model, steps=5)
        early = counters["stats"]["unique_graphs"]
        latents(model, steps=5)
        return painted, sum(counters["graph_break"].values()), early, counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_model_breaks_no_graph_for_users(user, apply_user, monkeypatch):
    # A card's attention: what ComfyUI takes on a CPU breaks the graph at each call, to ask psutil for free memory.
    for module in (attention, comfy.ldm.flux.math):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)
    model = build()
    patched = apply_user(apply_user(model, user(), WEIGHT), user("instantx"), WEIGHT)
    painted, breaks, early, late = compiled(patched)
    assert (breaks, early) == (0, late)
    assert_close(painted, latents(patched), ulps=SAMPLED, unlike=latents(model))


def with_the_other_pack(model):
    """The model with a random adapter by the pack ComfyUI-IPAdapter-Flux, which puts blocks of its own in."""
    attention_processor, utils = modules_of("ComfyUI-IPAdapter-Flux", "attention_processor", "utils")
    processor = attention_processor.IPAFluxAttnProcessor2_0
    names = [f"double_blocks.{i}" for i in range(TINY.doubles)] + [f"single_blocks.{i}" for i in range(TINY.singles)]
    torch.manual_seed(0)
    model, tokens = model.clone(), torch.randn(1, TINY.many, TINY.text)
    utils.FluxUpdateModules(
        model, {name: processor(TINY.width, TINY.text, WEIGHT, TINY.many) for name in names}, tokens, False
    )
    return model


@needs("ComfyUI-IPAdapter-Flux")
def test_the_pack_that_replaces_whole_blocks_is_named_before_it_paints_without_the_user(user, apply_user, one_sentence):
    model = build()
    try:
        there = with_the_other_pack(model)
        alone = latents(there)
    except (TypeError, AttributeError) as error:
        pytest.skip(f"ComfyUI-IPAdapter-Flux does not run on this ComfyUI: {error}")
    assert_far(alone, latents(model))
    for both in (apply_user(there, user(), WEIGHT), with_the_other_pack(apply_user(model, user(), WEIGHT))):
        with pytest.raises(ValueError) as refused:
            latents(both)
        assert "without its options" in one_sentence(refused)
    assert torch.equal(latents(there), alone)


@needs("ComfyUI-GGUF")
def test_quantised_weights_stay_as_they_are(user, apply_user, tmp_path):
    gguf = pytest.importorskip("gguf")
    loader, ops = modules_of("ComfyUI-GGUF", "loader", "ops")
    writer = gguf.GGUFWriter(str(tmp_path / "flux.gguf"), "flux")
    for key, weight in build().model.diffusion_model.state_dict().items():
        is_small = weight.ndim < 2 or weight.shape[1] % 32
        kind = gguf.GGMLQuantizationType.F32 if is_small else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(key, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = loader.gguf_sd_loader(str(tmp_path / "flux.gguf"))
    model = build(operations=ops.GGMLOps, state=state[0] if isinstance(state, tuple) else state)
    plain, weight = latents(model), model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    before = weight.numpy().tobytes()
    painted = latents(apply_user(model, user(), WEIGHT))
    assert weight.dtype == torch.uint8 and weight.numpy().tobytes() == before
    assert_far(painted, plain)
    # As the whole weights paint, but for what eight bits take.
    exact = build()
    expected = latents(apply_user(exact, user(), WEIGHT)) - latents(exact)
    off = (painted - plain - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert off < 0.1
