"""Pathfinder against Gaussians, dense formulas and BFGS one update after the other."""

import math

import numpy as np
import pytest
import torch

from hbmeta import pathfinder
from hbmeta.errors import ConvergenceError
from hbmeta.pathfinder import LowRankNormal, find_path, find_paths


def normal(size, *, seed=0, spread=1.0):
    """f of a Gaussian without its constant, its mean and its covariance.

    Its standard deviations run over two powers of ten times `spread`.
    """
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-spread, spread, size, dtype=torch.float64)
    covariance = factor @ factor.T / size + 0.5 * torch.eye(size, dtype=torch.float64)
    covariance = scale.unsqueeze(-1) * covariance * scale
    mean = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    precision = torch.linalg.inv(covariance)

    def f(x):
        gradient = precision @ (mean - x)
        return 0.5 * (x - mean) @ gradient, gradient

    return f, mean, covariance


def whitened(found, covariance):
    """Eigenvalues of the found covariance in units of the true one."""
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, found, upper=False)
    return torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))


def starts(count, size, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("size", "close"), [(1, 1e-6), (2, 0.05), (5, 0.05)])
def test_a_gaussian_is_found(size, close):
    """The mean to 1e-3 sd, the covariance to 5 % in every direction; one dimension to rounding.

    BFGS tends to the covariance as it converges, and the ELBOs of its last iterates differ by less
    than the noise of ten draws, so that the best is one of those.
    """
    f, mean, covariance = normal(size, spread=0.5)
    found = find_path(f, starts(1, size)[0], history=10 * size)
    sd = covariance.diagonal().sqrt()
    assert float(((found.best.mean - mean) / sd).abs().max()) < 1e-3
    values = whitened(found.best.covariance, covariance)
    assert float((values - 1).abs().max()) < close
    # ELBO: the evidence, √det 2πΣ, up to what the covariance is wrong by.
    evidence = 0.5 * float(torch.logdet(2 * math.pi * covariance))
    assert float(found.elbos.max()) == pytest.approx(evidence, abs=size * close)


def test_the_compact_form_is_bfgs_one_pair_after_the_other():
    """Σ ← (I − s zᵀ/zᵀs) Σ (I − z sᵀ/zᵀs) + s sᵀ/zᵀs from diag(α); dense, in NumPy."""
    rng = np.random.default_rng(0)
    for size, pairs in ((6, 2), (4, 4), (3, 5)):
        half = rng.standard_normal((size, size))
        hessian = half @ half.T + np.eye(size)
        steps = rng.standard_normal((pairs, size))
        changes = steps @ hessian
        alpha, point = rng.uniform(0.5, 2.0, size), rng.standard_normal(size)
        gradient = rng.standard_normal(size)
        dense = np.diag(alpha)
        for s, z in zip(steps, changes, strict=True):
            left = np.eye(size) - np.outer(s, z) / (z @ s)
            dense = left @ dense @ left.T + np.outer(s, s) / (z @ s)
        tensors = [torch.from_numpy(v) for v in (point, gradient, alpha)]
        found = pathfinder._gaussian(
            *tensors, list(torch.from_numpy(steps)), list(torch.from_numpy(changes))
        )
        np.testing.assert_allclose(found.covariance, dense, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.mean, point - dense @ gradient, rtol=1e-9, atol=1e-9)
        # Draws and their density, against the dense covariance.
        noise = torch.from_numpy(rng.standard_normal((7, size)))
        dense_normal = torch.distributions.MultivariateNormal(found.mean, torch.from_numpy(dense))
        points = found.draw(noise)
        torch.testing.assert_close(found.log_prob(points), dense_normal.log_prob(points))
        size_of = found.draw(torch.eye(size, dtype=torch.float64)) - found.mean
        np.testing.assert_allclose(size_of.T @ size_of, dense, rtol=1e-9, atol=1e-9)


def test_the_diagonal_is_that_of_bfgs():
    """1/α' is the diagonal of BFGS's Hessian update of diag(1/α)."""
    rng = np.random.default_rng(1)
    alpha, s = rng.uniform(0.5, 2.0, 5), rng.standard_normal(5)
    z = 3.0 * s + 0.3 * rng.standard_normal(5)
    # Gilbert and Lemaréchal scale diag(1/α) by zᵀAz / zᵀs before they update it.
    before = np.diag(1 / alpha) * (z @ (alpha * z)) / (z @ s)
    after = before + np.outer(z, z) / (z @ s)
    after -= np.outer(before @ s, before @ s) / (s @ before @ s)
    found = pathfinder._diagonal(*(torch.from_numpy(v) for v in (alpha, s, z)))
    np.testing.assert_allclose(1 / found, after.diagonal(), rtol=1e-12)


