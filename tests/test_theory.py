"""The vectors T12 to T15 of the reference, the closed forms against loops, and the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hbmeta.errors import DataError
from hbmeta.theory import (
    SignedPrecision,
    implied_prior_precision,
    implied_prior_variance,
    matching_step_size,
    scaled_step_size,
    type_two_maximum_likelihood,
)
from tests import reference

X = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, -1.0]])
Y = np.array([0.5, 1.2, 2.8, -0.7])
HESSIAN = X.T @ X / 0.25
START = np.array([0.2, -0.1])


# T12: one dimension


@pytest.mark.parametrize(
    ("curvature", "step_size", "steps", "precision", "variance"),
    [
        (2.0, 0.1, 5, 0.9747739172, 1.0258789062),
        (2.0, 0.01, 5, 18.8161593080, 0.0531458085),
        (0.5, 0.01, 1, 99.5, 1 / 99.5),
        (10.0, 0.01, 5, 14.4194280970, 0.0693508781),
    ],
)
def test_implied_variance(curvature, step_size, steps, precision, variance):
    found = implied_prior_variance(curvature, step_size, steps)
    assert found == pytest.approx(variance, abs=6e-11)
    assert 1 / found == pytest.approx(precision, rel=1e-10)


def test_one_step_is_the_published_form_exactly():
    """1/τ² = 1/(αN) − λ holds for N = 1 alone."""
    assert 1 / implied_prior_variance(0.5, 0.01, 1) == pytest.approx(1 / 0.01 - 0.5, rel=1e-14)
    assert abs(1 / implied_prior_variance(2.0, 0.01, 5) - (1 / 0.05 - 2.0)) > 0.5


def test_second_order_expansion():
    """1/τ² = 1/(αN) − λ(N+1)/(2N) + O(αλ²), so the error falls tenfold with α."""
    errors = []
    for step_size in (1e-3, 1e-4):
        expansion = 1 / (5 * step_size) - 2.0 * 6 / 10
        errors.append(abs(1 / implied_prior_variance(2.0, step_size, 5) - expansion))
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.02)


def test_descent_is_the_map_estimate():
    path = reference.descent_path(lambda phi: 2.0 * (phi - 3.0), [-1.0], 0.1, 5)
    assert path[-1][0] == pytest.approx(1.68928, abs=1e-12)
    precision = 1 / implied_prior_variance(2.0, 0.1, 5)
    assert (2.0 * 3.0 + precision * -1.0) / (2.0 + precision) == pytest.approx(1.68928, abs=1e-12)


def test_small_curvature_has_the_limit():
    assert implied_prior_variance(0.0, 0.01, 5) == 0.05
    for curvature in (1e-300, 1e-18, 1e-12):
        assert implied_prior_variance(curvature, 0.01, 5) == pytest.approx(0.05, rel=1e-12)


def test_many_steps_are_a_flat_prior():
    assert implied_prior_variance(0.9, 1.0, 10_000) == math.inf


@given(
    st.floats(0.0, 50.0),
    st.floats(1e-5, 0.019),
    st.integers(1, 60),
)
def test_variance_is_at_least_step_size_times_steps(curvature, step_size, steps):
    found = implied_prior_variance(curvature, step_size, steps)
    assert found >= step_size * steps * (1 - 1e-12)
    assert implied_prior_variance(curvature, step_size, steps + 1) > found


@pytest.mark.parametrize(
    ("product", "steps", "precision"),
    [
        (1.5, 3, -0.1111111),
        (1.5, 4, 0.0666667),
        (1.9, 2, 4.2631579),
        (2.0, 3, -0.5),
        (2.5, 2, -1.8),
    ],
)
def test_signed_regime(product, steps, precision):
    found = implied_prior_variance(1.0, product, steps, allow_oscillating=True)
    assert isinstance(found, SignedPrecision)
    assert found.precision == pytest.approx(precision, abs=6e-8)
    assert found.oscillating
    assert found.is_prior == (precision > 0)


def test_signed_regime_at_its_edges():
    flat = implied_prior_variance(1.0, 1.0, 3, allow_oscillating=True)
    assert flat == SignedPrecision(0.0, oscillating=False)
    assert not flat.is_prior
    point = implied_prior_variance(1.0, 2.0, 2, allow_oscillating=True)
    assert point.precision == math.inf
    assert not point.is_prior
    below = implied_prior_variance(2.0, 0.1, 5, allow_oscillating=True)
    assert below.precision == pytest.approx(0.9747739172, rel=1e-10)
    assert below.is_prior
    assert not below.oscillating


@pytest.mark.parametrize(
    "arguments",
    [
        (1.0, 1.0, 3),  # αλ = 1
        (1.0, 1.5, 4),  # 1 < αλ < 2: inside the domain that is often given
        (-1.0, 0.1, 3),
        (math.nan, 0.1, 3),
        (math.inf, 0.1, 3),
        (1.0, 0.0, 3),
        (1.0, math.nan, 3),
        (1.0, 0.1, 0),
        (1.0, 0.1, 2.5),
        (1.0, 0.1, True),
    ],
)
def test_outside_the_domain(arguments):
    with pytest.raises(DataError, match="implied_prior_variance"):
        implied_prior_variance(*arguments)


# T13: conventions of the loss


@pytest.mark.parametrize(
    ("reduction", "variance", "shrinkage", "small"),
    [
        ("sum", 0.2965020576, 0.07776, 0.05),
        ("mean", 0.0056608255, 0.8153726976, 0.005),
        ("mean-squared-error", 0.0026572904, 0.9039207968, 0.0025),
    ],
)
def test_loss_scales(reduction, variance, shrinkage, small):
    on_sum = scaled_step_size(0.01, 10, 0.5, reduction)
    assert implied_prior_variance(40.0, on_sum, 5) == pytest.approx(variance, abs=6e-11)
    assert (1 - 40.0 * on_sum) ** 5 == pytest.approx(shrinkage, abs=6e-11)
    assert on_sum * 5 == pytest.approx(small, rel=1e-12)


def test_loss_scale_is_that_of_descent_on_the_loss():
    """Each loss by itself, in a loop, against the step that is claimed for the sum."""
    rng = np.random.default_rng(0)
    y, noise = rng.normal(size=7), 0.6
    gradients = {
        "sum": lambda phi: (phi - y).sum() / noise**2,
        "mean": lambda phi: (phi - y).mean() / noise**2,
        "mean-squared-error": lambda phi: 2 * (phi - y).mean(),
    }
    for reduction, gradient in gradients.items():
        there = reference.descent_path(gradient, 2.0, 0.02, 4)[-1]
        on_sum = scaled_step_size(0.02, 7, noise, reduction)
        assert reference.descent_path(gradients["sum"], 2.0, on_sum, 4)[-1] == pytest.approx(there)


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 10, 0.5, "sum"),
        (0.1, 0, 0.5, "mean"),
        (0.1, 2.0, 0.5, "mean"),
        (0.1, 10, None, "mean-squared-error"),
        (0.1, 10, -0.5, "mean-squared-error"),
        (0.1, 10, 0.5, "median"),
    ],
)
def test_loss_scale_refuses(arguments):
    with pytest.raises(DataError, match="scaled_step_size"):
        scaled_step_size(*arguments)


# T14: several dimensions, and a preconditioner


def test_implied_precision():
    found = implied_prior_precision(HESSIAN, 0.01, 5).numpy()
    expected = [[11.8144223391, -3.3448004636], [-3.3448004636, 8.4696218756]]
    np.testing.assert_allclose(found, expected, atol=6e-11)
    np.testing.assert_allclose(np.linalg.eigvalsh(HESSIAN), [11.05572809, 28.94427191], atol=6e-9)
    np.testing.assert_allclose(np.linalg.eigvalsh(found), [6.4024215035, 13.8816227112], atol=6e-11)
    np.testing.assert_allclose(
        found, reference.implied_precision(HESSIAN, 0.01 * np.eye(2), 5), rtol=1e-12
    )


def test_descent_is_the_map_estimate_in_two_dimensions():
    optimum = reference.least_squares(X, Y)
    end = reference.descended(HESSIAN, optimum, START, 0.01, 5)
    np.testing.assert_allclose(end, [0.50884352, 0.804299776], atol=6e-10)
    precision = implied_prior_precision(HESSIAN, 0.01, 5).numpy()
    estimate = reference.map_estimate(HESSIAN, optimum, START, precision)
    np.testing.assert_allclose(estimate, end, rtol=1e-12)


def test_preconditioned_descent_is_the_map_estimate():
    preconditioner = np.array([[0.02, 0.005], [0.005, 0.01]])
    found = implied_prior_precision(HESSIAN, 1.0, 5, preconditioner).numpy()
    expected = [[5.0807700495, -7.3683259861], [-7.3683259861, 12.5755105797]]
    np.testing.assert_allclose(found, expected, atol=6e-11)
    optimum = reference.least_squares(X, Y)
    path = reference.descent_path(
        lambda phi: preconditioner @ HESSIAN @ (phi - optimum), START, 1.0, 5
    )
    np.testing.assert_allclose(path[-1], [0.7822568806, 0.7320376934], atol=6e-11)
    estimate = reference.map_estimate(HESSIAN, optimum, START, found)
    np.testing.assert_allclose(estimate, path[-1], rtol=1e-11)


def test_step_size_multiplies_the_preconditioner():
    both = implied_prior_precision(HESSIAN, 0.5, 5, [0.02, 0.01])
    assert torch.allclose(both, implied_prior_precision(HESSIAN, 1.0, 5, [0.01, 0.005]))


def test_negative_step_sizes_have_no_prior():
    """P = diag(0.02, −0.002) gives Λ with eigenvalues 2.784 and −114.4."""
    dense = reference.implied_precision(HESSIAN, np.diag([0.02, -0.002]), 5)
    np.testing.assert_allclose(np.linalg.eigvalsh(dense), [-114.4, 2.784], rtol=5e-4)
    with pytest.raises(DataError, match="positive definite preconditioner"):
        implied_prior_precision(HESSIAN, 1.0, 5, [0.02, -0.002])


def test_directions_without_curvature():
    """Fewer points than parameters: the iterate does not move there, and 1/(αN) is the limit."""
    hessian = np.outer([1.0, 2.0], [1.0, 2.0])
    found = implied_prior_precision(hessian, 0.01, 5).numpy()
    null = np.array([2.0, -1.0])
    np.testing.assert_allclose(found @ null, null / 0.05, rtol=1e-12)
    end = reference.descended(hessian, np.array([1.0, 1.0]), START, 0.01, 5)
    estimate = reference.map_estimate(hessian, np.array([1.0, 1.0]), START, found)
    np.testing.assert_allclose(estimate, end, rtol=1e-12)


def test_one_dimension_is_a_special_case():
    found = implied_prior_precision([[2.0]], 0.1, 5)
    assert float(found) == pytest.approx(1 / implied_prior_variance(2.0, 0.1, 5), rel=1e-14)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("hessian", "step_size", "preconditioner", "complaint"),
    [
        (HESSIAN, 0.04, None, "below 1"),
        (-HESSIAN, 0.01, None, "semi-definite"),
        ([[1.0, 0.5], [0.0, 1.0]], 0.01, None, "symmetric"),
        ([[1.0, math.nan], [math.nan, 1.0]], 0.01, None, "finite"),
        ([1.0, 2.0], 0.01, None, "symmetric"),
        (HESSIAN, 0.01, [1.0, 1.0, 1.0], "shape"),
        (HESSIAN, -0.01, None, "step_size"),
    ],
)
def test_implied_precision_refuses(hessian, step_size, preconditioner, complaint):
    with pytest.raises(DataError, match=complaint):
        implied_prior_precision(hessian, step_size, 5, preconditioner)


# The inverse


def test_matching_step_size():
    step_size = matching_step_size(10.0, 0.8, 5)
    assert step_size == pytest.approx(0.0355605985, abs=6e-11)
    assert implied_prior_variance(10.0, step_size, 5) == pytest.approx(0.8, rel=1e-14)
    assert matching_step_size(0.0, 0.8, 5) == pytest.approx(0.16)


@given(st.floats(0.0, 1e4), st.floats(1e-4, 1e3), st.integers(1, 50))
def test_matching_step_size_is_the_inverse(curvature, variance, steps):
    step_size = matching_step_size(curvature, variance, steps)
    assert step_size * curvature < 1 or steps == 1
    if step_size * curvature < 1 - 1e-6:
        found = implied_prior_variance(curvature, step_size, steps)
        assert found == pytest.approx(variance, rel=1e-8)


@pytest.mark.parametrize("arguments", [(-1.0, 0.8, 5), (1.0, 0.0, 5), (1.0, 0.8, 0)])
def test_matching_step_size_refuses(arguments):
    with pytest.raises(DataError, match="matching_step_size"):
        matching_step_size(*arguments)


# T15: Type-II maximum likelihood


def test_evidence_vector():
    evidence = reference.log_evidence(np.ones((3, 1)), [1.0, 2.0, 1.5], [1.0], [[0.5]], 0.5)
    assert evidence == pytest.approx(-2.8646148467, abs=6e-11)


def test_type_two_with_equal_counts():
    found = type_two_maximum_likelihood([1.0, 3.0, 2.5, 0.5], 5, 0.5)
    assert (found.mean, found.variance) == pytest.approx((1.75, 0.9625), rel=1e-14)
    assert not found.at_zero


def test_type_two_with_unequal_counts():
    means, counts = [1.0, 3.0, 2.5, 0.5, 1.8], [2, 5, 10, 1, 4]
    found = type_two_maximum_likelihood(means, counts, 0.5)
    assert found.mean == pytest.approx(1.9122937, abs=6e-8)
    assert found.variance == pytest.approx(0.5509072, abs=6e-8)
    assert -found.log_likelihood == pytest.approx(6.5174140411, abs=6e-11)
    mean, variance, negative = reference.type_two(means, counts, 0.5)
    assert (found.mean, found.variance) == pytest.approx((mean, variance), rel=1e-10)
    assert -found.log_likelihood == pytest.approx(negative, rel=1e-12)


def test_type_two_at_zero():
    for counts in (4, [3, 4, 5]):
        found = type_two_maximum_likelihood([1.0, 1.1, 0.9], counts, 0.5)
        assert found.variance == 0.0
        assert found.at_zero
    same = type_two_maximum_likelihood([1.0, 1.0, 1.0], [3, 4, 5], 0.5)
    assert (same.mean, same.variance) == (pytest.approx(1.0), 0.0)


def test_type_two_takes_the_better_of_two_maxima():
    """One precise outlier pair and many noisy means: the profile has more than one hill."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        counts = rng.choice([1, 2, 500], 5)
        means = rng.normal(size=5) * 0.8
        found = type_two_maximum_likelihood(means, counts, 1.0)
        grid = np.concatenate([[0.0], np.geomspace(1e-6, 50, 2000)])
        v = grid[:, None] + 1.0 / counts
        mean = (means / v).sum(1) / (1 / v).sum(1)
        values = -0.5 * (np.log(2 * np.pi * v) + (means - mean[:, None]) ** 2 / v).sum(1)
        assert found.log_likelihood >= values.max() - 1e-9


