"""θ by the importance-weighted bound against the marginal likelihood in closed form.

    y_i = X_i β_i + ε_i,  β_i ~ N(μ, diag τ²),  ε ~ N(0, σ²),
    y_i ~ N(X_i μ, X_i diag(τ²) X_iᵀ + σ² I)

with σ given and μ, τ parameters of a module without a prior: θ̂ is Type-II maximum likelihood.
x does not have mean zero, so that β_i has correlated entries given y_i.
"""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from scipy import optimize

from hbmeta.errors import ConvergenceError, UnsupportedModelError
from hbmeta.inference import Variational
from hbmeta.standard_errors import standard_errors
from hbmeta.tasks import Tasks

NOISE, GROUPS, POINTS = 0.5, 16, 5
STEPS = 800


class Lines(PyroModule):
    """A line per task; log τ is what is stored."""

    def __init__(self):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.log_tau = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            beta = pyro.sample("beta", dist.Normal(self.mu, self.log_tau.exp()).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                mean = beta[..., 0] + beta[..., 1] * x[..., 0]
                return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


@functools.cache
def lines() -> Tasks:
    rng = np.random.default_rng(3)
    x = rng.uniform(0.5, 2.5, (GROUPS, POINTS))
    beta = np.array([1.0, -0.5]) + np.array([0.8, 0.6]) * rng.standard_normal((GROUPS, 2))
    y = beta[:, :1] + beta[:, 1:] * x + NOISE * rng.standard_normal(x.shape)
    return Tasks(x[..., None], y)


def log_marginal(vector):
    """Σ_i log p(y_i | μ, log τ), dense."""
    total = 0.0
    for x, y in zip(lines().x[..., 0].numpy(), lines().y.numpy(), strict=True):
        design = np.stack([np.ones_like(x), x], 1)
        covariance = design * np.exp(2 * vector[2:]) @ design.T + NOISE**2 * np.eye(len(x))
        residual = y - design @ vector[:2]
        total -= 0.5 * residual @ np.linalg.solve(covariance, residual)
        total -= 0.5 * np.linalg.slogdet(2 * math.pi * covariance)[1]
    return total


@functools.cache
def type_two():
    """θ̂ by BFGS to 1e-7, and standard errors from second differences, good to about 1e-5."""
    found = optimize.minimize(lambda v: -log_marginal(v), np.zeros(4), options={"gtol": 1e-7}).x
    h, unit = 1e-3, np.eye(4)
    hessian = np.empty((4, 4))
    for i in range(4):
        for j in range(4):
            a, b = h * unit[i], h * unit[j]
            corners = log_marginal(found + a + b) - log_marginal(found + a - b)
            corners += log_marginal(found - a - b) - log_marginal(found - a + b)
            hessian[i, j] = corners / (4 * h * h)
    return found, np.sqrt(np.linalg.inv(-hessian).diagonal())


@functools.cache
def fitted(family, draws):
    return Variational(objective="iwae", family=family, draws=draws).fit(
        Lines(), lines(), steps=STEPS, learning_rate=0.02, compile="graph", seed=0
    )


def in_errors(found):
    """How far θ is from Type-II maximum likelihood, in its standard errors."""
    wanted, error = type_two()
    vector = torch.cat([found.theta["mu"], found.theta["log_tau"]]).numpy()
    return np.abs((vector - wanted) / error)


def test_a_full_guide_reaches_type_two_maximum_likelihood():
    """To a quarter of a standard error, which is Adam's noise in θ (0.1 to 0.2 here).

    The bound is tight for any K: at this θ it is the marginal likelihood for one draw and eight.
    """
    found = fitted("full", 8)
    assert in_errors(found).max() < 0.25
    vector = torch.cat([found.theta["mu"], found.theta["log_tau"]]).numpy()
    for draws in (1, 8):
        bound = found.adapt(lines(), draws=draws, steps=0).info["bound"]
        assert float(bound.sum()) == pytest.approx(log_marginal(vector), abs=1e-6)


def test_the_bias_of_a_diagonal_guide_shrinks_with_its_draws():
    """K = 1 is mean field's ELBO, a standard error off; K = 50 leaves less than half of that."""
    one, fifty = (in_errors(fitted("diagonal", draws)).max() for draws in (1, 50))
    assert one > 0.5
    assert fifty < 0.5 * one


def test_standard_errors_are_those_of_the_closed_form():
    """Laplace's evidence is exact here: as good as θ̂ and the differences, 2 %."""
    found = standard_errors(fitted("full", 8))
    errors = torch.cat([found.errors["mu"], found.errors["log_tau"]]).numpy()
    np.testing.assert_allclose(errors, type_two()[1], rtol=0.02)


def test_standard_errors_need_a_point_near_the_maximum():
    moved = Variational(objective="iwae", family="full", draws=1).fit(
        Lines(), lines(), steps=2, compile=False
    )
    for poor in (moved, fitted("diagonal", 1)):
        with pytest.raises(ConvergenceError, match="more steps, draws or a richer family"):
            standard_errors(poor)
    amortized = Variational(amortized=True, encoder={"hidden": 4}).fit(
        Lines(), lines(), steps=2, compile=False
    )
    with pytest.raises(UnsupportedModelError, match="with amortized=True"):
        standard_errors(amortized)
