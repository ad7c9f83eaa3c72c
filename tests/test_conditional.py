"""Draws of a new task's φ given θ, or given draws of θ, against closed forms."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta.conditional
from hbmeta.conditional import conditional, conditional_over_draws, warn_of_proposals
from hbmeta.densities import Empirical, Gaussian
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import reference
from tests.cases import RATE_RATE, RATE_SHAPE, case, rows_of


def problem_of(name):
    known = case(name)
    problem = Problem(known.program, known.tasks)
    return known, problem, problem.batch(known.tasks)


@pytest.mark.parametrize("name", ["linear_own_nested", "linear_own_flat", "linear_given_theta"])
def test_linear_programs_give_the_gaussian(name):
    known, problem, batch = problem_of(name)
    density, info = conditional(problem, {}, batch)
    assert isinstance(density, Gaussian)
    np.testing.assert_allclose(density.loc.numpy(), known.posterior[0], rtol=1e-9)
    np.testing.assert_allclose(density.sd.numpy(), known.posterior[1], rtol=1e-9)
    np.testing.assert_allclose(info["log_evidence"].numpy(), known.log_evidence, rtol=1e-9)
    assert bool(info["converged"].all())
    assert info["effective_draws"].tolist() == [1000.0] * 4


def test_other_programs_give_weighted_draws():
    """Gamma–Poisson with 20,000 draws: errors of 5 standard errors, a false alarm in 6e-7 each."""
    known, problem, batch = problem_of("gamma_poisson")
    density, info = conditional(problem, {}, batch, draws=20_000, seed=1)
    assert isinstance(density, Empirical)
    effective = info["effective_draws"].numpy()
    assert (effective > 15_000).all()
    rate, weights = density.phi[..., 0].exp(), density.weights
    mean = (weights * rate).sum(0).numpy()
    assert (np.abs(mean - known.posterior[0]) < 5 * known.posterior[1] / effective**0.5).all()
    # The relative error of the evidence is √(1/ess − 1/draws).
    error = np.sqrt(1 / effective - 1 / 20_000)
    assert (np.abs(info["log_evidence"].numpy() - known.log_evidence) < 5 * error).all()


def test_an_empty_support_gives_the_prior():
    known, problem, _ = problem_of("linear_own_nested")
    nothing = known.tasks.keep(torch.zeros(known.tasks.n_points, dtype=torch.bool))
    density, info = conditional(problem, {}, problem.batch(nothing))
    np.testing.assert_allclose(density.loc.numpy(), [[0.5, -1.0]] * 4, rtol=1e-10)
    np.testing.assert_allclose(density.covariance[0].numpy(), [[1.0, 0.3], [0.3, 0.5]], rtol=1e-10)
    np.testing.assert_allclose(info["log_evidence"].numpy(), 0.0, atol=1e-9)


def means_program(x, y=None):
    """φ_i ~ N(μ, 1), y ~ N(φ_i, ½): Gaussian given μ, and jointly."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(mu, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi, 0.5), obs=y)


def means_tasks():
    y = [[0.2, 0.5, 1.0], [1.5, 1.9, 0.8], [-0.3, 0.1, 0.4]]
    return Tasks(torch.zeros(3, 3, 1).double(), torch.tensor(y).double())


def test_each_draw_of_theta_has_its_evidence():
    tasks = means_tasks()
    problem = Problem(means_program, tasks)
    mu = torch.linspace(-2, 2, 9, dtype=torch.float64)
    density, info = conditional_over_draws(problem, {"mu": mu}, problem.batch(tasks))
    assert density.phi.shape == (9, 3, 1)
    assert info["proposal_efficiency"].tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    for i in range(3):
        X, y = np.ones((3, 1)), rows_of(tasks, i)[1]
        for s in range(9):
            evidence = reference.log_evidence(X, y, [float(mu[s])], [[1.0]], 0.5)
            assert float(info["log_evidence"][s, i]) == pytest.approx(evidence, rel=1e-9)
    torch.testing.assert_close(density.log_weights, info["log_evidence"])


