"""Pooling liked pictures and pushing away from disliked ones, for adapters that read pictures alone."""

import pytest
import torch
import torch.nn.functional as F

from prefgen.pooling import LEAST_DISLIKED, NEGATIVE, PUSH_AWAY, SIDE_BY_SIDE, WAYS, mean, pool_pictures
from tests.closeness import FAR, assert_close


def pictures(n, *shape, seed=0, common=2.0):
    """Embeddings as CLIP gives them: different directions beside a large common one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator) + common


SHAPES = [(32,), (5, 32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_one_picture_is_given_back_as_it_was_encoded(self, way, shape):
        liked = pictures(1, *shape)
        user, negative = pool_pictures(liked, None, way)
        assert torch.equal(user, liked) and negative is None

    def test_push_0_and_nothing_disliked_are_the_same(self, way, shape):
        liked, disliked = pictures(3, *shape), pictures(2, *shape, seed=1)
        expected, _ = pool_pictures(liked, None, way, 1.0)
        for other, push in ((disliked, 0.0), (disliked[:0], 1.0)):
            user, negative = pool_pictures(liked, other, way, push)
            assert torch.equal(user, expected) and negative is None

    def test_the_order_of_the_pictures_is_irrelevant(self, way, shape):
        liked, disliked = pictures(4, *shape), pictures(3, *shape, seed=1)
        one, _ = pool_pictures(liked, disliked, way, 0.7)
        other, _ = pool_pictures(liked.flip(0), disliked.flip(0), way, 0.7)
        assert_close(one, other.flip(0))

    def test_what_comes_out_is_as_long_as_a_picture(self, way, shape):
        liked, disliked = pictures(4, *shape), pictures(3, *shape, seed=1)
        user, _ = pool_pictures(liked, disliked, way, 1.0)
        lengths = liked.norm(dim=-1)
        assert user.norm(dim=-1).min() > 0.9 * lengths.min() and user.norm(dim=-1).max() < 1.1 * lengths.max()


def nearness(user, disliked):
    return F.cosine_similarity(user.mean(0), disliked.mean(0), dim=0)


@pytest.mark.parametrize("way", [PUSH_AWAY, SIDE_BY_SIDE, LEAST_DISLIKED])
def test_the_more_push_the_less_like_the_disliked(way):
    liked, disliked = pictures(6, 32), pictures(4, 32, seed=1)
    near = [nearness(pool_pictures(liked, disliked, way, push)[0], disliked) for push in (0.0, 0.5, 1.0, 2.0)]
    assert near == sorted(near, reverse=True) and near[0] - near[-1] > FAR


def test_a_push_keeps_what_all_pictures_have_in_common():
    """Subtracting the disliked mean would leave next to nothing of it."""
    liked, disliked = pictures(6, 512), pictures(6, 512, seed=1)
    user, _ = pool_pictures(liked, disliked, PUSH_AWAY, 1.0)
    assert F.cosine_similarity(user[0], torch.ones(512), dim=0) > 0.7
    assert F.cosine_similarity(mean(liked)[0] - mean(disliked)[0], torch.ones(512), dim=0) < 0.3


def test_side_by_side_keeps_every_picture_and_negative_hands_over_the_disliked_mean():
    liked, disliked = pictures(3, 8), pictures(2, 8, seed=1)
    assert pool_pictures(liked, disliked, SIDE_BY_SIDE)[0].shape == (3, 8)
    user, negative = pool_pictures(liked, disliked, NEGATIVE)
    assert torch.equal(user, mean(liked)) and torch.equal(negative, mean(disliked))


def test_the_picture_most_like_the_disliked_counts_least():
    disliked = pictures(1, 32, common=0.0)
    liked = torch.cat([disliked + 0.1 * pictures(1, 32, seed=2, common=0.0), pictures(2, 32, seed=3, common=0.0)])
    with_push, without = (pool_pictures(liked, disliked, LEAST_DISLIKED, push)[0] for push in (2.0, 0.0))
    assert F.cosine_similarity(with_push, liked[:1]) < F.cosine_similarity(without, liked[:1])


def test_another_way_is_named():
    with pytest.raises(ValueError, match="no pooling 'average': choose push away, side by side"):
        pool_pictures(pictures(1, 8), None, "average")
