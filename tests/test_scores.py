"""Scores and Gaussian distances against known values, quadrature and double sums."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import tensor

from hbmeta.errors import CurvatureError, DataError
from hbmeta.scores import (
    crps_draws,
    crps_normal,
    effective_sample_size_of_weights,
    gaussian_kl,
    normalised_log_weights,
    wasserstein2_gaussian,
    weighted_quantile,
)


def draws_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Gaussians with known distances.
MEAN0 = tensor([0.1, 0.2], dtype=torch.float64)
COV0 = tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64)
MEAN1 = torch.zeros(2, dtype=torch.float64)
COV1 = tensor([[1.0, 0.2], [0.2, 0.8]], dtype=torch.float64)


def test_gaussian_kl_known_values():
    assert float(gaussian_kl(MEAN0, COV0, MEAN1, COV1)) == pytest.approx(0.3063643211, abs=1e-10)
    assert float(gaussian_kl(MEAN1, COV1, MEAN0, COV0)) == pytest.approx(0.5791619947, abs=1e-10)
    one = torch.ones(1), 4.0 * torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1)
    assert float(gaussian_kl(*one)) == pytest.approx(1.3068528194, abs=1e-10)


def test_gaussian_kl_batches_and_broadcasts():
    means, factors = draws_of(5, 3), draws_of(5, 3, 3, seed=1)
    covs = factors @ factors.mT + torch.eye(3)
    found = gaussian_kl(means, covs, torch.zeros(3), torch.eye(3))
    each = [
        gaussian_kl(m, c, torch.zeros(3), torch.eye(3)) for m, c in zip(means, covs, strict=True)
    ]
    assert found.shape == (5,)
    torch.testing.assert_close(found, torch.stack(each))
    torch.testing.assert_close(gaussian_kl(means, covs, means, covs), torch.zeros(5).double())


def test_gaussian_kl_refuses_a_singular_covariance():
    with pytest.raises(CurvatureError, match="cov1"):
        gaussian_kl(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.ones(2, 2))


def test_wasserstein2_known_value():
    found = wasserstein2_gaussian(MEAN0, COV0, MEAN1, COV1)
    assert float(found) == pytest.approx(0.5063182872, abs=1e-10)
    assert float(found) ** 2 == pytest.approx(0.2563582079, abs=1e-10)


def test_wasserstein2_in_one_dimension_is_distance_of_means_and_sds():
    # W₂² = (m₀ − m₁)² + (s₀ − s₁)².
    found = wasserstein2_gaussian(tensor([3.0]), tensor([[4.0]]), tensor([0.0]), tensor([[36.0]]))
    assert float(found) == pytest.approx(5.0)
    same = wasserstein2_gaussian(MEAN0, COV0, MEAN0, COV0)
    assert float(same) < 1e-7


def test_crps_normal_known_values():
    found = crps_normal(tensor([0.0, 0.0, 1.0]), tensor([1.0, 1.0, 2.0]), tensor([0.0, 1.0, 0.5]))
    expected = tensor([0.2336949773, 0.6024413576, 0.5169996258], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_crps_normal_is_the_integral_of_the_squared_difference_of_distribution_functions():
    mean, sd, y = 0.7, 1.3, -0.4
    below = integrate.quad(lambda x: stats.norm.cdf(x, mean, sd) ** 2, -20.0, y)[0]
    above = integrate.quad(lambda x: stats.norm.sf(x, mean, sd) ** 2, y, 20.0)[0]
    assert float(crps_normal(tensor(mean), tensor(sd), tensor(y))) == pytest.approx(
        below + above, rel=1e-6
    )


def slow_crps(draws, y, weights=None):
    """The double sum over pairs, one column."""
    n = len(draws)
    pairs = np.abs(draws[:, None] - draws[None, :])
    if weights is None:
        return np.abs(draws - y).mean() - pairs.sum() / (2 * n * (n - 1))
    spread = (weights[:, None] * weights[None, :] * pairs).sum() / 2
    return (weights * np.abs(draws - y)).sum() - spread / (1 - (weights**2).sum())


def test_crps_draws_agrees_with_the_double_sum():
    draws, y, log_weights = draws_of(37, 4, 2), draws_of(4, 2, seed=1), draws_of(37, 4, 2, seed=2)
    plain, weighted = crps_draws(draws, y), crps_draws(draws, y, log_weights)
    assert plain.shape == weighted.shape == (4, 2)
    for i in range(4):
        for j in range(2):
            x = draws[:, i, j].numpy()
            w = log_weights[:, i, j].softmax(0).numpy()
            assert float(plain[i, j]) == pytest.approx(slow_crps(x, float(y[i, j])), abs=1e-12)
            assert float(weighted[i, j]) == pytest.approx(
                slow_crps(x, float(y[i, j]), w), abs=1e-12
            )


def test_crps_draws_weights_that_are_equal_change_nothing():
    draws, y = draws_of(50, 3), draws_of(3, seed=1)
    torch.testing.assert_close(crps_draws(draws, y, torch.full((50,), -7.0)), crps_draws(draws, y))


def test_crps_draws_with_all_weight_on_one_draw_is_its_distance():
    log_weights = torch.full((10,), -torch.inf).double()
    log_weights[3] = 0.0
    draws = draws_of(10)
    torch.testing.assert_close(crps_draws(draws, tensor(0.5), log_weights), (draws[3] - 0.5).abs())


def test_crps_draws_of_large_numbers_loses_no_digits():
    draws, y = draws_of(100), tensor(0.2).double()
    shifted = crps_draws(draws + 2.0**30, y + 2.0**30)
    torch.testing.assert_close(shifted, crps_draws(draws, y), atol=1e-6, rtol=0)


def test_crps_draws_is_unbiased_for_the_closed_form():
    # 20,000 samples of 5 draws. z of the mean is standard normal: |z| > 4 has probability 6e-5.
    scores = crps_draws(draws_of(5, 20_000), torch.full((20_000,), 0.3))
    expected = float(crps_normal(tensor(0.0), tensor(1.0), tensor(0.3)))
    z = (float(scores.mean()) - expected) / (float(scores.std()) / math.sqrt(20_000))
    assert abs(z) < 4


def test_crps_draws_needs_two_draws():
    with pytest.raises(DataError, match="at least 2 draws"):
        crps_draws(draws_of(1, 3), torch.zeros(3))


def test_weighted_quantile_is_the_smallest_draw_that_reaches_the_level():
    draws = tensor([3.0, 1.0, 2.0, 4.0])
    assert weighted_quantile(draws, [0.25, 0.26, 0.5, 0.99]).tolist() == [1.0, 2.0, 2.0, 4.0]
    log_weights = tensor([0.1, 0.2, 0.6, 0.1], dtype=torch.float64).log()  # of 3, 1, 2, 4
    levels = [0.1, 0.2, 0.21, 0.8, 0.85, 0.95]
    assert weighted_quantile(draws, levels, log_weights).tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 4.0]


def test_weighted_quantile_agrees_with_numpy():
    draws, log_weights = draws_of(101, 3, 2), draws_of(101, 3, seed=1)
    levels = [0.05, 0.5, 0.95]
    found = weighted_quantile(draws, levels)
    expected = np.quantile(draws.numpy(), levels, axis=0, method="inverted_cdf")
    np.testing.assert_array_equal(found.numpy(), expected)
    weighted = weighted_quantile(draws, levels, log_weights)
    for i in range(3):
        weights = log_weights[:, i].softmax(0).numpy()
        expected = np.quantile(
            draws[:, i].numpy(), levels, axis=0, method="inverted_cdf", weights=weights
        )
        np.testing.assert_array_equal(weighted[:, i].numpy(), expected)


def test_weighted_quantile_of_one_level_has_no_dimension_for_it():
    assert weighted_quantile(draws_of(10, 3), 0.5).shape == (3,)
    assert weighted_quantile(draws_of(10, 3), [0.5]).shape == (1, 3)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_weighted_quantile_refuses_levels_outside(level):
    with pytest.raises(DataError, match="levels between 0 and 1"):
        weighted_quantile(draws_of(10), level)


def test_effective_sample_size():
    log_weights = torch.stack([torch.zeros(8), tensor([0.0] + [-torch.inf] * 7)], 1)
    torch.testing.assert_close(
        effective_sample_size_of_weights(log_weights + 1e3), tensor([8.0, 1.0]).double()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_cannot_be_used_are_refused(bad):
    with pytest.raises(DataError, match="log weights"):
        normalised_log_weights(tensor([0.0, bad]))
    with pytest.raises(DataError, match="log weights"):
        normalised_log_weights(tensor([-torch.inf, -torch.inf]))
