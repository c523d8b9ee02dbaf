"""Fusion: which states make which part of the user vector, and how liked pictures pool."""

import pytest
import torch
import torch.nn.functional as F

from prefgen.adapter import UserProjection
from prefgen.aligner import LayerStandardiser
from prefgen.encoded import EncodedPreference
from prefgen.fusion import FusedUser, fuse_user_vector
from prefgen.pooling import pool_image_embeds
from tests.closeness import assert_close, assert_far


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoded(header, seed=0, **changes):
    layers, width = header.mllm["num_layers"], header.core_width
    parts = {
        "hidden": random(layers, width, seed=seed) * 4,
        "image_embed_liked": random(3, header.image_width, seed=seed),
        "image_embed_disliked": random(2, header.image_width, seed=seed + 1),
    }
    return EncodedPreference(**parts | changes)


def split(vector, header):
    return vector.split([header.semantic_width, header.core_width, header.image_width])


def test_every_part_follows_its_definition(new_adapter):
    adapter = new_adapter()
    header, read = adapter.header, encoded(adapter.header)
    top = (read.hidden[header.mllm["sem_layers"]] - adapter.sem_norm.mean) / adapter.sem_norm.std
    middle = (read.hidden[header.mllm["core_layer"]] - adapter.core_norm.mean[0]) / adapter.core_norm.std[0]
    expected = (
        F.normalize(adapter.aligner(top[None])[0], dim=0),
        middle / header.core_width**0.5,
        F.normalize(F.normalize(read.image_embed_liked, dim=1).mean(0), dim=0),
    )
    vector = fuse_user_vector(adapter, read)
    assert vector.dtype == torch.float32 and vector.shape == (header.user_width,)
    for part, right in zip(split(vector, header), expected, strict=True):
        assert_close(part, right, ulps=32)


def test_only_the_layers_that_the_header_names_count(new_adapter):
    adapter = new_adapter()
    before = split(fuse_user_vector(adapter, encoded(adapter.header)), adapter.header)
    for layer in range(adapter.header.mllm["num_layers"]):
        read = encoded(adapter.header)
        read.hidden[layer] += random(adapter.header.core_width, seed=7)
        semantic, core, image = split(fuse_user_vector(adapter, read), adapter.header)
        assert torch.equal(semantic, before[0]) == (layer not in adapter.header.mllm["sem_layers"])
        assert torch.equal(core, before[1]) == (layer != adapter.header.mllm["core_layer"])
        assert torch.equal(image, before[2])


def test_states_like_those_of_training_give_a_core_of_about_unit_length(new_adapter):
    adapter = new_adapter()
    states = adapter.core_norm.mean + adapter.core_norm.std * random(200, 1, adapter.header.core_width)
    lengths = adapter.core(states.expand(-1, adapter.header.mllm["num_layers"], -1)).norm(dim=1)
    assert 0.9 < lengths.mean() < 1.1


def test_nothing_encoded_is_no_user(new_adapter):
    adapter = new_adapter()
    nobody = encoded(adapter.header, hidden=None, image_embed_liked=None, image_embed_disliked=None)
    vector = fuse_user_vector(adapter, nobody)
    assert vector.shape == (adapter.header.user_width,) and not vector.any()
    assert not fuse_user_vector(adapter, encoded(adapter.header), semantic=0, core=0, image=0).any()


def test_weights_above_one_and_below_zero_scale_a_part(new_adapter):
    adapter = new_adapter()
    read = encoded(adapter.header)
    plain = split(fuse_user_vector(adapter, read), adapter.header)
    scaled = split(fuse_user_vector(adapter, read, semantic=2.5, core=-1.0, image=0.5), adapter.header)
    for part, before, weight in zip(scaled, plain, (2.5, -1.0, 0.5), strict=True):
        assert_close(part, before * weight, ulps=8)


def test_what_an_mllm_encoded_under_inference_mode_can_be_fused(new_adapter):
    adapter = new_adapter()
    with torch.inference_mode():
        read = encoded(adapter.header)
    vector = fuse_user_vector(adapter, read)
    assert torch.equal(vector, fuse_user_vector(adapter, encoded(adapter.header))) and not vector.requires_grad


