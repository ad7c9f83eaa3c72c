"""Inverses of kl against arithmetic with 60 digits."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hbmeta import bounds
from hbmeta.errors import DataError

ENDS = [0.0, 1e-300, 1e-16, 1e-12, 1e-6, 0.01, 0.1]
RISKS = [*ENDS, 0.5, *(1.0 - np.array(ENDS[3:])), np.nextafter(1.0, 0.0), 1.0]
RATES = 10.0 ** np.arange(-12, 4)


def kl(q, p):
    """kl(q‖p) of the very numbers that q and p are in float64, to 60 digits."""
    q, p = mpmath.mpf(float(q)), mpmath.mpf(float(p) if isinstance(p, np.floating) else p)
    total = mpmath.mpf(0)
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            total += a * mpmath.log(a / b) if b > 0 else mpmath.inf
    return total


def assert_upper(q, c, p):
    """kl grows in p above q: p is not below the true end, and p (1 − 1e-9) is not above it."""
    assert q <= p <= 1.0
    with mpmath.workdps(60):
        assert p == 1.0 or kl(q, p) >= c
        inside = mpmath.mpf(float(p)) * (1 - mpmath.mpf("1e-9"))
        assert inside <= float(q) or kl(q, inside) <= c


def assert_lower(q, c, p):
    """The mirror image; a true end below 1e-300 is rounded to 0."""
    assert 0.0 <= p <= q
    with mpmath.workdps(60):
        assert p == 0.0 or kl(q, p) >= c
        inside = mpmath.mpf(float(p) or 2e-300) * (1 + mpmath.mpf("1e-9"))
        assert inside >= float(q) or kl(q, inside) <= c


def test_conservative_and_within_1e_9_at_both_ends_and_all_rates():
    upper = bounds.kl_inverse(np.array(RISKS)[:, None], RATES)
    lower = bounds.kl_inverse_lower(np.array(RISKS)[:, None], RATES)
    assert upper.shape == lower.shape == (len(RISKS), len(RATES))
    for i, q in enumerate(RISKS):
        for j, c in enumerate(RATES):
            assert_upper(q, c, upper[i, j])
            assert_lower(q, c, lower[i, j])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    exponent=st.floats(-16.0, 0.0),
    mirrored=st.booleans(),
    rate=st.floats(-12.0, 3.0),
)
def test_conservative_and_within_1e_9_between(exponent, mirrored, rate):
    small = 10.0**exponent
    q, c = (1.0 - small if mirrored else small), 10.0**rate
    assert_upper(q, c, bounds.kl_inverse(q, c)[()])
    assert_lower(q, c, bounds.kl_inverse_lower(q, c)[()])


def test_closed_forms_at_the_ends():
    c = np.array([1e-12, 0.3, 50.0])
    np.testing.assert_allclose(bounds.kl_inverse(0.0, c), -np.expm1(-c), rtol=1e-14)
    np.testing.assert_allclose(bounds.kl_inverse_lower(1.0, c), np.exp(-c), rtol=1e-14)
    assert (bounds.kl_inverse(1.0, c) == 1.0).all()
    assert (bounds.kl_inverse_lower(0.0, c) == 0.0).all()
    assert float(bounds.kl_inverse(0.3, 0.0)) == float(bounds.kl_inverse_lower(0.3, 0.0)) == 0.3
    assert float(bounds.kl_inverse(0.3, np.inf)) == 1.0
    assert float(bounds.kl_inverse_lower(0.3, np.inf)) == 0.0


def test_mirror_image():
    q, c = np.array([0.05, 0.3, 0.8])[:, None], np.array([1e-4, 0.1, 2.0])
    mirrored = 1.0 - bounds.kl_inverse(1.0 - q, c)
    np.testing.assert_allclose(bounds.kl_inverse_lower(q, c), mirrored, rtol=0, atol=1e-13)


def test_tensors_and_lists_are_taken_and_arrays_of_float64_returned():
    q = torch.tensor([0.1, 0.2], dtype=torch.float32, requires_grad=True)
    found = bounds.kl_inverse(q, [0.05, 0.1])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(
        found, bounds.kl_inverse(q.detach().double().numpy(), [0.05, 0.1])
    )


@pytest.mark.parametrize(
    ("q", "c"),
    [(1.1, 0.1), (-0.1, 0.1), (0.1, -0.1), (np.nan, 0.1), (0.1, np.nan), ([0.1, 0.2], [1, 2, 3])],
)
def test_bad_arguments(q, c):
    for inverse in (bounds.kl_inverse, bounds.kl_inverse_lower):
        with pytest.raises(DataError, match=r"kl_inverse"):
            inverse(q, c)


def test_coverage_is_exact_and_sharp():
    """R ≤ kl⁻¹(k/n, log(1/δ)/n) for k ~ Bin(n, p), summed exactly over k: no chance is involved.

    n = 100, δ = 0.05: the smallest coverage over p in {0.001, …, 0.999} is 0.95245, at p = 0.03; of
    Hoeffding's bound 0.991. A bound that is slightly too small falls below 0.95 here.
    """
    n, delta = 100, 0.05
    k = np.arange(n + 1)
    p = np.arange(1, 1000) / 1000
    weights = binom.pmf(k, n, p[:, None])

    def least(limit):
        coverage = (weights * (limit >= p[:, None])).sum(1)
        return coverage.min(), p[coverage.argmin()]

    limit = bounds.hold_out(risk=k / n, n_samples=n, delta=delta).value
    smallest, where = least(limit)
    assert smallest == pytest.approx(0.95245, abs=5e-6)
    assert where == pytest.approx(0.03)
    hoeffding, _ = least(k / n + np.sqrt(np.log(1 / delta) / (2 * n)))
    assert hoeffding == pytest.approx(0.991, abs=5e-4)
    exact, _ = least(bounds.clopper_pearson(errors=k, n_samples=n, delta=delta).value)
    assert 0.95 <= exact < smallest
    too_small, _ = least(bounds.kl_inverse(k / n, 0.9 * np.log(1 / delta) / n))
    assert too_small < 0.95
