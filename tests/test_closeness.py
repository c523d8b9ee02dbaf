"""What the tests compare by tells rounding from error at any scale, and what plays another CPU rounds as one."""

import pytest
import torch

from tests.closeness import EFFECT, ULPS, assert_close, assert_far, assert_learnt_alike, difference
from tests.perturb import OtherCpu

EPSILON = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [1e-6, 1.0, 550.0])
def test_the_tolerance_grows_with_the_largest_value(size):
    values = torch.tensor([0.01, -0.3, 1.0]) * size
    step = EPSILON * size
    assert_close(values + 0.9 * ULPS * step, values)
    with pytest.raises(AssertionError, match=r"differs by .* at \(\d,\): .* allowed \(256 ulps of .*; 3 of 3 values"):
        assert_close(values + 1.5 * ULPS * step, values)


def test_the_coarser_precision_counts():
    values = torch.tensor([1.0, -2.0])
    assert_close((values * (1 + 2**-9)).bfloat16(), values, ulps=1)
    with pytest.raises(AssertionError):
        assert_close(values * (1 + 2**-9), values)


def test_no_number_is_close_to_nothing_and_a_shape_is_not_broadcast():
    with pytest.raises(AssertionError, match="1 of 2 values are not finite"):
        assert_close(torch.tensor([1.0, float("nan")]), torch.ones(2))
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(torch.ones(1), torch.ones(2))


def test_an_effect_that_the_tolerance_could_hide_is_refused():
    values = torch.ones(3)
    assert_close(values, values, unlike=values * 1.1)
    with pytest.raises(AssertionError, match="too small to be told"):
        assert_close(values, values, unlike=values * (1 + EFFECT * ULPS * EPSILON / 2))
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_far(values, values * 1.001)


def test_weights_that_learnt_from_others_samples_are_not_alike():
    weights = {"a": torch.zeros(100)}
    single = torch.zeros(100)
    single[0] = 0.01  # a step of one weight whose gradient is next to nothing
    assert_learnt_alike(weights, {"a": single}, rate=0.01)
    with pytest.raises(AssertionError, match="a: 0.01 apart in the mean"):
        assert_learnt_alike(weights, {"a": torch.full((100,), 0.01)}, rate=0.01)


def test_another_cpu_rounds_the_same_again_and_another_batch_or_place_otherwise():
    a, b = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), torch.eye(64) * 0.7
    other, another = OtherCpu(1), OtherCpu(2)
    with other:
        one, again, batch = a @ b, a @ b, a.repeat(2, 1) @ b
    with another:
        two = a @ b
    assert torch.equal(one, again)
    assert not torch.equal(one, a @ b) and not torch.equal(one, two)
    assert not torch.equal(batch[0], batch[1]) and not torch.equal(batch[:1], one)
    assert difference(one, a @ b) < 16 * EPSILON
    assert_close(batch[1:], one)


def test_another_cpu_leaves_zeros_and_whole_numbers():
    with OtherCpu(1):
        assert not (torch.zeros(3, 4) @ torch.rand(4, 5)).any()
        assert torch.equal(torch.ones(3, 4) @ torch.ones(4, 5), torch.full((3, 5), 4.0))
        assert torch.zeros(3).exp().eq(1).all()
