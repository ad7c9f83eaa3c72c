"""ABML: where it is the prior, where it is the mean-field optimum, and what no scale can break."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import ABML
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import fits, reference
from tests.cases import COVARIANCE, MEAN, NOISE, case, rows_of

LINEAR = ("linear_given_theta", "linear_own_nested", "linear_own_flat")


def fit(strategy, name, **settings):
    return fits.fit(strategy, case(name).tasks, case(name).program, **settings)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["varying_intercepts", "two_coefficients", "module_parameters", "lognormal_poisson"]
)
def test_no_steps_and_no_rows_give_the_prior(name):
    """Claimed to rounding, for priors that are Gaussian and independent."""
    tasks = case(name).tasks
    fitted = fit(ABML(steps=2), name)
    batch = fitted.problem.batch(tasks)
    none = tasks.keep(torch.zeros(tasks.n_points, dtype=torch.bool))
    for posterior in (fitted.adapt(tasks, steps=0), fitted.adapt(none)):
        phi = posterior.density.loc + normal(*posterior.density.loc.shape)
        prior = fitted.problem.log_task_prior(fitted.theta, phi, batch)
        torch.testing.assert_close(posterior.density.log_prob(phi), prior, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LINEAR)
def test_no_steps_from_a_correlated_prior(name):
    """Of the Gaussians with independent coordinates the one next to the prior, 1/Λ_jj."""
    density = fit(ABML(), name).adapt(case(name).tasks, steps=0).density
    sd = np.diag(np.linalg.inv(COVARIANCE)) ** -0.5
    np.testing.assert_allclose(density.loc, np.tile(MEAN, (4, 1)), rtol=1e-12)
    np.testing.assert_allclose(density.scale, np.tile(sd, (4, 1)), rtol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_many_steps_give_the_mean_field_optimum(name):
    """Means exact, variances 1/(Σ⁻¹ + XᵀX/σ²)_jj, to what descent leaves: 1e-7.

    Two pairs of draws for two entries of φ: their second moments are those of N(0, I) exactly.
    """
    known = case(name)
    posterior = fit(ABML(), name).adapt(
        known.tasks, steps=700, step_size=0.03, optimizer="momentum", draws=4
    )
    np.testing.assert_allclose(posterior.density.loc, known.posterior[0], atol=1e-7)
    for i, sd in enumerate(posterior.density.scale):
        X, _ = rows_of(known.tasks, i)
        precision = np.linalg.inv(COVARIANCE) + X.T @ X / NOISE**2
        np.testing.assert_allclose(sd, np.diag(precision) ** -0.5, rtol=1e-7)
        # Mean-field variances are too small where coordinates correlate.
        assert (sd.numpy() < known.posterior[1][i]).all()


def test_few_draws_err_in_the_scales_alone():
    """One pair for two entries: the gradient in the mean is exact all the same."""
    known = case("linear_own_nested")
    posterior = fit(ABML(), "linear_own_nested").adapt(
        known.tasks, steps=700, step_size=0.03, optimizer="momentum", draws=2
    )
    np.testing.assert_allclose(posterior.density.loc, known.posterior[0], atol=1e-6)
    exact = [
        np.diag(np.linalg.inv(COVARIANCE) + X.T @ X / NOISE**2) ** -0.5
        for X, _ in (rows_of(known.tasks, i) for i in range(4))
    ]
    assert not np.allclose(posterior.density.scale, exact, rtol=0.01)


def slow_loss(task, query_rows, noise, steps, step_size):
    """One task of the linear program, with torch's distributions and its own loop."""
    X, y = (torch.as_tensor(v) for v in rows_of(case("linear_own_nested").tasks, task))
    prior = MultivariateNormal(
        torch.tensor(MEAN, dtype=torch.float64), torch.tensor(COVARIANCE, dtype=torch.float64)
    )
    s = prior.precision_matrix.diagonal().rsqrt()
    inside = torch.ones(len(y), dtype=torch.bool)
    inside[query_rows] = False

    def parts(u, rho, draws, rows):
        q = MultivariateNormal(prior.loc + s * u, scale_tril=torch.diag(s * rho.exp()))
        values = []
        for sign in (1.0, -1.0):
            for epsilon in draws:
                phi = q.loc + sign * q.scale_tril.diagonal() * epsilon
                values.append(
                    torch.distributions.Normal(X[rows] @ phi, NOISE).log_prob(y[rows]).sum()
                )
        return torch.stack(values), kl_divergence(q, prior)

    u, raw = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for _ in range(steps):
        values, kl = parts(u, 12 * torch.tanh(raw / 12), noise["steps"][:, task], inside)
        objective = (kl - values.mean()) / int(inside.sum())
        gradients = torch.autograd.grad(objective, [u, raw])
        u, raw = (
            (v - step_size * g).detach().requires_grad_()
            for v, g in zip((u, raw), gradients, strict=True)
        )
    values, kl = parts(u, 12 * torch.tanh(raw / 12), noise["loss"][:, task], ~inside)
    n = int((~inside).sum())
    elbo = -(values.mean() - kl) / n
    predictive = -(torch.logsumexp(values, 0) - math.log(len(values))) / n
    return float(elbo.detach()), float(predictive.detach())


