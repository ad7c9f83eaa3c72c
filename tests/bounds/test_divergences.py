"""KL divergences against dense formulas, other people's code, and quadrature."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from hbmeta import bounds
from hbmeta.errors import DataError

D, RANK, BATCH = 6, 2, 3


@pytest.fixture
def normals():
    """Means, variances and factors of two batches of normals."""
    rng = np.random.default_rng(0)
    return {
        "mean": rng.normal(size=(BATCH, D)),
        "variance": rng.uniform(0.1, 2.0, size=(BATCH, D)),
        "factor": rng.normal(size=(BATCH, D, RANK)),
        "prior_mean": rng.normal(size=D),
        "prior_variance": rng.uniform(0.5, 3.0, size=D),
        "prior_factor": rng.normal(size=(D, RANK + 1)),
    }


def dense(variance, factor):
    return np.eye(variance.shape[-1]) * variance[..., None] + factor @ np.swapaxes(factor, -1, -2)


def reference(mean, covariance, prior_mean, prior_covariance):
    """torch.distributions' KL, in float64."""
    as_tensor = torch.as_tensor
    return kl_divergence(
        MultivariateNormal(as_tensor(mean), as_tensor(covariance)),
        MultivariateNormal(as_tensor(prior_mean), as_tensor(prior_covariance)),
    ).numpy()


def test_full_and_low_rank_against_torch(normals):
    own = dense(normals["variance"], normals["factor"])
    prior = dense(normals["prior_variance"], normals["prior_factor"])
    wanted = reference(normals["mean"], own, normals["prior_mean"], prior)
    full = bounds.gaussian_kl(normals["mean"], own, normals["prior_mean"], prior)
    np.testing.assert_allclose(full, wanted, rtol=1e-11)
    np.testing.assert_allclose(bounds.low_rank_gaussian_kl(**normals), wanted, rtol=1e-11)
    diagonal = {**normals, "prior_factor": None}
    prior = np.diag(normals["prior_variance"])
    wanted = reference(normals["mean"], own, normals["prior_mean"], prior)
    np.testing.assert_allclose(bounds.low_rank_gaussian_kl(**diagonal), wanted, rtol=1e-11)


def test_low_rank_needs_no_square_matrix():
    """2,000 coordinates: the same answer as from the dense matrices, up to 1e-15 d."""
    rng = np.random.default_rng(1)
    d = 2000
    variance, factor = rng.uniform(0.5, 1.5, d), rng.normal(size=(d, 3)) / np.sqrt(d)
    found = bounds.low_rank_gaussian_kl(np.zeros(d), variance, factor, 0.01, 1.0, 2.0 * factor)
    own = variance.sum() + np.square(factor).sum()
    inner = np.eye(3) + 4.0 * factor.T @ factor
    lost = 4.0 * np.trace(
        np.linalg.solve(
            inner,
            factor.T @ (variance[:, None] * factor) + (factor.T @ factor) @ (factor.T @ factor),
        )
    )
    shift = np.full(d, -0.01)
    pull = 2.0 * factor.T @ shift
    distance = shift @ shift - pull @ np.linalg.solve(inner, pull)
    own_inner = np.eye(3) + factor.T @ (factor / variance[:, None])
    volume = np.linalg.slogdet(inner)[1] - np.linalg.slogdet(own_inner)[1] - np.log(variance).sum()
    assert float(found) == pytest.approx(0.5 * (own - lost - d + distance + volume), abs=1e-10)


def test_diagonal_against_torch(normals):
    found = bounds.diagonal_gaussian_kl(
        normals["mean"], np.sqrt(normals["variance"]), normals["prior_mean"], 1.3
    )
    wanted = kl_divergence(
        Normal(torch.as_tensor(normals["mean"]), torch.as_tensor(normals["variance"]).sqrt()),
        Normal(torch.as_tensor(normals["prior_mean"]), 1.3),
    ).sum(-1)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-13)