def test_an_adapter_without_an_mllm_uses_the_pictures_alone(new_adapter):
    adapter = new_adapter(mllm=None)
    read = encoded(new_adapter().header)
    semantic, core, image = split(fuse_user_vector(adapter, read), adapter.header)
    assert not semantic.any() and not core.any() and image.norm() == pytest.approx(1)


def test_a_user_s_digest_tells_numbers_shapes_and_what_stands_for_no_user(new_adapter):
    adapter = new_adapter()
    ramp = torch.arange(12.0)
    users = [
        FusedUser(ramp, adapter),
        FusedUser(ramp.reshape(1, 12), adapter),
        FusedUser(ramp.reshape(3, 4), adapter),
        FusedUser(ramp.reshape(4, 3), adapter),
        FusedUser(ramp, adapter, no_user=ramp * 0),
        FusedUser(ramp, adapter, no_user=ramp * 0, negative=True),
        FusedUser(ramp + 1e-3, adapter),
    ]
    assert len({user.digest for user in users}) == len(users)
    assert FusedUser(ramp.clone(), adapter, taste="sea@1a2b3c4d").digest == users[0].digest


class TestPooling:
    def test_it_is_of_unit_length_and_ignores_order_and_scale(self):
        liked = random(5, 8)
        pooled = pool_image_embeds(liked)
        assert pooled.norm() == pytest.approx(1)
        other = pool_image_embeds(liked.flip(0) * torch.tensor([[1.0], [9], [2], [3], [0.1]]))
        assert_close(other, pooled, ulps=32, unlike=pool_image_embeds(liked[1:]))

    def test_one_picture_is_its_own_pool(self):
        assert_close(pool_image_embeds(random(1, 8)), F.normalize(random(1, 8), dim=1)[0], ulps=32)

    def test_a_push_moves_it_away_from_what_was_disliked(self):
        liked, disliked = random(4, 8), random(3, 8, seed=1)
        centre = F.normalize(disliked, dim=1).mean(0)
        nearness = [pool_image_embeds(liked, disliked, push) @ centre for push in (0.0, 0.5, 1.0)]
        assert nearness[0] > nearness[1] > nearness[2]
        assert torch.equal(pool_image_embeds(liked, disliked), pool_image_embeds(liked))

    @pytest.mark.parametrize("disliked", [None, torch.zeros(0, 8)])
    def test_nothing_disliked_is_no_push(self, disliked):
        assert torch.equal(pool_image_embeds(random(4, 8), disliked, 1.0), pool_image_embeds(random(4, 8)))


class TestParts:
    def test_the_standardiser_makes_every_layer_mean_0_and_deviation_1(self):
        states = random(500, 3, 8) * torch.tensor([1.0, 50.0, 0.01])[:, None] + torch.tensor([0.0, 9.0, -3.0])[:, None]
        norm = LayerStandardiser(3, 8)
        norm.fit(states)
        standardised = norm(states)
        # The third layer lies 300 deviations from zero: that much of its last place is lost in subtracting the mean.
        assert_close(standardised.mean(0), torch.zeros(3, 8), scale=300, ulps=32)
        assert_close(standardised.std(0), torch.ones(3, 8), scale=300, ulps=32)

    def test_a_value_that_never_varies_stays_finite(self):
        norm = LayerStandardiser(1, 4)
        norm.fit(torch.ones(10, 1, 4))
        assert torch.isfinite(norm(torch.ones(2, 1, 4))).all()

    def test_user_tokens_are_normalised_and_no_user_still_has_tokens(self):
        projection = UserProjection(10, 24, tokens=4)
        tokens = projection(torch.cat([random(2, 10), torch.zeros(1, 10)]))
        assert tokens.shape == (3, 4, 24)
        assert_close(tokens.mean(-1), torch.zeros(3, 4), scale=tokens.abs().max(), ulps=32)
        # LayerNorm's epsilon is felt where a token is small before it, by up to a hundredth.
        spread = tokens.std(-1, unbiased=False)
        assert 0.99 < spread.min() and spread.max() < 1.01
        assert_far(tokens[0], tokens[1])
