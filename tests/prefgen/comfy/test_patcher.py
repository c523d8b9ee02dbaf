"""The branch on a real model patcher and a real sampler: exact where it must be, gone where it must not be."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from tests.closeness import FAR, SAMPLED, assert_close, assert_far, difference
from training.common.user_branch import install

STEPS = 4


@pytest.fixture(scope="module")
def patcher(pack):
    return pack("prefgen.comfy.patcher")


@pytest.fixture(scope="module")
def world(pack):
    """Model, adapter, and three users with random vectors."""
    atelier, adapters = pack("prefgen.comfy.atelier_models"), pack("prefgen.adapter_file")
    models, fusion = atelier.models, pack("prefgen.fusion")
    model = atelier.build_unet(models.load_weights("unet"), models.vae_scaling_factor())
    torch.manual_seed(1)
    adapter = adapters.load_adapter(models.WEIGHTS / "adapter.safetensors")
    vectors = torch.nn.functional.normalize(torch.randn(3, adapter.header.user_width), dim=1) * 1.7
    return model, [fusion.FusedUser(vector, adapter) for vector in vectors]


def latents(model, cfg=2.5, batch=1, seed=0, sampler="euler"):
    """Sample a few steps of the real KSampler with fixed conditioning and noise."""
    torch.manual_seed(7)
    positive, negative = ([[torch.randn(1, 48, 128), {}]] for _ in range(2))
    empty = torch.zeros(batch, 8, 16, 16)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(seed)).repeat(batch, 1, 1, 1)
    return comfy.sample.sample(
        model, noise, STEPS, cfg, sampler, "sgm_uniform", positive, negative, empty, disable_pbar=True, seed=seed
    )


def left(width=40, height=24):
    mask = torch.zeros(1, height, width)
    mask[:, :, : width // 2] = 1
    return mask


def test_every_cross_attention_is_found_in_file_order(patcher, world):
    model, users = world
    blocks = [block for block, _ in patcher.unet_blocks(model.get_model_object("diffusion_model"))]
    assert len(blocks) == len(users[0].adapter.header.block_widths)
    assert blocks[-1] == ("middle", 0, 0)
    assert [kind for kind, _, _ in blocks] == sorted([k for k, _, _ in blocks], key=["input", "output", "middle"].index)


def test_the_attention_that_a_block_asks_for_is_handed_on(patcher, world, pack, monkeypatch):
    """ComfyUI newer than 0.33 says it at the block of a quantised file and leaves it to who takes the block's place."""
    model, users = world
    run = pack("prefgen.comfy.run")
    plain, asked = run.optimized_attention, []

    def attention(*args, preferred_attention=None, **kwargs):
        asked.append(preferred_attention)
        return plain(*args, **kwargs)

    monkeypatch.setattr(run, "optimized_attention", attention)
    blocks = [block for _, block in patcher.unet_blocks(model.get_model_object("diffusion_model"))]
    monkeypatch.setattr(blocks[1], "comfy_attention", "its own", raising=False)
    latents(patcher.apply_user(model, users[0]), cfg=1.0)
    assert asked.count("its own") == STEPS and asked.count(None) == STEPS * (len(blocks) - 1)


def test_comfyui_can_have_the_model_again_for_another_card(world):
    model, _ = world
    load, words = model.cached_patcher_init
    again = load(*words, disable_dynamic=True)
    weights, others = (each.model.diffusion_model.state_dict() for each in (model, again))
    assert again.model is not model.model and weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_schema_gets_what_its_comfyui_knows(pack, monkeypatch):
    from dataclasses import make_dataclass

    sockets = pack("nodes.sockets")
    newer = make_dataclass("Schema", ["search_aliases", "has_intermediate_output"])
    for schema, expected in ((newer, {"has_intermediate_output": True}), (make_dataclass("Schema", ["node_id"]), {})):
        monkeypatch.setattr(sockets.io, "Schema", schema)
        assert sockets.shows_something() == expected
    assert sockets.searched("taste") == {}


