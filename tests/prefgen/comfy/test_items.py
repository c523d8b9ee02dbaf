"""Different users, weights and masks for the items of a batch: also where ComfyUI shows the model a part of it."""

import comfy.context_windows
import pytest
import torch

from tests.closeness import SAMPLED, assert_close
from tests.prefgen.comfy import studio

FIRST_HALF, SECOND_HALF = "1=1, 2=0", "1=0, 2=1"
BATCH = 4


@pytest.fixture(scope="module")
def model():
    return studio.build()


@pytest.fixture(scope="module")
def two(pack, model):
    return studio.users(pack, model)


@pytest.fixture
def apply_user(pack):
    return pack("prefgen.comfy.patcher").apply_user


def test_two_users_share_a_batch(apply_user, model, two):
    first, second, plain = (
        studio.latents(m, BATCH) for m in (apply_user(model, two[0]), apply_user(model, two[1]), model)
    )
    half = apply_user(model, two[0], item_weights=FIRST_HALF)
    alone, both = studio.latents(half, BATCH), studio.latents(apply_user(half, two[1], item_weights=SECOND_HALF), BATCH)
    assert_close(alone[:2], first[:2], ulps=SAMPLED, unlike=plain[:2])
    assert_close(alone[2:], plain[2:], ulps=SAMPLED, unlike=first[2:])
    assert_close(both[:2], first[:2], ulps=SAMPLED, unlike=second[:2])
    assert_close(both[2:], second[2:], ulps=SAMPLED, unlike=plain[2:])


def test_a_ramp_gives_every_item_its_own_weight(apply_user, model, two):
    ramp = studio.latents(apply_user(model, two[0], 0.9, item_weights="0=1, 3=0"), BATCH)
    full_weight, plain = studio.latents(apply_user(model, two[0], 0.9), BATCH), studio.latents(model, BATCH)
    for item, share in enumerate((1, 2 / 3, 1 / 3, 0)):
        alone = studio.latents(apply_user(model, two[0], 0.9 * share), BATCH)
        assert_close(ramp[item], alone[item], ulps=SAMPLED, unlike=full_weight[item] if item else plain[item])


@pytest.mark.parametrize("apply_to", ["positive", "both"])
def test_halves_that_are_painted_apart_for_want_of_memory_are_the_same(apply_user, model, two, monkeypatch, apply_to):
    patched = apply_user(model, two[0], apply_to=apply_to, item_weights="0=1, 3=0", attn_mask=torch.rand(BATCH, 32, 32))
    together, calls = studio.latents(patched, BATCH), []
    original = type(model.model).apply_model
    monkeypatch.setattr(
        type(model.model), "apply_model", lambda self, x, *a, **k: calls.append(len(x)) or original(self, x, *a, **k)
    )
    studio.latents(patched, BATCH)
    assert set(calls) == {2 * BATCH}
    plain = studio.latents(model, BATCH)
    calls.clear()
    monkeypatch.setattr(type(model.model), "memory_required", lambda *_, **__: 1e30)
    separate = studio.latents(patched, BATCH)
    assert set(calls) == {BATCH}
    assert_close(separate, together, ulps=SAMPLED, unlike=plain)


class Windows(comfy.context_windows.IndexListContextHandler):
    """ComfyUI 0.3.75 compares the sigmas of a whole batch with those of the schedule; newer ones take the first."""

    def set_step(self, timestep, model_options):
        super().set_step(timestep[:1], model_options)


def windowed(model, length=2, overlap=0):
    """ComfyUI's own context windows over the batch."""
    model = model.clone()
    model.model_options["context_handler"] = Windows(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("flat"),
        context_length=length,
        context_overlap=overlap,
        context_stride=1,
        closed_loop=False,
        dim=0,
    )
    return model


def test_in_a_context_window_every_frame_keeps_its_own_user_and_mask(apply_user, model, two):
    masks = torch.zeros(BATCH, 32, 32)
    masks[3] = 1
    batch = {
        "items": apply_user(apply_user(model, two[0], item_weights=FIRST_HALF), two[1], item_weights=SECOND_HALF),
        "masks": apply_user(model, two[0], attn_mask=masks),
    }
    for patched in batch.values():
        seen, expected = studio.latents(windowed(patched), BATCH), studio.latents(patched, BATCH)
        plain = studio.latents(windowed(model), BATCH)
        assert_close(seen, expected, ulps=SAMPLED)
        assert_close(seen[3], expected[3], ulps=SAMPLED, unlike=plain[3])


def test_the_frames_of_animatediff_evolved_s_windows_are_known(pack):
    items_of = pack("prefgen.comfy.layout").items_of
    assert items_of({"ad_params": {"sub_idxs": [4, 5], "full_length": 8}}, 2) == (4, 5)
    assert items_of({"ad_params": {"sub_idxs": None}}, 3) == items_of({}, 3) == (0, 1, 2)

    class Window:
        index_list, dim = [2, 3], 2  # of a video's frames, not of the batch

    assert items_of({"context_window": Window}, 2) == (0, 1)


def test_item_weights_that_are_all_zero_leave_the_very_model(apply_user, model, two):
    assert apply_user(model, two[0], item_weights="0=0") is model
    with pytest.raises(ValueError, match="item_weights: 'x' is not the number of a batch item"):
        apply_user(model, two[0], item_weights="x=1")