def test_kl_is_0_at_itself_and_never_below(normals):
    own = dense(normals["variance"], normals["factor"])
    mean, sd = normals["mean"], np.sqrt(normals["variance"])
    assert (np.abs(bounds.gaussian_kl(mean, own, mean, own)) < 1e-13).all()
    assert (bounds.diagonal_gaussian_kl(mean, sd, mean, sd) == 0.0).all()
    near = bounds.diagonal_gaussian_kl(mean, sd * (1.0 + 1e-9), mean, sd)
    np.testing.assert_allclose(near, D * 1e-18, rtol=1e-5)


def test_every_coordinate_counts():
    """One sd for all: the KL of D coordinates is D times the KL of one, as in no published code."""
    one = bounds.gaussian_hyper_kl([0.0], 0.0, 0.1, 1.0)
    many = bounds.gaussian_hyper_kl(np.zeros(50), 0.0, 0.1, 1.0)
    assert float(many) == pytest.approx(50 * float(one), rel=1e-13)
    one = bounds.expected_kl_fixed_variance([0.1], 0.5, [0.0], 0.2, 1.0)
    many = bounds.expected_kl_fixed_variance(np.full(50, 0.1), 0.5, np.zeros(50), 0.2, 1.0)
    assert float(many) == pytest.approx(50 * float(one), rel=1e-13)
    one = bounds.expected_kl_learned_variance([0.1], 0.5, [0.0], 0.3, 0.2)
    many = bounds.expected_kl_learned_variance(np.full(50, 0.1), 0.5, np.zeros(50), 0.3, 0.2)
    assert float(many) == pytest.approx(50 * float(one), rel=1e-13)


def test_coordinates_that_only_one_argument_has_count_in_every_term():
    """Means of 0 written once, and three scales of the prior's spread: three coordinates."""
    kappa = np.array([0.1, 0.2, 0.3])
    for short in (0.0, [0.0]):
        found = bounds.expected_kl_fixed_variance([0.0], 0.5, short, kappa, 1.0)
        wanted = bounds.expected_kl_fixed_variance(np.zeros(3), 0.5, np.zeros(3), kappa, 1.0)
        assert float(found) == float(wanted)
        found = bounds.expected_kl_learned_variance([0.0], 0.5, short, 0.3, kappa)
        wanted = bounds.expected_kl_learned_variance(np.zeros(3), 0.5, np.zeros(3), 0.3, kappa)
        assert float(found) == float(wanted)


def test_point_masses_cost_infinitely_much():
    assert float(bounds.gaussian_hyper_kl([1.0, 2.0], 0.0, 0.0, 1.0)) == np.inf
    assert float(bounds.expected_kl_fixed_variance([1.0], 0.0, [0.0], 0.1, 1.0)) == np.inf
    assert float(bounds.expected_kl_learned_variance([1.0], 0.0, [0.0], 0.0, 0.1)) == np.inf


def nodes(d):
    """Gauss–Hermite nodes and weights for E f(z), z ~ N(0, I_d); 40 in each dimension."""
    z, w = np.polynomial.hermite_e.hermegauss(40)
    w = w / w.sum()
    points = np.stack(np.meshgrid(*[z] * d, indexing="ij"), -1).reshape(-1, d)
    weights = np.stack(np.meshgrid(*[w] * d, indexing="ij"), -1).reshape(-1, d).prod(-1)
    return points, weights