def test_one_noise_prediction_with_a_user_is_that_of_diffusers(patcher, world, pack):
    model, users = world
    models = pack("prefgen.atelier.models")
    unet = models.load_unet_diffusers()
    x, states, t = torch.randn(2, 8, 16, 16), torch.randn(2, 48, 128), 500
    sigma = model.model.model_sampling.sigmas[t].repeat(2)
    options = {"cond_or_uncond": [0], "sigmas": sigma, "wrappers": patcher.apply_user(model, users[0], 0.8).wrappers}
    with torch.no_grad():
        ours = model.model.apply_model(x, sigma, c_crossattn=states, transformer_options=options)
        plain = model.model.apply_model(x, sigma, c_crossattn=states, transformer_options={"sigmas": sigma})
        keys_values = users[0].adapter.keys_values(users[0].vector[None].expand(2, -1))
        for processor, (k, v) in zip(install(unet), keys_values, strict=True):
            processor.keys_values = (k, 0.8 * v)
        scaled = model.model.model_sampling.calculate_input(sigma, x)
        theirs = unet(scaled, torch.tensor([t, t]), states).sample
        theirs = model.model.model_sampling.calculate_denoised(sigma, theirs, x)
    assert_close(ours, theirs, unlike=plain)


def test_weight_zero_is_the_very_same_model(patcher, world):
    model, users = world
    assert patcher.apply_user(model, users[0], 0.0) is model


def test_queueing_twice_paints_the_same_and_piles_nothing_up(patcher, world):
    model, users = world
    patched = patcher.apply_user(model, users[0])
    first, again, anew = latents(patched), latents(patched), latents(patcher.apply_user(model, users[0]))
    assert torch.equal(first, again) and torch.equal(first, anew)
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
        assert len(patched.get_wrappers(kind, patcher.KEY)) == 1


def test_the_input_model_is_never_changed(patcher, world):
    model, users = world
    before, options = latents(model), repr(model.model_options)
    patched = patcher.apply_user(patcher.apply_user(model, users[0]), users[1], attn_mask=left())
    latents(patched)
    assert torch.equal(latents(model), before)
    assert repr(model.model_options) == options and not model.get_all_wrappers(WrappersMP.APPLY_MODEL)


def test_a_user_changes_the_picture_and_another_one_changes_it_otherwise(patcher, world):
    model, users = world
    one, two = (latents(patcher.apply_user(model, user)) for user in users[:2])
    assert_far(one, latents(model))
    assert_far(one, two)


def test_a_mask_of_zeros_is_no_user_and_a_mask_of_ones_is_no_mask(patcher, world):
    model, users = world
    assert torch.equal(latents(patcher.apply_user(model, users[0], attn_mask=torch.zeros(1, 33, 57))), latents(model))
    free = latents(patcher.apply_user(model, users[0]))
    assert torch.equal(latents(patcher.apply_user(model, users[0], attn_mask=torch.ones(1, 33, 57))), free)


def test_users_stack_and_one_behind_a_black_mask_is_not_there(patcher, world):
    model, users = world
    one = patcher.apply_user(model, users[0])
    both = patcher.apply_user(one, users[1])
    hidden = patcher.apply_user(one, users[1], attn_mask=torch.zeros(1, 8, 8))
    assert torch.equal(latents(hidden), latents(one))
    assert_far(latents(both), latents(one))
    halves = patcher.apply_user(patcher.apply_user(model, users[0], attn_mask=left()), users[1], attn_mask=1 - left())
    swapped = patcher.apply_user(patcher.apply_user(model, users[1], attn_mask=1 - left()), users[0], attn_mask=left())
    assert_close(latents(halves), latents(swapped), ulps=SAMPLED, unlike=latents(one))


def test_at_the_attention_itself_a_mask_lets_nothing_through_outside(patcher, world):
    model, users = world
    _, attention = next(patcher.unet_blocks(model.get_model_object("diffusion_model")))

    def first_output(patched):
        seen = []
        hook = attention.to_out.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
        try:
            latents(patched, cfg=1.0)
        finally:
            hook.remove()
        return seen[0]

    masked = patcher.apply_user(model, users[0], attn_mask=left())
    plain = first_output(model)
    change = (first_output(masked) - plain).abs().amax((0, 2)).reshape(8, 8)
    assert not change[:, 4:].any() and (change[:, :4] > FAR * plain.abs().max()).all()


