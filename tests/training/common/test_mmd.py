"""MMD: what an unbiased two-sample distance must do, and an oracle written without it."""

import math

import pytest
import torch

from tests.closeness import assert_close
from training.common.mmd import median_bandwidths, mmd2


def sample(seed, count=64, width=8, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def oracle(x, y, bandwidths):
    """The U-statistic by its definition: every pair by itself, in Python's own doubles."""

    def kernel(a, b):
        squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-squared / (2 * h)) for h in bandwidths) / len(bandwidths)

    x, y, bandwidths = x.double().tolist(), y.double().tolist(), bandwidths.double().tolist()
    xx = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))
    yy = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (len(y) * (len(y) - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return xx + yy - 2 * xy


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_it_is_the_u_statistic(shift):
    x, y = sample(1, 12), sample(2, 9, shift=shift)
    bandwidths = median_bandwidths(x, y)
    expected = oracle(x, y, bandwidths)
    # Each of its three means of a kernel is at most 1: they cancel.
    assert_close(
        mmd2(x.double(), y.double(), bandwidths.double()), torch.tensor(expected, dtype=torch.float64), scale=1
    )
    assert_close(mmd2(x, y, bandwidths), torch.tensor(expected), scale=1, ulps=64)


def test_two_samples_of_one_distribution_give_zero_in_the_mean_and_negative_values_too():
    values = torch.tensor([mmd2(sample(i, 16), sample(1000 + i, 16)).item() for i in range(200)])
    assert values.min() < 0 < values.max()
    assert abs(values.mean()) < 4 * values.std() / 200**0.5


def test_a_shift_is_detected_and_grows():
    null = max(mmd2(sample(i), sample(100 + i)).item() for i in range(20))
    values = [mmd2(sample(1), sample(2, shift=s)).item() for s in (0.3, 0.6, 1.2)]
    assert null < values[0] < values[1] < values[2]


def test_order_within_and_between_the_sets_is_irrelevant():
    x, y = sample(1), sample(2, 48, shift=0.2)
    bandwidths = median_bandwidths(x, y)
    value = mmd2(x, y, bandwidths)
    assert_close(mmd2(x.flip(0), y.roll(5, 0), bandwidths), value, scale=1, ulps=16)
    assert_close(mmd2(y, x, bandwidths), value, scale=1, ulps=16)


def test_gradients_are_finite_with_duplicates_and_pull_the_sets_together():
    x = torch.zeros(6, 4).requires_grad_()
    y = torch.cat([torch.zeros(3, 4), torch.ones(3, 4)])
    bandwidths = median_bandwidths(torch.zeros(6, 4), y + sample(0, 6, 4) * 0.1)
    mmd2(x, y, bandwidths).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad.sum(0) < 0).all()


def test_autocast_and_bf16_inputs_do_not_reach_the_kernel():
    x, y = sample(1, 256), sample(2, 256)
    bandwidths = median_bandwidths(x, y)
    plain = mmd2(x, y, bandwidths)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd2(x, y, bandwidths), plain)
    assert mmd2(x.bfloat16(), y.bfloat16(), bandwidths).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((1, 4), (5, 4)), ((5, 4), (1, 4)), ((5, 4), (5, 3))])
def test_sets_that_have_no_distance_are_refused(shapes):
    with pytest.raises(ValueError, match="at least 2 vectors"):
        mmd2(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_the_kernels_octaves_lie_two_on_either_side_of_the_median_distance():
    x, y = sample(1, 7), sample(2, 6, shift=0.4)
    pooled = [*x.double().tolist(), *y.double().tolist()]
    squared = sorted(
        sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        for i, a in enumerate(pooled)
        for j, b in enumerate(pooled)
        if i != j
    )
    median = squared[len(squared) // 2 - 1]  # every distance is there twice
    expected = [median / 4, median / 2, median, median * 2, median * 4]
    assert median_bandwidths(x, y).tolist() == pytest.approx(expected, rel=1e-4)
    assert mmd2(x, y).item() == pytest.approx(oracle(x, y, torch.tensor(expected)), abs=1e-5)


def test_weights_choose_among_the_octaves():
    x, y = sample(1, 12), sample(2, 9, shift=0.5)
    bandwidths = median_bandwidths(x, y)
    one = mmd2(x, y, bandwidths, [0, 0, 0.5, 0, 0]).item()
    assert one == pytest.approx(oracle(x, y, bandwidths[2:3]) / 2, abs=1e-5)
