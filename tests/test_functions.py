"""Conditioning a joint program on its support, against dense Gaussians by hand."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from hbmeta.components import Particles
from hbmeta.densities import Empirical
from hbmeta.errors import ProgramError, UnsupportedModelError
from hbmeta.functions import Functions, check_mask, leave_one_out
from hbmeta.inference import MAML, ExactGP, Quadrature
from hbmeta.posterior import TaskPosterior
from hbmeta.predictive import Predictive
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks

NOISE = 0.3


def covariance_of(x, ell):
    """A kernel with a linear trend, so that the law differs from point to point."""
    distance = x.unsqueeze(-2) - x.unsqueeze(-3)
    return torch.exp(-0.5 * (distance.squeeze(-1) / ell) ** 2) + 0.2 * x @ x.mT


def walk(x, y=None, *, mask=None):
    """A program of one's own in the joint layout, with a mean that depends on φ and on x."""
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    with pyro.plate("task", x.shape[0], dim=-1):
        ell = pyro.sample("ell", dist.LogNormal(0.0, 0.5))
        shift = pyro.sample("shift", dist.Normal(centre, 1.0))
        k = covariance_of(x, ell[:, None, None]) + NOISE**2 * torch.eye(x.shape[1])
        mean = shift[:, None] + 0.5 * x[..., 0]
        if mask is not None:
            m = mask.to(x.dtype)
            inside = m.unsqueeze(-1) * m.unsqueeze(-2)
            k = k * inside + torch.diag_embed((1 - m) / (2 * math.pi))
            y = None if y is None else torch.where(mask, y, mean)
        return pyro.sample("y", dist.MultivariateNormal(mean, k), obs=y)


def tasks_of(counts, seed):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(counts)), counts)
    x = rng.uniform(-2, 2, (len(task), 1))
    y = np.sin(2 * x[:, 0]) + 0.5 * rng.standard_normal(len(task))
    ids = [f"t{i}" for i in range(len(counts))]
    return Tasks.from_flat(x, y, task, len(counts), ids=ids)


SUPPORT, QUERY = tasks_of((4, 0, 2), 0), tasks_of((2, 3, 4), 1)
THETA = {"centre": torch.tensor(0.4, dtype=torch.float64)}
S = 5


