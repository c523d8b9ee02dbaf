"""A picture's mask on a block's tokens: every size that a UNet's halvings give, and how it shrinks and grows."""

import pytest
import torch

from prefgen.branch import mask_to_tokens

# (latent height, width), block's height, width, where no size of the latent's own shape has as many tokens.
HALVED = [((88, 61), (22, 16)), ((61, 88), (16, 22)), ((13, 61), (4, 16)), ((61, 13), (16, 4)), ((105, 67), (27, 17))]


def left_half(height, width):
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize(("latent", "block"), HALVED)
def test_sizes_that_round_up_at_each_halving_are_followed(latent, block):
    height, width = block
    tokens = mask_to_tokens(left_half(latent[0] * 8, width * 32), height * width, latent)
    rows = tokens.reshape(height, width)
    assert (rows[:, : width // 2] == 1).all() and (rows[:, -(width // 2) :] == 0).all()


def test_a_mask_shrinks_by_the_share_of_each_tokens_area():
    """A filter that looks at two pixels of eight would see a column of ones in every token."""
    stripes = torch.zeros(1, 64, 64)
    stripes[..., ::4] = 1
    assert torch.allclose(mask_to_tokens(stripes, 64, (16, 16)), torch.full((1, 64, 1), 0.25))
    assert torch.allclose(mask_to_tokens(stripes.mT, 64, (16, 16)), torch.full((1, 64, 1), 0.25))


def test_a_mask_smaller_than_the_block_grows_without_steps():
    small = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    for shape in (small, small.repeat_interleave(50, 1)):  # the second shrinks in height and grows in width
        rows = mask_to_tokens(shape, 64, (8, 8)).reshape(8, 8)
        expected = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]).expand(8, 8)
        assert torch.allclose(rows, expected, atol=1e-6)


def test_values_near_one_are_one_and_others_stay():
    mask = torch.full((2, 24, 40), 1 - 2e-6)
    mask[1] = 0.99
    one, other = mask_to_tokens(mask, 240, (24, 40))
    assert (one == 1).all() and torch.allclose(other, torch.tensor(0.99)) and not (other == 1).any()
