"""Certificates fail no more often than they may where the truth is known, and controls do fail."""

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks import certificate_coverage as coverage


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("thresholds", 40),
        ("lines", 40),
        ("clusters", 40),
        *(pytest.param(name, 400, marks=pytest.mark.slow) for name in coverage.ENVIRONMENTS),
    ],
)
def test_coverage(name, sets):
    """A bound that fails with probability δ passes in 99 of 100; the seed is fixed."""
    environment, n_tasks, samples = coverage.ENVIRONMENTS[name]
    found = environment(n_tasks, samples, sets)
    controls = {"training risk alone", "query risk alone"}
    failures = {bound: n for bound, n in found.failures.items() if bound not in controls}
    assert max(failures.values()) <= found.allowed
    # Binomial(sets, ½): outside this range in 1 of 1,000.
    low, high = binom.ppf([5e-4, 1 - 5e-4], sets, 0.5)
    assert low <= found.failures["query risk alone"] <= high
    if "training risk alone" in found.failures:
        assert found.failures["training risk alone"] >= 0.9 * sets


def test_errors_of_thresholds_by_bins_are_those_by_comparison():
    rng = np.random.default_rng(0)
    sample, true = coverage._gibbs(rng, 3, 20, 10)
    assert sample.training.shape == sample.kls.shape == true.shape == (3, 21)
    rng = np.random.default_rng(0)
    t = rng.beta(30, 15, (3, 1))
    x = rng.random((3, 20))
    y = (x > t) ^ (rng.random((3, 20)) < 0.05)
    errors = ((x[..., None] > coverage.GRID) != y[..., None]).mean(1)
    q = coverage._PRIORS[None] * np.exp(-20 * errors)[:, None]
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(sample.training, (q * errors[:, None]).sum(-1), atol=1e-12)
    kl = (q * np.log(q / coverage._PRIORS)).sum(-1)
    np.testing.assert_allclose(sample.kls, kl, atol=1e-9)


def test_truncated_squares_of_a_gaussian_by_quadrature():
    grid = np.linspace(-40, 40, 400_001)
    density = coverage.norm.pdf(grid, 0.7, 1.3)
    plain = np.trapezoid(np.minimum((grid / 2.0) ** 2, 1.0) * density, grid)
    found = coverage._truncated(np.array(0.7), np.array(1.3**2))
    assert found == pytest.approx(plain, abs=1e-8)