def test_weighted_draws_are_the_joint_posterior():
    """μ drawn from its prior, weighted by p(S_i | μ): φ_i | S_i with μ integrated out.

    Marginally φ_i ~ N(0, 2). 20,000 draws: 5 standard errors of the mean, 5 % of the sd.
    """
    tasks = means_tasks()
    problem = Problem(means_program, tasks)
    mu = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density, info = conditional_over_draws(problem, {"mu": mu}, problem.batch(tasks), seed=2)
    for i in range(3):
        y = rows_of(tasks, i)[1]
        mean, covariance = reference.gaussian_posterior(np.ones((3, 1)), y, [0.0], [[2.0]], 0.5)
        error = 5 * covariance[0, 0] ** 0.5 / float(info["effective_draws"][i]) ** 0.5
        assert float(density.mean[i, 0]) == pytest.approx(mean[0], abs=error)
        assert float(density.sd[i, 0]) == pytest.approx(covariance[0, 0] ** 0.5, rel=0.05)
        # Their average is the evidence with μ integrated out.
        found = torch.logsumexp(info["log_evidence"][:, i], 0) - math.log(20_000)
        evidence = reference.log_evidence(np.ones((3, 1)), y, [0.0], [[2.0]], 0.5)
        assert float(found) == pytest.approx(evidence, abs=0.05)


def test_theta_may_hold_draws_and_points():
    """Weighted draws of a program that is not linear-Gaussian, its θ drawn."""
    known, problem, batch = problem_of("lognormal_poisson")
    theta = {
        "location": torch.linspace(0.0, 1.0, 50, dtype=torch.float64),
        "spread": torch.full((50,), math.log(0.5), dtype=torch.float64),
    }
    density, info = conditional_over_draws(problem, theta, batch)
    assert bool(torch.isfinite(density.phi).all())
    assert float(info["proposal_efficiency"].min()) > 0.7
    # One θ at a time gives the same evidence, to Monte Carlo error: 16 against 4,000 proposals.
    for s in (0, 49):
        alone = conditional(problem, {k: v[s] for k, v in theta.items()}, batch, draws=4000)[1]
        torch.testing.assert_close(
            info["log_evidence"][s], alone["log_evidence"], rtol=0.0, atol=0.5
        )
    assert known.tasks.n_tasks == density.phi.shape[1]