def test_expected_kl_against_quadrature():
    """E over the prior's parameters of the KL at each of them; 1e-10."""
    mean, sd, centre = np.array([0.4, -0.2]), np.array([0.3, 0.7]), np.array([0.1, 0.5])
    kappa, s, rho = 0.3, np.array([0.6, 0.9]), np.array([-0.8, 0.4])
    z, w = nodes(2)
    at_nodes = bounds.diagonal_gaussian_kl(mean, sd, centre + kappa * z, s)
    found = bounds.expected_kl_fixed_variance(mean, sd, centre, kappa, s)
    assert float(found) == pytest.approx(w @ at_nodes, abs=1e-10)

    # Coordinates are independent: one at a time, over its mean and its log variance.
    wanted = 0.0
    for j in range(2):
        scales = np.exp(0.5 * (rho[j] + kappa * z[:, 1:]))
        at = centre[j] + kappa * z[:, :1]
        wanted += w @ bounds.diagonal_gaussian_kl(mean[j : j + 1], sd[j], at, scales)
    found = bounds.expected_kl_learned_variance(mean, sd, centre, rho, kappa)
    assert float(found) == pytest.approx(wanted, abs=1e-10)

    A, b = np.array([[0.6, 0.2], [-0.1, 0.8]]), np.array([0.3, -0.2])
    V = np.array([[0.2, 0.05], [0.05, 0.1]])
    theta = centre + kappa * z
    at_nodes = bounds.gaussian_kl(theta @ A.T + b, V, theta, np.diag(np.square(s)))
    found = bounds.expected_kl_affine(A, b, V, centre, kappa, s)
    assert float(found) == pytest.approx(w @ at_nodes, abs=1e-10)


def test_without_spread_of_the_prior_it_is_the_kl():
    mean, sd, centre = [0.4, -0.2], [0.3, 0.7], [0.1, 0.5]
    at_centre = bounds.diagonal_gaussian_kl(mean, sd, centre, 0.6)
    assert bounds.expected_kl_fixed_variance(mean, sd, centre, 0.0, 0.6) == at_centre
    found = bounds.expected_kl_learned_variance(mean, sd, centre, np.log(0.36), 0.0)
    assert float(found) == pytest.approx(float(at_centre), rel=1e-13)


def test_mixture_of_priors_costs_at_most_the_expected_kl():
    """KL is convex in the prior; the mixture is N(θ̂, s² + κ²)."""
    mean, sd, centre, kappa, s = [0.4, -0.2], [0.3, 0.7], [0.1, 0.5], 0.3, 0.6
    mixture = bounds.diagonal_gaussian_kl(mean, sd, centre, np.hypot(s, kappa))
    assert mixture < bounds.expected_kl_fixed_variance(mean, sd, centre, kappa, s)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: bounds.gaussian_kl([0.0], [[0.0]], [0.0], [[1.0]]), "not positive definite"),
        (lambda: bounds.gaussian_kl([0, 0], [[1, 1], [0, 1]], [0, 0], np.eye(2)), "not symmetric"),
        (lambda: bounds.gaussian_kl([0, 0], np.eye(3), [0, 0], np.eye(2)), r"shape \(3, 3\)"),
        (lambda: bounds.gaussian_kl(0.0, np.eye(1), 0.0, np.eye(1)), "coordinates last"),
        (lambda: bounds.diagonal_gaussian_kl([0.0], 1.0, 0.0, 0.0), "prior_sd"),
        (lambda: bounds.diagonal_gaussian_kl([0.0], -1.0, 0.0, 1.0), "sd finite"),
        (lambda: bounds.diagonal_gaussian_kl([np.inf], 1.0, 0.0, 1.0), "infinity"),
        (lambda: bounds.diagonal_gaussian_kl([0.0, 1.0], [1.0] * 3, 0.0, 1.0), "broadcast"),
        (lambda: bounds.low_rank_gaussian_kl([0, 0], [1] * 3, np.eye(2), 0, 1), "2 coordinates"),
        (lambda: bounds.low_rank_gaussian_kl([0, 0], 1, np.eye(3), 0, 1), "rank"),
        (lambda: bounds.categorical_kl([0.5, 0.6], [0.5, 0.5]), "sum to 1"),
        (lambda: bounds.categorical_kl([1.5, -0.5], [0.5, 0.5]), "0 or more"),
        (lambda: bounds.categorical_kl([0.5, 0.5], [1.0]), "2 and 1 elements"),
        (lambda: bounds.expected_kl_fixed_variance([0, 0], 1, 0, [1] * 3, [1] * 2), "broadcast"),
        (lambda: bounds.expected_kl_affine(np.eye(3), [0, 0], np.eye(2), [0, 0], 0, 1), "matrix"),
        (lambda: bounds.expected_kl_learned_variance([], 1, [], 0, 0), "at least one"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(DataError, match=match):
        call()
