"""The small statistics that every figure goes through: intervals, their rounding, standardised inputs of probes."""

import numpy as np
import pytest
import torch

from training.common import statistics as bootstrap
from training.evaluation import probes


def test_an_interval_is_the_percentiles_of_resampled_means_to_four_places():
    by_user = np.random.default_rng(1).normal(0.123456, 0.5, 37)
    chosen = np.random.default_rng(0).integers(37, size=(10_000, 37))
    means = np.sort([by_user[draw].mean() for draw in chosen])
    low, high = bootstrap.bootstrap(by_user)
    # Between the 250th and 251st of 10,000 draws, counted from either end.
    assert means[249] - 5e-5 <= low <= means[250] + 5e-5 and means[9749] - 5e-5 <= high <= means[9750] + 5e-5
    exact = np.percentile(bootstrap.resampled(by_user), [2.5, 97.5])
    for bound, unrounded in zip((low, high), exact, strict=True):
        assert bound == round(unrounded, 4) and bound != round(unrounded, 3)
        assert abs(bound - unrounded) <= 5e-5


def test_rows_are_resampled_together():
    by_user = np.random.default_rng(2).normal(size=(2, 3, 11))
    draws = bootstrap.resampled(by_user)
    assert draws.shape == (2, 3, 10_000)
    np.testing.assert_allclose(draws[1, 2], bootstrap.resampled(by_user[1, 2]), atol=1e-12)
    np.testing.assert_allclose(bootstrap.resampled(by_user[0] - by_user[1]), draws[0] - draws[1], atol=1e-12)


def test_clusters_are_drawn_as_often_as_there_are():
    weights = bootstrap.weights(9, 0)
    assert weights.shape == (10_000, 9) and (weights.sum(1) == 9).all()
    # Binomial: 9 draws of one in 9.
    assert weights.mean(0) == pytest.approx(np.ones(9), abs=0.06)
    assert weights.std() == pytest.approx(np.sqrt(8 / 9), rel=0.02)
    assert not np.array_equal(weights, bootstrap.weights(9, 1))


def test_a_crossed_mean_resamples_rows_and_columns_by_themselves():
    rng = np.random.default_rng(3)
    sums, counts = rng.normal(size=(5, 4)), rng.integers(0, 3, (5, 4))
    sums = np.where(counts, sums, 0)
    draws = bootstrap.crossed(sums, counts)
    rows, columns = bootstrap.weights(5, 0), bootstrap.weights(4, 1)
    expected = []
    for row, column in zip(rows, columns, strict=True):
        total = sum(row[i] * column[j] * sums[i, j] for i in range(5) for j in range(4))
        present = sum(row[i] * column[j] * counts[i, j] for i in range(5) for j in range(4))
        if present:
            expected.append(total / present)
    np.testing.assert_allclose(draws, expected, atol=1e-12)


def test_inputs_of_probes_have_zero_mean_and_unit_variance_over_the_reference():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.01, 1.0, 300.0])
    reference = torch.randn(40, 5, 3, generator=generator) * scales + 7 * scales
    standard = probes.standardised(reference, reference).flatten(0, 1)
    assert standard.mean(0) == pytest.approx(torch.zeros(3), abs=1e-4)
    assert standard.var(0) == pytest.approx(torch.ones(3), rel=5e-3)
    other = torch.randn(6, 3, generator=generator)
    flat = reference.flatten(0, 1).double()
    expected = (other.double() - flat.mean(0)) / flat.var(0).sqrt()
    assert probes.standardised(other, reference).double() == pytest.approx(expected, rel=5e-3)


def test_an_input_that_never_varies_stays_zero():
    constant = torch.full((30, 2), 4.0)
    assert not probes.standardised(constant, constant).any()


def test_a_ridge_probe_is_the_least_squares_solution_held_back():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 30, generator=generator)
    y = torch.randn(12, 2, generator=generator)
    a, b = x.double(), y.double()
    # The primal form, with as many unknowns as inputs; the strength is 0.3 a unit of width.
    expected = torch.linalg.solve(a.T @ a + 0.3 * 30 * torch.eye(30).double(), a.T @ b)
    torch.testing.assert_close(probes.ridge(x, y).double(), expected, rtol=1e-4, atol=1e-5)