@pytest.mark.parametrize("name", ["linear_own_nested", "linear_own_flat"])
def test_loss_is_that_of_a_loop_over_tasks(name):
    """Claimed to rounding, both objectives, the first two rows of a task its query."""
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    rank = torch.arange(tasks.n_points) - tasks.offsets[tasks.task]
    support, query = (problem.batch(tasks.keep(part)) for part in (rank >= 2, rank < 2))
    settings = {"steps": 3, "step_size": 0.05, "draws": 6}
    chosen = ABML(**settings)
    noise = {
        key: normal(*shape, seed=i)
        for i, (key, shape) in enumerate(chosen.noise(problem, 4).items())
    }
    theta = problem.theta(support)
    for position, objective in enumerate(("elbo", "predictive")):
        chosen = ABML(objective=objective, **settings)
        found = chosen.loss(problem, theta, None, support, query, noise)
        expected = [slow_loss(i, [0, 1], noise, 3, 0.05)[position] for i in range(4)]
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-11)


@pytest.mark.parametrize("learned_scale", [False, True])
def test_gradient_goes_through_the_steps(learned_scale):
    """In the prior's mean and scale, and in the factors of the scale: differences, to 1e-6."""
    name = "two_coefficients"
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    chosen = ABML(steps=2, step_size=0.05, learned_scale=learned_scale)
    own = chosen.parameters(problem, tasks, 0)
    support = problem.batch(tasks)
    noise = {k: normal(*s, seed=5) for k, s in chosen.noise(problem, tasks.n_tasks).items()}
    theta = problem.theta(support)
    parameters = {} if own is None else dict(own.named_parameters())
    leaves = {**theta, **{f"own/{k}": v.detach() for k, v in parameters.items()}}
    sizes = [v.numel() for v in leaves.values()]

    def value(vector):
        pieces = torch.as_tensor(vector).split(sizes)
        found = {k: p.reshape(v.shape) for (k, v), p in zip(leaves.items(), pieces, strict=True)}
        given = {k: found.pop(f"own/{k}") for k in parameters}
        bound = (lambda: torch.func.functional_call(own, given, ())) if given else None
        return chosen.loss(problem, found, bound, support, support, noise).sum()

    point = torch.cat([v.reshape(-1) for v in leaves.values()])
    point = (point + 0.1 * normal(len(point), seed=6)).requires_grad_()
    (gradient,) = torch.autograd.grad(value(point), point)
    differences = reference.finite_difference(
        lambda v: float(value(v).detach()), point.detach().numpy()
    )
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-6)
    assert bool((gradient != 0).all())


def scaled(scale):
    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, scale))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(x[..., 0] + phi / scale, 1.0), obs=y)

    return program


def test_no_scale_of_the_prior_gives_a_nan():
    """q in units of the prior's sd, and the loss, are the same for scales of 1e-30, 1 and 1e30."""
    tasks = case("varying_intercepts").tasks
    found = []
    for scale in (1e-30, 1.0, 1e30):
        fitted = fits.fit(ABML(learned_scale=True), tasks, scaled(scale), steps=3)
        density = fitted.adapt(tasks).density
        assert bool(torch.isfinite(density.log_prob(density.loc)).all())
        numbers = [density.loc / scale, density.scale / scale, torch.tensor(fitted.history)]
        found.append(torch.cat([v.reshape(-1).double() for v in numbers]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[1], rtol=1e-9, atol=1e-12)


def test_learned_scale_is_of_the_start_and_of_the_prior():
    name = "module_parameters"
    tasks = case(name).tasks
    fitted = fit(ABML(learned_scale=True), name, steps=20, learning_rate=0.05)
    (raw,) = fitted.own.parameters()
    assert bool(raw.abs() > 0.01)
    factor = float((12 * torch.tanh(raw.detach() / 12)).exp())
    none = tasks.keep(torch.zeros(tasks.n_points, dtype=torch.bool))
    np.testing.assert_allclose(fitted.adapt(none).density.scale, factor, rtol=1e-12)
    with pytest.raises(DataError, match="found learned_scale=False"):
        fitted.adapt(tasks, learned_scale=False)


def test_bound_learns_the_spread_between_tasks():
    """θ of a centered prior, which MAML's loss does not depend on, is moved by the bound."""
    fitted = fit(ABML(steps=5), "two_coefficients", steps=3)
    assert fitted.info["untouched"] == []


def wide(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        covariance = torch.eye(65) + 0.1
        phi = pyro.sample("phi", dist.MultivariateNormal(torch.zeros(65), covariance))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi.sum(-1), 1.0), obs=y)


def kinked(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Laplace(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "found"), [(wide, "65"), (kinked, "site 'phi', whose prior is flat or has a kink")]
)
def test_priors_without_an_expansion_are_refused(program, found):
    tasks = Tasks(torch.zeros(2, 3, 1), torch.ones(2, 3))
    with pytest.raises(UnsupportedModelError) as caught:
        fits.fit(ABML(), tasks, program)
    assert found in caught.value.found