class OtherPack:
    """What IPAdapter, InstantID and PuLID put on a block: an object that others may add to, on one slot."""

    def __init__(self):
        self.calls = 0

    def __deepcopy__(self, memo):
        return self  # as ComfyUI 0.14 and newer clone models; older ones copy, and the count would be on the copy

    def __call__(self, q, k, v, extra):
        self.calls += 1
        return comfy.ldm.modules.attention.optimized_attention(q, k, v * 1.3, extra["n_heads"])


@pytest.mark.parametrize("whole_block", [False, True])
def test_the_order_beside_another_packs_patch_is_irrelevant(patcher, world, whole_block):
    model, users = world

    def other(m, patch):
        clone = m.clone()
        slots = [
            block for block, _ in patcher.unet_blocks(model.get_model_object("diffusion_model")) if block[0] == "output"
        ]
        for kind, number, index in slots:
            clone.set_model_attn2_replace(patch, kind, number, *([] if whole_block else [index]))
        return clone

    patches = OtherPack(), OtherPack(), OtherPack()
    before = latents(patcher.apply_user(other(model, patches[0]), users[0]))
    after = latents(other(patcher.apply_user(model, users[0]), patches[1]))
    alone = latents(other(model, patches[2]))
    assert torch.equal(before, after)
    assert patches[0].calls == patches[1].calls == patches[2].calls > 0
    assert_far(before, alone)
    assert_far(before, latents(patcher.apply_user(model, users[0])))


def test_start_and_end_limit_the_user_to_a_part_of_the_sampling(patcher, world):
    model, users = world
    full_range, plain = latents(patcher.apply_user(model, users[0])), latents(model)
    parts = [latents(patcher.apply_user(model, users[0], start_at=a, end_at=b)) for a, b in ((0, 0.5), (0.5, 1))]
    for part in parts:
        assert_far(part, full_range)
        assert_far(part, plain)
    assert torch.equal(latents(patcher.apply_user(model, users[0], start_at=0.9, end_at=0.2)), plain)


def test_both_halves_get_a_user_only_when_asked(patcher, world):
    model, users = world
    positive, both = (latents(patcher.apply_user(model, users[0], apply_to=side)) for side in ("positive", "both"))
    assert_far(positive, both)
    # Without guidance there is no negative half to differ.
    one, two = (latents(patcher.apply_user(model, users[0], apply_to=s), cfg=1.0) for s in ("positive", "both"))
    assert torch.equal(one, two)


def test_every_picture_of_a_batch_gets_the_user(patcher, world):
    model, users = world
    patched = patcher.apply_user(model, users[0])
    batch = latents(patched, batch=2)
    plain = latents(model)
    assert_close(batch[0], batch[1], ulps=SAMPLED, unlike=plain[0])
    assert_close(batch[:1], latents(patched), ulps=SAMPLED, unlike=plain)


def test_keys_and_values_are_projected_once_a_run_and_let_go(patcher, world, monkeypatch):
    model, users = world
    calls = []
    adapter = users[0].adapter
    original = type(adapter).keys_values
    monkeypatch.setattr(type(adapter), "keys_values", lambda self, v: calls.append(1) or original(self, v))
    patched = patcher.apply_user(model, users[0])
    latents(patched, sampler="heun")
    assert len(calls) == 1
    latents(patched)
    assert len(calls) == 2
    assert patcher.KEY not in patched.model_options["transformer_options"]


def test_a_model_without_unet_cross_attention_is_named(patcher, world):
    class Flux(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)

    device = torch.device("cpu")
    with pytest.raises(ValueError, match="needs a UNet with cross-attention .* Flux has none") as caught:
        patcher.apply_user(ModelPatcher(Flux(), device, device), world[1][0])
    assert "\n" not in str(caught.value)


def test_a_model_of_another_size_is_named_before_sampling(patcher, world, pack):
    model, users = world
    atelier = pack("prefgen.comfy.atelier_models")
    config = atelier.unet_config_from_diffusers(atelier.models.edition().unet) | {"context_dim": 768}
    other = atelier.AtelierModel(config, 1.0).get_model({})
    other.model_config = object()
    with pytest.raises(ValueError, match="This adapter is for the atelier; the model you connected is SD1.5"):
        patcher.apply_user(ModelPatcher(other, model.load_device, model.offload_device), users[0])


