"""PLATIPUS: MAML without noise, the law of its start, and its bound."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hbmeta.inference import MAML, PLATIPUS
from hbmeta.problem import Problem
from tests import fits, reference
from tests.cases import MEAN, NOISE, case, rows_of

NO_SHIFT = {"prior_step": 0.0, "posterior_step": 0.0}


def fit(strategy, name, **settings):
    return fits.fit(strategy, case(name).tasks, case(name).program, **settings)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["linear_own_flat", "gamma_poisson", "neural_classifier", "gaussian_process"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_noise_and_shift_it_is_maml(name, reduction):
    """Claimed to rounding: every particle is MAML's φ_N."""
    settings = {"steps": 3, "step_size": 0.01, "reduction": reduction}
    chosen = PLATIPUS(particles=3, **NO_SHIFT, **settings)
    tasks = case(name).tasks
    fitted = fit(chosen, name, steps=1)
    problem, batch = fitted.problem, fitted.problem.batch(tasks)
    expected = MAML(**settings).posterior(problem, fitted.theta, None, batch).loc.detach()
    noise = {"start": torch.zeros(3, tasks.n_tasks, problem.sites.phi_size, dtype=torch.float64)}
    with torch.no_grad():
        found = chosen.given(problem, fitted.theta, fitted.own, batch, noise).phi
    torch.testing.assert_close(found, expected.expand(3, -1, -1), rtol=1e-11, atol=1e-12)


def test_draws_are_where_descent_ends_from_the_prior_of_the_start():
    """Claimed to rounding, in closed form: φ_0 = μ − γ∇L(μ) + σε, φ_N = φ̂ + (I − αH)^N (φ_0 − φ̂).

    The same for a task without rows: μ + σε.
    """
    name = "linear_own_nested"
    tasks = case(name).tasks
    rest = {"steps": 3, "step_size": 0.02, "particles": 6}
    fitted = fit(PLATIPUS(prior_step=0.05, spread=0.2, **rest), name, steps=3, learning_rate=0.1)
    law, _ = fitted.own()
    gamma, sd = 0.05 * float(law.step.detach()), law.log_scale.exp().detach().numpy()
    assert not np.allclose(sd, 0.2, rtol=1e-3)
    assert abs(gamma - 0.05) > 1e-4
    noise = torch.randn((6, 4, 2), generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    found = fitted.adapt(tasks, seed=11).density.phi
    for i in range(4):
        X, y = rows_of(tasks, i)
        hessian, optimum = X.T @ X / NOISE**2 / len(y), reference.least_squares(X, y)
        shifted = np.array(MEAN) - gamma * hessian @ (np.array(MEAN) - optimum)
        for draw in range(6):
            start = shifted + sd * noise[draw, i].numpy()
            end = reference.descended(hessian, optimum, start, 0.02, 3)
            np.testing.assert_allclose(found[draw, i], end, rtol=1e-10)
    none = tasks.keep(torch.zeros(tasks.n_points, dtype=torch.bool))
    empty = fitted.adapt(none, seed=11).density.phi
    np.testing.assert_allclose(empty, np.array(MEAN) + sd * noise.numpy(), rtol=1e-12)


def parts(name, first=2):
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    rank = torch.arange(tasks.n_points) - tasks.offsets[tasks.task]
    return (
        problem,
        problem.batch(tasks.keep(rank >= first)),
        problem.batch(tasks.keep(rank < first)),
    )


@pytest.mark.parametrize("name", ["linear_own_nested", "linear_own_flat"])
def test_loss_is_the_closed_form_of_its_parts(name):
    """Claimed to rounding: the KL of torch's normals, the ends of descent in matrices."""
    problem, support, query = parts(name)
    chosen = PLATIPUS(
        steps=2, step_size=0.02, draws=2, prior_step=0.03, posterior_step=0.04, spread=0.3
    )
    own = chosen.parameters(problem, case(name).tasks, 0)
    with torch.no_grad():
        own.raw.copy_(0.5 * normal(2, 2, seed=1))
    scales = (own.raw.detach() / 12).tanh().mul(12).exp() * 0.3
    noise = normal(2, 4, 2, seed=2)
    found = chosen.loss(problem, {}, own, support, query, {"start": noise})
    for i in range(4):
        X, y = (torch.as_tensor(v) for v in rows_of(case(name).tasks, i))

        def gradient(phi, rows, X=X, y=y):
            return X[rows].T @ (X[rows] @ phi - y[rows]) / NOISE**2 / len(y[rows])

        held, out = slice(2, None), slice(0, 2)
        mean = torch.tensor(MEAN, dtype=torch.float64)
        p = Normal(mean - 0.03 * gradient(mean, held), scales[0])
        q = Normal(mean - 0.04 * gradient(mean, out), scales[1])
        values = []
        for epsilon in noise[:, i]:
            phi = q.loc + q.scale * epsilon
            for _ in range(2):
                phi = phi - 0.02 * gradient(phi, held)
            values.append(Normal(X[out] @ phi, NOISE).log_prob(y[out]).sum())
        expected = (kl_divergence(q, p).sum() - torch.stack(values).mean()) / 2
        np.testing.assert_allclose(float(found[i].detach()), float(expected), rtol=1e-11)


def test_gradient_goes_through_steps_and_shifts():
    """In θ, the scales and the factors of γ: differences, to 1e-6."""
    name = "module_parameters"
    problem, support, query = parts(name, first=3)
    chosen = PLATIPUS(steps=2, step_size=0.02, prior_step=0.02, posterior_step=0.03)
    own = chosen.parameters(problem, case(name).tasks, 0)
    theta = problem.theta(support)
    noise = {"start": normal(1, 5, 1, seed=2)}
    leaves = {**theta, **{f"own/{k}": v.detach() for k, v in own.named_parameters()}}
    sizes = [v.numel() for v in leaves.values()]

    def value(vector):
        pieces = torch.as_tensor(vector).split(sizes)
        found = {k: p.reshape(v.shape) for (k, v), p in zip(leaves.items(), pieces, strict=True)}
        given = {k: found.pop(f"own/{k}") for k, _ in own.named_parameters()}

        def bound():
            return torch.func.functional_call(own, given, ())

        return chosen.loss(problem, found, bound, support, query, noise).sum()

    point = torch.cat([v.reshape(-1) for v in leaves.values()])
    point = (point + 0.1 * normal(len(point), seed=6)).requires_grad_()
    (gradient,) = torch.autograd.grad(value(point), point)
    differences = reference.finite_difference(
        lambda v: float(value(v).detach()), point.detach().numpy()
    )
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-6)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("raw", [-1e30, -100.0, 100.0, 1e30])
def test_no_learned_scale_gives_a_nan(raw):
    """Scales of q and p at opposite ends of what they can be: finite loss, finite gradient."""
    problem, support, query = parts("module_parameters")
    chosen = PLATIPUS(steps=1, step_size=1e-12, spread=1e-3)
    own = chosen.parameters(problem, case("module_parameters").tasks, 0)
    with torch.no_grad():
        own.raw.copy_(torch.tensor([[raw], [-raw]], dtype=torch.float64))
    noise = {"start": normal(1, 5, 1, seed=2)}
    loss = chosen.loss(problem, problem.theta(support), own, support, query, noise).sum()
    found = torch.autograd.grad(loss, list(own.parameters()))
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(g).all()) for g in found)