def test_type_two_recovers_the_truth():
    """T = 2000, n = 5: SE(μ̂) = 0.0212, SE(τ̂²) = 0.0285. |z| < 4 fails in 6e-5 of seeds."""
    rng = np.random.default_rng(0)
    means = rng.normal(1.5, np.sqrt(0.8), 2000) + rng.normal(0, np.sqrt(0.1), 2000)
    found = type_two_maximum_likelihood(means, 5, 0.5)
    assert abs(found.mean - 1.5) < 4 * 0.0212
    assert abs(found.variance - 0.8) < 4 * 0.0285


@pytest.mark.parametrize(
    ("means", "counts", "noise_variance", "complaint"),
    [
        ([1.0], 5, 0.5, "two tasks"),
        ([1.0, math.nan], 5, 0.5, "finite means"),
        ([1.0, 2.0], [5, 0], 0.5, "counts"),
        ([1.0, 2.0], [5, 5, 5], 0.5, "counts"),
        ([1.0, 2.0], [5, 2.5], 0.5, "counts"),
        ([1.0, 2.0], 5, 0.0, "noise_variance"),
    ],
)
def test_type_two_refuses(means, counts, noise_variance, complaint):
    with pytest.raises(DataError, match=complaint):
        type_two_maximum_likelihood(means, counts, noise_variance)


# What MAML weights tasks by


def test_maml_weighs_tasks_the_other_way_round():
    counts, noise_variance = np.array([2, 5, 10, 1, 4]), 0.5
    curvature = counts / noise_variance
    shrinkage = (1 - 0.01 * curvature) ** 5
    implied = np.array([implied_prior_variance(c, 0.01, 5) for c in curvature])
    np.testing.assert_allclose(1 / (1 + curvature * implied), shrinkage, rtol=1e-12)
    maml = shrinkage**2 / (shrinkage**2).sum()
    np.testing.assert_allclose(maml, [0.280, 0.147, 0.045, 0.344, 0.183], atol=6e-4)
    type_two = 1 / (0.5509 + noise_variance / counts)
    np.testing.assert_allclose(
        type_two / type_two.sum(), [0.181, 0.223, 0.242, 0.138, 0.215], atol=6e-4
    )