def test_a_mask_with_values_that_are_not_numbers_is_named(patcher, world):
    with pytest.raises(ValueError, match="attn_mask .* not numbers"):
        patcher.apply_user(world[0], world[1][0], attn_mask=torch.full((1, 4, 4), float("nan")))


def test_the_preset_all_and_a_level_schedule_are_exactly_the_plain_application(patcher, world):
    model, users = world
    plain = latents(patcher.apply_user(model, users[0], 0.7))
    for where in ({"blocks": "all"}, {"block_weights": "all=1"}, {"weight_schedule": "0=1"}):
        assert torch.equal(latents(patcher.apply_user(model, users[0], 0.7, **where)), plain)
    doubled = latents(patcher.apply_user(model, users[0], 0.35, block_weights="all=2"))
    assert torch.equal(doubled, plain)
    assert torch.equal(latents(patcher.apply_user(model, users[0], 0.35, weight_schedule="0=2, 1=2")), plain)


def test_a_user_reaches_only_the_blocks_that_are_chosen(patcher, world):
    model, users = world
    blocks = list(patcher.unet_blocks(model.get_model_object("diffusion_model")))

    def outputs(patched):
        """What every cross-attention hands to its output layer at the first call."""
        seen = {}
        hooks = [
            attention.to_out.register_forward_pre_hook(
                lambda _m, inputs, b=block: seen.setdefault(b, inputs[0].clone())
            )
            for block, attention in blocks
        ]
        try:
            latents(patched, cfg=1.0)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    last = blocks[-2][0]  # the last output block: nothing runs behind it that it could change
    name = f"out{last[1]}"
    plain, one = outputs(model), outputs(patcher.apply_user(model, users[0], block_weights=f"all=0, {name}=1"))
    changed = {block for block in plain if not torch.equal(plain[block], one[block])}
    assert changed == {last}
    halved = outputs(patcher.apply_user(model, users[0], block_weights=f"all=0, {name}=0.5"))
    # What is left when the plain output is taken away is rounded as the output is.
    scale, effect = one[last].abs().max(), one[last] - plain[last]
    assert_close(halved[last] - plain[last], effect / 2, scale=scale, ulps=64, unlike=effect)


def test_presets_differ_and_nothing_chosen_is_the_very_same_model(patcher, world):
    model, users = world
    pictures = [
        latents(patcher.apply_user(model, users[0], blocks=preset)) for preset in ("all", "style", "composition")
    ]
    for i, picture in enumerate([*pictures, latents(model)]):
        assert all(difference(picture, other) > FAR for other in pictures[:i])
    assert patcher.apply_user(model, users[0], block_weights="all=0") is model
    assert patcher.apply_user(model, users[0], weight_schedule="0=0, 1=0") is model
    with pytest.raises(ValueError, match="block_weights: this model has no block 'in99'; it has in"):
        patcher.apply_user(model, users[0], block_weights="in99=1")


def test_a_schedule_that_jumps_is_a_start_and_fading_lies_between(patcher, world):
    model, users = world
    late = latents(patcher.apply_user(model, users[0], weight_schedule="0.49=0, 0.5=1"))
    plain = latents(model)
    assert_close(late, latents(patcher.apply_user(model, users[0], start_at=0.5)), ulps=SAMPLED, unlike=plain)
    fading = latents(patcher.apply_user(model, users[0], weight_schedule="0=1, 1=0"))
    assert_far(fading, late)
    assert_far(fading, plain)


def test_a_schedule_knows_the_share_of_the_sampling_from_sigma(pack, world):
    sampling = world[0].model.model_sampling
    sigmas = pack("prefgen.comfy.sigmas").Sigmas.of(sampling)
    sigmas.read(sampling, (), table=True)
    share = sigmas.share
    for at in (0.01, 0.25, 0.5, 0.77, 0.99):
        # Shares are counted in the schedule's thousand steps.
        assert abs(share(float(sampling.percent_to_sigma(at))) - at) < 0.01
    assert share(float(sampling.sigma_max)) == 0.0 and share(0.0) == 1.0


def test_a_half_that_is_none_is_refused(patcher):
    with pytest.raises(ValueError, match="apply_to must be one of positive, both, not 'negative'"):
        patcher.apply_user(None, None, apply_to="negative")
