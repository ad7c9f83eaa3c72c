"""Pareto-smoothed importance sampling: exact posteriors, the analytic k̂, and what it refuses."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.importance import importance, largest_k
from hbmeta.inference import ExactLinear
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import cases


def exact(name="linear_own_flat"):
    """The exact posterior of a linear-Gaussian case."""
    case = cases.case(name)
    return case, ExactLinear().fit(case.program, case.tasks, compile=False).posterior


def with_density(posterior, density):
    return TaskPosterior(posterior.problem, posterior.theta, density, posterior.support)


def standard_normal(x, y=None, *, task, n_tasks):
    """p(φ) = N(0, I) of size 2; without rows that count that is the posterior."""
    with pyro.plate("task", n_tasks):
        pyro.sample("phi", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def normal_against(scales):
    """q = N(0, s² I) for p = N(0, I), one task per s, without data."""
    n = len(scales)
    data = Tasks.from_flat(np.ones((n, 1)), np.zeros(n), np.arange(n), n)
    problem = Problem(standard_normal, data)
    scale = torch.tensor(scales, dtype=torch.float64)[:, None].expand(n, 2)
    empty = data.keep(torch.zeros(n, dtype=torch.bool))
    return TaskPosterior(problem, {}, Gaussian(torch.zeros_like(scale), scale), empty)


def test_of_the_exact_posterior_every_weight_is_the_evidence():
    case, posterior = exact()
    found = importance(posterior, draws=200)
    assert bool((found.info["pareto_k"] == -math.inf).all())
    np.testing.assert_allclose(found.info["log_evidence"], case.log_evidence, rtol=1e-10)
    np.testing.assert_allclose(found.info["log_evidence_error"], 0.0, atol=1e-8)
    np.testing.assert_allclose(found.info["effective_draws"], 200.0, rtol=1e-10)


def test_wrong_proposals_are_corrected():
    """q shifted by ½ sd and 1.3 times as wide: mean and sd within 5 standard errors.

    At 20,000 draws and an effective 10,000 or so the standard errors are 0.01 sd and 0.7 %;
    5 of them on 16 numbers: false-alarm rate 1e-5.
    """
    case, posterior = exact("linear_own_nested")
    own = posterior.density
    wrong = Gaussian(own.loc + 0.5 * own.sd, 1.3 * own.scale)
    found = importance(with_density(posterior, wrong), draws=20_000, seed=1)
    assert bool((found.info["pareto_k"] < 0.5).all())
    assert bool((found.info["effective_draws"] > 8000).all())
    mean, sd = (torch.from_numpy(moment) for moment in case.posterior)
    assert float(((found.density.mean - mean) / sd).abs().max()) < 0.05
    assert float((found.density.sd / sd - 1).abs().max()) < 0.035
    # The uncorrected one is off by ten times that.
    assert float(((wrong.mean - mean) / sd).abs().min()) > 0.4
    error = found.info["log_evidence"] - torch.from_numpy(case.log_evidence)
    assert bool((error.abs() < 5 * found.info["log_evidence_error"]).all())
    assert bool((found.info["log_evidence_error"] > 1e-3).all())


def test_standard_error_of_the_evidence_is_its_spread_over_seeds():
    """40 seeds: their sd has a relative standard error of 11 %; accepted within 45 %, 4 of them."""
    posterior = normal_against([1.2])
    runs = [importance(posterior, draws=500, seed=s).info for s in range(40)]
    evidence = torch.cat([run["log_evidence"] for run in runs])
    stated = torch.cat([run["log_evidence_error"] for run in runs]).mean()
    assert 0.55 < float(evidence.std() / stated) < 1.45
    # log p() = 0 without rows; the mean of 40 within 5 standard errors.
    assert abs(float(evidence.mean())) < 5 * float(stated) / math.sqrt(40)


def test_pareto_k_is_the_analytic_one():
    """k = 1 − s² for p = N(0, I), q = N(0, s² I) and s < 1, the mean of 20 tasks for each s.

    In two dimensions |φ|²/s² is exponential under q, so that w is exactly Pareto with that k (in
    others up to powers of log w). For s > 1 w is bounded, and uniform near its largest: k = −1.
    One k̂ of a tail of 425 has a standard error of 0.1 or less, the mean of 20 one of 0.02; the
    fit's weak prior draws k̂ to ½ by 2 %.
    """
    scales = (0.8, 0.7, 0.5, 0.3, 1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = importance(normal_against(scales * 20), draws=20_000, seed=0)
    k = found.info["pareto_k"].reshape(20, 5).mean(0)
    expected = [1 - s**2 if s < 1 else -1.0 for s in scales]
    np.testing.assert_allclose(k, expected, atol=0.08)


def test_equal_weights_have_no_tail():
    assert importance(normal_against([1.0]), draws=500).info["pareto_k"].tolist() == [-math.inf]


def test_proposals_elsewhere_are_warned_of_by_task():
    """Six sds off, log w has variance 36: no sample of 2,000 has a k̂ near the threshold."""
    posterior = normal_against([1.1, 1.0, 1.0])
    own = posterior.density
    posterior = with_density(
        posterior, Gaussian(own.loc + torch.tensor([[0], [6], [0]]), own.scale)
    )
    with pytest.warns(UserWarning, match=r"k̂ of task 1 is .* \(1 of 3 tasks\)"):
        found = importance(posterior, draws=2000)
    assert found.info["threshold"] == pytest.approx(1 - 1 / math.log10(2000))


def test_threshold_grows_with_the_draws_up_to_0_7():
    assert largest_k(100) == pytest.approx(0.5)
    assert largest_k(10**6) == 0.7


def test_same_seed_same_draws_and_no_trace(untouched):
    posterior = normal_against([1.2, 1.1])
    with untouched():
        one, two = (importance(posterior, draws=300, seed=4) for _ in range(2))
    assert torch.equal(one.density.phi, two.density.phi)
    assert torch.equal(one.density.log_weights, two.density.log_weights)
    other = importance(posterior, draws=300, seed=5)
    assert not torch.equal(one.density.phi, other.density.phi)


def test_weighted_draws_predict():
    case, posterior = exact()
    wide = Gaussian(posterior.density.loc, 1.2 * posterior.density.scale)
    found = importance(with_density(posterior, wide), draws=4000)
    mean, expected = found.predict(case.tasks).mean, posterior.predict(case.tasks).mean
    # Standard error of a mean of 2,500 effective draws is 0.02 sd of a coefficient.
    assert float((mean - expected).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("density", "advice"),
    [
        (lambda d: Delta(d.loc), "Laplace.soften"),
        (lambda d: Empirical(d.loc.unsqueeze(0)), "NUTS"),
    ],
)
def test_no_density_is_refused_with_advice(density, advice):
    _, posterior = exact()
    with pytest.raises(UnsupportedModelError, match=advice):
        importance(with_density(posterior, density(posterior.density)))


def test_bad_numbers_name_the_task():
    _, posterior = exact()
    loc = posterior.density.loc.clone()
    loc[2] = torch.nan
    with pytest.raises(ConvergenceError, match="'t2'"):
        importance(with_density(posterior, Gaussian(loc, posterior.density.scale)))


@pytest.mark.parametrize("draws", [99, 1e3, True, "4000"])
def test_draws_must_be_a_number_of_draws(draws):
    with pytest.raises(DataError, match="draws as a whole number of 100 or more"):
        importance(normal_against([1.1]), draws=draws)
