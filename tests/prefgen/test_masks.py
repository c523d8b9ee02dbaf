"""A picture's mask on a block's tokens: it keeps its sides, and how it shrinks and grows."""

import pytest
import torch

from prefgen.branch import mask_to_tokens


def left_half(height, width):
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (5, 7), (3, 4), (1, 8), (400, 300)])
def test_a_mask_of_any_size_follows_the_blocks(size):
    half = left_half(300, 200).repeat(2, 1, 1)
    resized = mask_to_tokens(half, size)
    assert resized.shape == (2, size[0] * size[1], 1)
    assert 0.44 < resized.mean() < 0.56
    assert mask_to_tokens(torch.ones(1, 7, 5), size).min() == 1


@pytest.mark.parametrize("block", [(22, 16), (16, 22), (4, 16), (16, 4), (27, 17)])
def test_sizes_that_round_up_at_each_halving_keep_left_left_and_top_top(block):
    height, width = block
    rows = mask_to_tokens(left_half(height * 32, width * 32), block).reshape(height, width)
    assert (rows[:, : width // 2] == 1).all() and (rows[:, -(width // 2) :] == 0).all()
    columns = mask_to_tokens(left_half(width * 32, height * 32).mT, block).reshape(height, width)
    assert (columns[: height // 2] == 1).all() and (columns[-(height // 2) :] == 0).all()


def test_a_mask_shrinks_by_the_share_of_each_tokens_area():
    """A filter that looks at two pixels of eight would see a column of ones in every token."""
    stripes = torch.zeros(1, 64, 64)
    stripes[..., ::4] = 1
    for size in ((16, 16), (8, 8)):
        quarter = torch.full((1, size[0] * size[1], 1), 0.25)
        assert torch.allclose(mask_to_tokens(stripes, size), quarter)
        assert torch.allclose(mask_to_tokens(stripes.mT, size), quarter)


def test_a_mask_smaller_than_the_block_grows_without_steps():
    small = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    for shape in (small, small.repeat_interleave(50, 1)):  # the second shrinks in height and grows in width
        rows = mask_to_tokens(shape, (8, 8)).reshape(8, 8)
        expected = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]).expand(8, 8)
        assert torch.allclose(rows, expected, atol=1e-6)


def test_values_near_one_are_one_and_others_stay():
    mask = torch.full((2, 24, 40), 1 - 2e-6)
    mask[1] = 0.99
    one, other = mask_to_tokens(mask, (12, 20))
    assert (one == 1).all() and torch.allclose(other, torch.tensor(0.99)) and not (other == 1).any()