def test_one_proposal_per_theta_is_drawn_by_its_weight():
    """Gamma–Poisson with a level-1 site of which all draws are the same: φ_s is from p(φ | S, θ).

    20,000 draws, of which the 16 proposals each are Student-t: 5 standard errors of mean and sd.
    """

    def program(x, y=None):
        rate_rate = pyro.sample("rate_rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            rate = pyro.sample("rate", dist.Gamma(RATE_SHAPE, rate_rate))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Poisson(rate), obs=y)

    known = case("gamma_poisson")
    # Few data, so that the posterior of log rate is visibly skewed.
    tasks = known.tasks.keep(known.tasks.leading(torch.arange(18.0), torch.tensor([1, 1, 1, 1])))
    problem = Problem(program, tasks)
    theta = {"rate_rate": torch.full((20_000,), math.log(RATE_RATE), dtype=torch.float64)}
    density, _ = conditional_over_draws(problem, theta, problem.batch(tasks))
    rate = density.phi[..., 0].exp()
    shape = RATE_SHAPE + tasks.flat_y
    mean, sd = shape / (RATE_RATE + 1), shape.sqrt() / (RATE_RATE + 1)
    assert bool(((rate.mean(0) - mean).abs() < 5 * sd / 20_000**0.5).all())
    # Var of a sample sd: (κ − 1)/(4n) with κ = 3 + 6/shape the kurtosis of a Gamma.
    error = sd * ((2 + 6 / shape) / 80_000).sqrt()
    assert bool(((rate.std(0) - sd).abs() < 5 * error).all())


def squared(x, y=None):
    """y ~ N(φ², 0.1): where the prior's location, 0, is a minimum of the likelihood."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, scale))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi**2, 0.1), obs=y)


def squared_problem():
    y = [[1.0, 1.1, 0.9], [2.0, 2.1, 1.9], [-0.1, 0.0, 0.1]]
    tasks = Tasks(torch.zeros(3, 3, 1).double(), torch.tensor(y).double(), ids=["a", "b", "c"])
    problem = Problem(squared, tasks)
    return tasks, problem, problem.batch(tasks)


def test_a_start_without_gradient_is_left():
    """Against the integral over φ > 0 on a grid: one of the two equal modes is covered."""
    tasks, problem, batch = squared_problem()
    theta = {"scale": torch.tensor(0.0, dtype=torch.float64)}
    density, info = conditional(problem, theta, batch, draws=4000, seed=1)
    assert bool((info["converged"] & info["positive"]).all())
    assert float(info["proposal_efficiency"][:2].min()) > 0.9
    grid = torch.linspace(0.0, 4.0, 20_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    for i in (0, 1):
        y = tasks.y[i]
        log_joint = normal(0.0, 1.0).log_prob(grid)
        log_joint = log_joint + normal(grid**2, 0.1).log_prob(y[:, None]).sum(0)
        weights = torch.softmax(log_joint, 0)
        mean = float((weights * grid).sum())
        sd = float((weights * (grid - mean) ** 2).sum().sqrt())
        # 4,000 draws: 5 standard errors.
        assert abs(float(density.mean[i, 0])) == pytest.approx(mean, abs=5 * sd / 60)
        evidence = float(torch.logsumexp(log_joint, 0)) + math.log(4.0 / 20_000)
        assert float(info["log_evidence"][i]) == pytest.approx(evidence, abs=0.05)
    many = {"scale": torch.linspace(-0.5, 0.5, 64, dtype=torch.float64)}
    density, info = conditional_over_draws(problem, many, batch)
    assert bool((info["converged"] & info["positive"]).all())
    assert float((density.phi[:, 0].abs() - 1.0).abs().max()) < 0.3
    # Each draw of θ takes a side of its own.
    assert 0 < int((density.phi[:, 0] > 0).sum()) < 64


def test_where_no_mode_is_found_the_worst_task_is_named(monkeypatch):
    """Without a step: the proposal stays at the minimum, valid and poor."""
    tasks, problem, batch = squared_problem()
    monkeypatch.setattr(
        hbmeta.conditional,
        "maximise",
        lambda function, start, **_: (start, torch.zeros(start.shape[:-1], dtype=torch.bool)),
    )
    theta = {"scale": torch.tensor(0.0, dtype=torch.float64)}
    density, info = conditional(problem, theta, batch)
    assert bool(torch.isfinite(density.phi).all())
    assert info["positive"].tolist() == [False, False, True]
    with pytest.warns(UserWarning, match="here: the draws of task 'b' are poor .no mode"):
        warn_of_proposals(info, tasks.ids, "here")
    _, info = conditional_over_draws(problem, {"scale": torch.zeros(4).double()}, batch)
    assert info["converged"].tolist() == [False] * 3
    with pytest.warns(UserWarning, match="are poor .no mode"):
        warn_of_proposals(info, tasks.ids, "here")


def test_poor_proposals_are_warned_of():
    fine = {
        "proposal_efficiency": torch.tensor([0.5, 0.9]),
        "converged": torch.tensor([True, True]),
        "positive": torch.tensor([True, True]),
    }
    warn_of_proposals(fine, ("a", "b"), "here")
    for worst in (0.05, math.nan):
        poor = fine | {"proposal_efficiency": torch.tensor([0.5, worst])}
        with pytest.warns(UserWarning, match="task 'b' are poor .φ is far from Gaussian"):
            warn_of_proposals(poor, ("a", "b"), "here")


def test_same_seed_same_draws_and_no_trace(untouched):
    _, problem, batch = problem_of("gamma_poisson")
    with untouched():
        one, _ = conditional(problem, {}, batch, draws=50, seed=1)
        same, _ = conditional(problem, {}, batch, draws=50, seed=1)
        other, _ = conditional(problem, {}, batch, draws=50, seed=2)
    assert torch.equal(one.phi, same.phi)
    assert not torch.equal(one.phi, other.phi)


def test_too_many_parameters_per_task():
    def wide(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([65]).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi.sum(-1), 1.0), obs=y)

    tasks = means_tasks()
    problem = Problem(wide, tasks)
    with pytest.raises(UnsupportedModelError, match="at most 64 parameters per task"):
        conditional(problem, {}, problem.batch(tasks))