def cauchy_like(x):
    """A density with heavy tails and a bend."""
    r = torch.stack([x[0], x[1] - 0.3 * x[0] ** 2])
    gradient = -3 * r / (1 + r.square())
    first = gradient[0] - 0.6 * x[0] * gradient[1]
    return -1.5 * (1 + r.square()).log().sum(), torch.stack([first, gradient[1]])


def test_the_best_has_the_largest_elbo_and_the_seed_tells():
    found, same, other = (find_path(cauchy_like, starts(1, 2)[0] + 4, seed=s) for s in (0, 0, 1))
    assert found.position == int(found.elbos.argmax()) > 0
    assert found.elbos[0] == -math.inf
    # Written out: the mean of f − log q over the same five pairs.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((5, 2), generator=generator, dtype=torch.float64)
    points = found.best.draw(torch.cat([noise, -noise]))
    dense = torch.distributions.MultivariateNormal(found.best.mean, found.best.covariance)
    values = torch.stack([cauchy_like(p)[0] for p in points]) - dense.log_prob(points)
    assert float(values.mean()) == pytest.approx(float(found.elbos.max()), rel=1e-9)
    torch.testing.assert_close(same.elbos, found.elbos, rtol=0, atol=0)
    assert not torch.equal(other.elbos, found.elbos)


def test_weights_of_a_mixture_give_the_moments_and_the_evidence():
    """Of a bimodal density, each path finds one mode; the mixture's weights give them their mass.

    A mode of mass 3/4 at 4 and one of 1/4 at −4, sd 1: mean 2. With 4,000 draws whose weights are
    nearly equal the standard error of the mean is 0.06 and of the log evidence 0.01: five of them,
    false-alarm rate below 1e-6 each.
    """

    def f(x):
        parts = (
            torch.tensor([0.75, 0.25]).double().log()
            - 0.5 * (x - torch.tensor([4.0, -4.0]).double()) ** 2
        )
        share = parts.softmax(0)
        return parts.logsumexp(0), (share * (torch.tensor([4.0, -4.0]).double() - x)).sum(0)[None]

    found = find_paths(f, torch.tensor([[3.0], [-3.0]]).double(), draws=2000, seed=1)
    assert {round(float(p.best.mean)) for p in found.paths} == {4, -4}
    weights = found.log_weights.exp()
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights @ found.draws[:, 0]) == pytest.approx(2.0, abs=0.3)
    assert found.log_evidence == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.05)
    assert found.pareto_k < 0.5
    # With replacement half the draws of each path become three quarters and a quarter.
    share = (found.resampled(4000, 0, replacement=True)[:, 0] > 0).double().mean()
    assert float(share) == pytest.approx(0.75, abs=0.05)
    few = found.resampled(5, 0, replacement=False)
    assert len(few.unique(dim=0)) == 5


def test_a_density_without_a_bound_is_judged_before_it_grows():
    """Neal's centered funnel has no mode: f → ∞ as v → −∞ with x = 0, and the search goes there.

    v ~ N(0, 3²), x_1..9 ~ N(0, e^v). The best q stands before the end of each path, where f is
    lower and the ELBO higher; all its draws are finite.
    """

    def f(u):
        v, x = u[0], u[1:]
        square = x.square().sum() * (-v).exp()
        value = -(v**2) / 18 - 0.5 * square - 4.5 * v
        gradient = torch.cat([(-v / 9 + 0.5 * square - 4.5)[None], -x * (-v).exp()])
        return value, gradient

    found = find_paths(f, starts(4, 10), draws=250)
    for path in found.paths:
        assert path.position < len(path.elbos) - 1
        assert float(path.elbos[-1]) < float(path.elbos.max()) - 1
    assert bool(found.draws.isfinite().all())


def test_bad_starts_are_left_out_or_said():
    """N(3, 1), not a number below −10."""

    def f(x):
        inside = torch.where(x > -10, x, math.nan)
        return -0.5 * (inside - 3).square().sum(), 3 - inside

    good, bad = torch.ones(1).double(), torch.full((1,), -20.0).double()
    assert len(find_paths(f, torch.stack([good, bad]), draws=100).paths) == 1
    assert len(find_paths(f, torch.stack([bad, good]), draws=100).paths) == 1
    assert float(find_path(f, good).best.mean) == pytest.approx(3.0, abs=1e-6)
    with pytest.raises(ConvergenceError, match="finite log density at the start"):
        find_paths(f, torch.stack([bad, bad]), draws=100)


def test_an_empty_history_is_a_diagonal():
    zero = torch.zeros(3).double()
    q = LowRankNormal(zero, zero + 4.0, torch.zeros(3, 0).double(), torch.zeros(0, 0).double())
    torch.testing.assert_close(q.covariance, 4 * torch.eye(3).double())
    points = torch.ones(2, 3).double()
    expected = torch.distributions.Normal(zero, 2.0).log_prob(points).sum(-1)
    torch.testing.assert_close(q.log_prob(points), expected)
