"""Nested Laplace against quadrature over θ, and its weights against one another.

Monte Carlo: moments of n effective draws have standard errors of sd/√n (means) and about sd/√n
(sds of posteriors with heavy tails). With n ≥ 1,000, limits of 0.15 sd and 15 % are 4.7 of them: a
false alarm in 3e-6 per number, and the seeds are fixed.
"""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta
from hbmeta.errors import UnsupportedModelError
from hbmeta.inference import NUTS, NestedLaplace
from hbmeta.tasks import Tasks
from tests import fits, reference
from tests.cases import SCHOOLS_SIGMA, SCHOOLS_Y, case

SIGMA, MEAN_SCALE, SPREAD_SCALE = 0.6, 1.5, 1.0
CLOSE = 0.15


def lines(x, y=None):
    """Linear and Gaussian given (μ, τ): φ integrates out in closed form."""
    mu = pyro.sample("mu", dist.Normal(0.0, MEAN_SCALE))
    tau = pyro.sample("tau", dist.HalfNormal(SPREAD_SCALE))
    with pyro.plate("task", x.shape[0], dim=-2):
        slope = pyro.sample("slope", dist.Normal(mu, tau))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(slope * x[..., 0], SIGMA), obs=y)


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(1)
    x = rng.uniform(-1, 1, (6, 4, 1))
    slopes = 0.8 + 0.7 * rng.standard_normal(6)
    y = slopes[:, None] * x[..., 0] + SIGMA * rng.standard_normal((6, 4))
    return Tasks(torch.from_numpy(x), torch.from_numpy(y))


@pytest.fixture(scope="module")
def fitted(tasks):
    return NestedLaplace(draws=2000).fit(lines, tasks, compile=False, seed=0)


@pytest.fixture(scope="module")
def schools():
    found = case("eight_schools_centered")
    return NestedLaplace(draws=2000).fit(found.program, found.tasks, compile=False, seed=0)


def by_quadrature(tasks):
    """log p(y), and mean and sd of μ, of log τ and of every slope, on a grid of (μ, log τ)."""
    x, y = tasks.x[..., 0].numpy(), tasks.y.numpy()
    mu = np.linspace(-4.0, 5.0, 361)
    log_tau = np.linspace(-9.0, 2.5, 461)
    m, t = np.meshgrid(mu, np.exp(log_tau), indexing="ij")
    total = -0.5 * (m / MEAN_SCALE) ** 2 - 0.5 * math.log(2 * math.pi * MEAN_SCALE**2)
    total += 0.5 * math.log(2 / (math.pi * SPREAD_SCALE**2)) - 0.5 * (t / SPREAD_SCALE) ** 2
    total += np.log(t)  # of log τ
    given = []
    for xi, yi in zip(x, y, strict=True):
        precision = xi @ xi / SIGMA**2
        # y_i ~ N(x μ, σ² I + τ² x xᵀ), by the matrix determinant lemma and Woodbury's identity.
        error = yi[:, None, None] - xi[:, None, None] * m
        along = np.einsum("j,jab->ab", xi, error) / SIGMA**2
        square = (error**2).sum(0) / SIGMA**2 - along**2 * t**2 / (1 + t**2 * precision)
        log_det = len(yi) * math.log(2 * math.pi * SIGMA**2) + np.log1p(t**2 * precision)
        total += -0.5 * (square + log_det)
        variance = 1 / (precision + t**-2)
        given.append((variance * (xi @ yi / SIGMA**2 + m / t**2), variance))
    cell = (mu[1] - mu[0]) * (log_tau[1] - log_tau[0])
    weights = np.exp(total - total.max())
    log_evidence = math.log(weights.sum() * cell) + total.max()
    weights /= weights.sum()

    def moments(mean, variance=0.0):
        first = (weights * mean).sum()
        return first, math.sqrt((weights * (mean**2 + variance)).sum() - first**2)

    return log_evidence, moments(m), moments(np.log(t)), [moments(*pair) for pair in given]


def agree(draws, exact):
    mean, sd = exact
    assert abs(float(draws.mean()) - mean) < CLOSE * sd
    assert abs(float(draws.std()) / sd - 1) < CLOSE


def test_linear_gaussian_hierarchy_is_that_of_quadrature(fitted, tasks):
    log_evidence, mu, log_tau, slopes = by_quadrature(tasks)
    # The standard error of log p(y) is √(1/n − 1/N) of the weights, about 0.02.
    assert fitted.info["log_evidence"] == pytest.approx(log_evidence, abs=0.1)
    assert fitted.info["pareto_k"] < 0.5
    assert fitted.info["effective_draws"] > 1000
    found = fitted.globals()
    agree(found["mu"], mu)
    agree(found["tau"].log(), log_tau)
    means, sds = fitted.posterior.moments()["slope"]
    for mean, sd, exact in zip(means, sds, slopes, strict=True):
        assert abs(float(mean) - exact[0]) < CLOSE * exact[1]
        assert abs(float(sd) / exact[1] - 1) < CLOSE