def phi_of(n=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(n, 3, 2, generator=generator, dtype=torch.float64)


def weights_of(n=S, seed=3):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(tasks, i):
    mine = tasks.task == i
    return tasks.flat_x[mine], tasks.flat_y[mine].numpy()


def law(phi, x_new, x, y):
    """Mean and covariance of y at x_new given (x, y) at one φ = (log ell, shift)."""
    both = torch.cat([x, x_new])
    k = covariance_of(both, phi[0].exp()).numpy() + NOISE**2 * np.eye(len(both))
    mean = (phi[1] + 0.5 * both[:, 0]).numpy()
    n = len(x)
    gain = k[n:, :n] @ np.linalg.inv(k[:n, :n])
    return mean[n:] + gain @ (y - mean[:n]), k[n:, n:] - gain @ k[:n, n:]


def problem():
    return Problem(walk, SUPPORT)


def posterior(phi, log_weights=None, *, support=SUPPORT):
    return TaskPosterior(problem(), THETA, Empirical(phi, log_weights), support)


@pytest.mark.parametrize("weighted", [False, True])
def test_predictive_is_the_mixture_of_conditionals(weighted):
    phi, log_w = phi_of(), weights_of() if weighted else None
    predictive = posterior(phi, log_w).predict(QUERY)
    found = predictive.log_prob(QUERY.y)
    joint = predictive.log_prob(QUERY.y, joint=True)
    w = torch.full((S, 3), 1 / S, dtype=torch.float64) if log_w is None else log_w.softmax(0)
    for i in range(3):
        x_new, y_new = rows(QUERY, i)
        laws = [law(phi[s, i], x_new, *rows(SUPPORT, i)) for s in range(S)]
        each = w[:, i].numpy()
        marginal = sum(
            p * stats.norm(m, np.sqrt(np.diag(v))).pdf(y_new)
            for p, (m, v) in zip(each, laws, strict=True)
        )
        n = len(y_new)
        np.testing.assert_allclose(found[i, :n], np.log(marginal), rtol=1e-9, atol=1e-10)
        together = sum(
            p * stats.multivariate_normal(m, v).pdf(y_new)
            for p, (m, v) in zip(each, laws, strict=True)
        )
        assert float(joint[i]) == pytest.approx(math.log(together), abs=1e-9)
        mean = sum(p * m for p, (m, _) in zip(each, laws, strict=True))
        np.testing.assert_allclose(predictive.mean[i, :n], mean, atol=1e-10)


def test_joint_density_is_the_difference_of_log_likelihoods():
    """log p(Q | S, φ) = log p(S ∪ Q | φ) − log p(S | φ), one task's rows side by side."""
    p, phi = problem(), phi_of(1)[0]
    support, query = p.batch(SUPPORT), p.batch(QUERY)
    found = p.log_predictive(THETA, phi, support, query)
    for i in range(3):
        x, y = rows(SUPPORT, i)
        x_new, y_new = rows(QUERY, i)
        mean, covariance = law(phi[i], x_new, x, y)
        expected = stats.multivariate_normal(mean, covariance).logpdf(y_new)
        assert float(found[i]) == pytest.approx(expected, abs=1e-9)


def test_beside_puts_the_cells_of_a_task_side_by_side():
    p = problem()
    support, query = p.batch(SUPPORT), p.batch(QUERY)
    both = support.beside(query)
    assert both.joint
    assert both.x.shape == (3, 8, 1)
    assert torch.equal(both.counts, support.counts + query.counts)
    assert torch.equal(both.y[:, :4], support.y)
    assert torch.equal(both.weight[:, 4:], query.weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_draws_are_joint_over_the_rows_of_a_task(weighted):
    """20,000 draws: means and covariances of task 2 within 6 standard errors (1e-8 each)."""
    phi, log_w = phi_of(), weights_of() if weighted else None
    predictive = posterior(phi, log_w).predict(QUERY)
    draws = predictive.sample(20_000, seed=1)[:, 2, :4].numpy()
    w = np.full(S, 1 / S) if log_w is None else log_w.softmax(0)[:, 2].numpy()
    laws = [law(phi[s, 2], rows(QUERY, 2)[0], *rows(SUPPORT, 2)) for s in range(S)]
    mean = sum(p * m for p, (m, _) in zip(w, laws, strict=True))
    covariance = sum(
        p * (v + np.outer(m - mean, m - mean)) for p, (m, v) in zip(w, laws, strict=True)
    )
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs(draws.mean(0) - mean) < 6 * sd / 141).all()
    # The fourth moments of such a mixture stay below twice those of a Normal.
    bound = 6 * np.outer(sd, sd) * 2 / 141
    assert (np.abs(np.cov(draws.T) - covariance) < bound).all()
    again = predictive.sample(20_000, seed=1)[:, 2, :4].numpy()
    np.testing.assert_array_equal(draws, again)


def test_chunks_of_draws_change_nothing(monkeypatch):
    phi, log_w = phi_of(), weights_of()
    whole = posterior(phi, log_w).predict(QUERY)
    monkeypatch.setattr("hbmeta.functions._NUMBERS", 2 * 3 * 64)
    cut = posterior(phi, log_w).predict(QUERY)
    assert torch.equal(whole.mean, cut.mean)
    for joint in (False, True):
        torch.testing.assert_close(
            whole.log_prob(QUERY.y, joint=joint), cut.log_prob(QUERY.y, joint=joint),
            rtol=1e-13, atol=1e-13,
        )  # fmt: skip
    torch.testing.assert_close(whole.sample(50, seed=2), cut.sample(50, seed=2))


def test_draws_of_theta_go_with_those_of_phi():
    """Each particle has its own centre, which moves where the prior is and nothing else here."""
    p = problem()
    phi = phi_of()
    theta = {"centre": torch.linspace(-1, 1, S, dtype=torch.float64)}
    functions = Functions(p, Particles(theta, True, phi, None), SUPPORT, QUERY)
    fixed = Functions(p, Particles(THETA, False, phi, None), SUPPORT, QUERY)
    assert torch.equal(functions.distribution(0, S).loc, fixed.distribution(0, S).loc)


def test_location_and_scale_of_y_enter_the_joint_density():
    p, phi = problem(), phi_of()
    functions = Functions(p, Particles(THETA, False, phi, None), SUPPORT, QUERY)
    plain, scaled = (
        Predictive(functions, QUERY, joint=functions.joint, location=a, scale=b)
        for a, b in ((0.0, 1.0), (3.0, 2.0))
    )
    y = QUERY.flat_y
    difference = plain.log_prob(y, joint=True) - scaled.log_prob(3 + 2 * y, joint=True)
    torch.testing.assert_close(difference, QUERY.counts.double() * math.log(2.0))


def test_leave_one_out_is_the_conditional_given_the_other_points():
    p, phi = problem(), phi_of()
    batch = p.batch(SUPPORT)
    found = p.particle_cells(THETA, False, phi, batch)
    assert found.shape == (S, 3, 4)
    for i in (0, 2):
        x, y = rows(SUPPORT, i)
        for j in range(len(y)):
            others = [k for k in range(len(y)) if k != j]
            mean, variance = law(phi[1, i], x[j : j + 1], x[others], y[others])
            expected = stats.norm(mean[0], variance[0, 0] ** 0.5).logpdf(y[j])
            assert float(found[1, i, j]) == pytest.approx(expected, abs=1e-9)
    log_likelihood, _ = posterior(phi).log_likelihood()
    assert log_likelihood.shape == (S, SUPPORT.n_points)


def test_a_response_that_is_no_normal_cannot_be_conditioned():
    batch = problem().batch(SUPPORT)
    with pytest.raises(UnsupportedModelError, match="a MultivariateNormal response"):
        leave_one_out(dist.MultivariateStudentT(5.0, torch.zeros(4), torch.eye(4)), batch)


# The mask


def ignoring(x, y=None, *, mask=None):
    with pyro.plate("task", x.shape[0], dim=-1):
        ell = pyro.sample("ell", dist.LogNormal(0.0, 0.5))
        k = covariance_of(x, ell[:, None, None]) + NOISE**2 * torch.eye(x.shape[1])
        return pyro.sample("y", dist.MultivariateNormal(torch.zeros(x.shape[1]), k), obs=y)


def half_masked(x, y=None, *, mask=None):
    """It decouples the kernel but keeps y and the normalising constant of masked points."""
    with pyro.plate("task", x.shape[0], dim=-1):
        ell = pyro.sample("ell", dist.LogNormal(0.0, 0.5))
        k = covariance_of(x, ell[:, None, None]) + NOISE**2 * torch.eye(x.shape[1])
        m = torch.ones_like(x[..., 0]) if mask is None else mask.to(x.dtype)
        k = k * m.unsqueeze(-1) * m.unsqueeze(-2) + torch.diag_embed(1 - m)
        return pyro.sample("y", dist.MultivariateNormal(torch.zeros(x.shape[1]), k), obs=y)


def constant_left(x, y=None, *, mask=None):
    """Masked points have variance 1, which leaves −½ log 2π of each."""
    mean = torch.zeros_like(x[..., 0])
    y = None if y is None else torch.where(mask, y, mean)
    return half_masked(x, y, mask=mask)


@pytest.mark.parametrize("program", [ignoring, half_masked, constant_left])
def test_a_program_that_minds_masked_points_is_refused(program):
    full = tasks_of((4, 4, 4), 0)
    with pytest.raises(ProgramError) as caught:
        Problem(program, full)
    assert "does not depend on points with mask False" in caught.value.needed
    assert "K ∘ m mᵀ" in caught.value.do


def test_a_program_that_minds_its_mask_passes():
    check_mask(problem(), SUPPORT)


# Strategies on a program of one's own


@pytest.mark.parametrize("strategy", [MAML(steps=3, step_size=0.01), Quadrature(), ExactGP()])
def test_strategies_take_a_joint_program_of_one_s_own(strategy, untouched):
    with untouched():
        fit = strategy.fit(walk, tasks_of((4, 5, 6), 0), steps=2, compile=False, progress=False)
        predictive = fit.adapt(SUPPORT).predict(QUERY)
        joint = predictive.log_prob(QUERY.y, joint=True)
    assert bool(torch.isfinite(joint).all())
    assert predictive.mean.shape == QUERY.y.shape