def test_eight_schools_are_those_of_quadrature(schools):
    exact = reference.normal_means_posterior(SCHOOLS_Y, SCHOOLS_SIGMA, 5.0, 5.0)
    assert schools.info["pareto_k"] < schools.info["threshold"]
    mean, sd = schools.posterior.moments()["effect"]
    error = (mean.numpy() - exact["effect"][0]) / exact["effect"][1]
    assert np.abs(error).max() < CLOSE
    assert np.abs(sd.numpy() / exact["effect"][1] - 1).max() < CLOSE
    agree(schools.globals()["mu"], exact["mu"])
    agree(schools.globals()["tau"], exact["tau"])


def test_the_seed_decides_and_the_state_of_others_is_left_alone(tasks, untouched):
    strategy = NestedLaplace(draws=100, proposals=2, rounds=1)
    with untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few draws need not have a good tail
        one, same, other = (
            strategy.fit(lines, tasks, compile=False, seed=seed).density.phi for seed in (3, 3, 4)
        )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_draws_are_joint(fitted):
    """φ_s goes with θ_s: given μ_s and τ_s standardised slopes of tasks do not depend on μ_s.

    Were they shuffled, slopes would not be correlated with μ at all; exactly, the correlation of
    the mean slope with μ is above 0.5 here, and 2,000 draws give it to 0.02.
    """
    mu = fitted.globals()["mu"]
    slopes = fitted.density.phi[:, :, 0].mean(1)
    assert float(torch.corrcoef(torch.stack([mu, slopes]))[0, 1]) > 0.4


def test_new_tasks_and_files(fitted, tasks, tmp_path):
    """Draws survive a file; a new task's posterior is that of a fit with it, weights counted."""
    fitted.save(tmp_path / "fit.safetensors")
    loaded = hbmeta.load(tmp_path / "fit.safetensors", model=lines)
    assert torch.equal(loaded.density.phi, fitted.density.phi)
    assert loaded.info["pareto_k"] == fitted.info["pareto_k"]
    first = NestedLaplace(draws=2000).fit(lines, tasks[:5], compile=False, seed=1)
    adapted = first.adapt(tasks[5:])
    mean, sd = adapted.moments()["slope"]
    exact_mean, exact_sd = by_quadrature(tasks)[3][5]
    assert abs(float(mean) - exact_mean) < CLOSE * exact_sd
    assert abs(float(sd) / exact_sd - 1) < CLOSE


def two_signs(x, y=None):
    """|θ| is observed: two modes, of which the search finds one."""
    scale = pyro.sample("scale", dist.Normal(0.3, 2.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(scale * z * x[..., 0], 0.1), obs=y)


def test_a_posterior_that_no_student_t_covers_is_warned_of():
    """The ridge scale · z_i ≈ y_i has two branches, and weights that k̂ sees."""
    x = torch.ones(3, 3, 1, dtype=torch.float64)
    y = torch.tensor([[2.0], [-3.0], [1.0]], dtype=torch.float64).expand(3, 3).clone()
    with pytest.warns(UserWarning, match="Pareto k̂ is .* NUTS"):
        NestedLaplace(draws=100, proposals=1, rounds=0).fit(
            two_signs, Tasks(x, y + 0.05 * x[..., 0]), compile=False
        )


def test_refusals_name_what_to_use_instead(tasks):
    with pytest.raises(UnsupportedModelError, match=r"found 0\. Use Laplace, and importance"):
        NestedLaplace().fit(case("linear_own_nested").program, case("linear_own_nested").tasks)
    with pytest.raises(UnsupportedModelError, match="prior for every level-1 parameter"):
        NestedLaplace().fit(fits.Heads(), fits.task_set())

    def many(x, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(65), 1.0).to_event(1))
        lines(x, y)

    with pytest.raises(UnsupportedModelError, match=r"found 67\. Use NUTS"):
        NestedLaplace().fit(many, tasks)


@pytest.mark.slow
def test_nuts_agrees(fitted, tasks):
    """On τ, whose posterior is skewed; 4,000 effective draws on either side, 5 standard errors."""
    chains = NUTS(draws=2000, target_accept=0.95).fit(lines, tasks, compile="graph", seed=0)
    one, other = (f.globals()["tau"].log() for f in (fitted, chains))
    assert abs(float(one.mean() - other.mean())) < 0.15 * float(other.std())
