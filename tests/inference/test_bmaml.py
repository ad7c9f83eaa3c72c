"""BMAML: one particle, many particles, and what the chaser loss teaches to whom."""

import math

import numpy as np
import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.inference import BMAML
from hbmeta.inference.gradient_descent import descend
from hbmeta.problem import Problem
from tests import fits, reference
from tests.cases import COVARIANCE, MEAN, NOISE, case, rows_of
from tests.test_stein import by_loops

ONE = {"particles": 1, "step_size": 0.01}


def fit(strategy, name, **settings):
    return fits.fit(strategy, case(name).tasks, case(name).program, **settings)


def parts(name, first=2):
    """The problem, and the first rows of each task as query, the others as support."""
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    rank = torch.arange(tasks.n_points) - tasks.offsets[tasks.task]
    return (
        problem,
        problem.batch(tasks.keep(rank >= first)),
        problem.batch(tasks.keep(rank < first)),
    )


@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_nested", "linear_own_flat"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_particle_is_gradient_ascent_to_the_map(name, reduction):
    """Claimed to rounding: φ_N = φ̂ + (I − αH)^N (φ₀ − φ̂), H and φ̂ of the log joint."""
    tasks = case(name).tasks
    fitted = fit(BMAML(**ONE), name)
    few = fitted.adapt(tasks, reduction=reduction, steps=3)
    for i, found in enumerate(few.density.phi[0]):
        X, y = rows_of(tasks, i)
        optimum, _ = reference.gaussian_posterior(X, y, MEAN, COVARIANCE, NOISE)
        hessian = np.linalg.inv(COVARIANCE) + X.T @ X / NOISE**2
        step = ONE["step_size"] / (len(y) if reduction == "mean" else 1)
        end = reference.descended(hessian, optimum, np.array(MEAN), step, 3)
        np.testing.assert_allclose(found, end, rtol=1e-11)
    many = fitted.adapt(tasks, reduction="sum", steps=400, optimizer="momentum", step_size=3e-3)
    # A Gaussian's mode is its mean; what 400 steps leave is below 1e-6.
    np.testing.assert_allclose(many.density.phi[0], case(name).posterior[0], atol=1e-6)


@pytest.mark.parametrize("name", ["gamma_poisson", "lognormal_poisson"])
def test_one_particle_descends_as_maml_does_on_the_log_joint(name):
    """Claimed to rounding, where the log joint is no quadratic."""
    tasks = case(name).tasks
    fitted = fit(BMAML(**ONE), name)
    problem, batch = fitted.problem, fitted.problem.batch(tasks)

    def loss(phi):
        likelihood, local, _ = problem.terms(fitted.theta, phi, batch)
        return -(likelihood + local) / batch.counts

    start = problem.location(fitted.theta, batch)
    expected = descend(loss, start, step_size=0.01, steps=5).detach()
    found = fitted.adapt(tasks).density.phi[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_many_particles_on_a_normal():
    """The posterior of one coefficient: its mean to 2e-5, its sd within 6 % (measured: 95 % of it).

    The prior N(start, 1) of the offset and the noise of 0.3 make it Gaussian in one dimension.
    """
    tasks = case("module_parameters").tasks
    fitted = fit(BMAML(particles=30, spread=0.5), "module_parameters", steps=1)
    density = fitted.adapt(tasks, steps=500, step_size=0.01, reduction="sum").density
    problem, batch = fitted.problem, fitted.problem.batch(tasks)
    zero = torch.zeros(5, 1, dtype=torch.float64)
    # log p(S, φ) = c + b φ − ½ Λ φ²: two differences give Λ and b.
    joint = [sum(problem.terms(fitted.theta, zero + v, batch)[:2]) for v in (-1.0, 0.0, 1.0)]
    precision = -(joint[0] - 2 * joint[1] + joint[2])
    mean = 0.5 * (joint[2] - joint[0]) / precision
    torch.testing.assert_close(density.mean[:, 0], mean.detach(), rtol=0.0, atol=2e-5)
    torch.testing.assert_close(density.sd[:, 0], precision.detach().rsqrt(), rtol=0.06, atol=0.0)


def test_chaser_and_leader_are_those_of_loops():
    """Claimed to rounding: the linear program, one task at a time, pair by pair."""
    problem, support, query = parts("linear_own_nested")
    chosen = BMAML(steps=2, step_size=0.02, particles=3, leader_steps=2, spread=0.3)
    own = chosen.parameters(problem, case("linear_own_nested").tasks, 7)
    found = chosen.loss(problem, {}, own, support, query, {})
    offsets = own().detach().numpy()
    np.testing.assert_allclose(offsets.mean(0), 0.0, atol=1e-16)
    for i in range(4):
        X, y = rows_of(case("linear_own_nested").tasks, i)

        def moved(phi, rows, steps, X=X, y=y):
            for _ in range(steps):
                residual = y[rows] - phi @ X[rows].T
                scores = residual @ X[rows] / NOISE**2
                scores = scores - (phi - np.array(MEAN)) @ np.linalg.inv(COVARIANCE)
                phi = phi + 0.02 * by_loops(phi, scores)[0] / len(y[rows])
            return phi

        chaser = moved(np.array(MEAN) + offsets, slice(2, None), 2)
        leader = moved(chaser, slice(None), 2)
        distance = ((chaser - leader) ** 2).sum(1).mean() / (2 * 0.02 * chosen.leader_steps)
        np.testing.assert_allclose(float(found[i].detach()), distance, rtol=1e-10)


def gradients(chosen, problem, support, query, theta, own):
    theta = {k: v.detach().requires_grad_() for k, v in theta.items()}
    names = list(theta)
    loss = chosen.loss(problem, theta, own, support, query, {}).sum()
    leaves = [theta[n] for n in names] + list(own.parameters())
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return dict(zip([*names, "own"], found, strict=True))


def test_chaser_loss_moves_the_start_towards_the_leader():
    """In the learned offsets and in θ of p(φ | θ): differences with the leader held, to 1e-7."""
    name = "two_coefficients"
    problem, support, query = parts(name)
    chosen = BMAML(steps=2, step_size=0.05, particles=3, spread=0.2)
    own = chosen.parameters(problem, case(name).tasks, 3)
    theta = problem.theta(support)
    found = gradients(chosen, problem, support, query, theta, own)
    chaser = chosen._chased(problem, theta, theta, own, support)
    ahead = chosen._ahead(problem, theta, chaser, support, query)
    leader = {k: (v + ahead[k]).detach() for k, v in chaser.items()}
    (raw,) = own.parameters()
    start = raw.detach().clone()

    def distance(prior):
        # The steps' own θ of the likelihood is held, as the loss holds it.
        moved = chosen._chased(problem, theta, {**theta, **prior}, own, support)
        parts = [((moved[k] - leader[k]) ** 2).sum() / 3 for k in moved]
        return float(sum(parts).detach()) / (2 * chosen.step_size)

    for key in ("mean", "scale"):

        def of_theta(vector, key=key):
            return distance({key: torch.as_tensor(vector)})

        expected = reference.finite_difference(of_theta, theta[key].numpy())
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-8)

    def of_offsets(vector):
        with torch.no_grad():
            raw.copy_(torch.as_tensor(vector).reshape(start.shape))
        return distance({})

    expected = reference.finite_difference(of_offsets, start.numpy().ravel())
    np.testing.assert_allclose(found["own"].ravel(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chaser_loss_is_in_nats_per_point(reduction):
    """One particle, one leader step: the gradient at the chaser is that of −log p(S, Q, φ) / n.

    So log p(θ) weighs what it weighs beside other losses. Claimed to rounding.
    """
    problem, support, query = parts("two_coefficients")
    chosen = BMAML(steps=2, step_size=1e-3, particles=1, reduction=reduction)
    theta = {k: v.requires_grad_() for k, v in problem.theta(support).items()}
    held = {k: v.detach() for k, v in theta.items()}
    chaser = chosen._chased(problem, held, theta, None, support)
    phi = {k: v[0].detach().requires_grad_() for k, v in chaser.items()}
    data, local, _ = problem.terms(held, phi, support)
    joint = data + local + problem.log_predictive(held, phi, support, query)
    n = support.counts + query.counts
    slopes = torch.autograd.grad((joint / n).sum(), list(phi.values()))
    through = sum((s * c[0]).sum() for s, c in zip(slopes, chaser.values(), strict=True))
    (expected,) = torch.autograd.grad(-through, theta["mean"], retain_graph=True)
    loss = chosen.loss(problem, theta, None, support, query, {}).sum()
    (found,) = torch.autograd.grad(loss, theta["mean"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0.0)


def test_theta_of_the_likelihood_follows_fishers_identity():
    """The noise gets the gradient of −mean_m log p(Q | φ_m) per query row, particles held."""
    name = "two_coefficients"
    problem, support, query = parts(name)
    chosen = BMAML(steps=2, step_size=0.05, particles=3)
    own = chosen.parameters(problem, case(name).tasks, 3)
    theta = problem.theta(support)
    found = gradients(chosen, problem, support, query, theta, own)
    chaser = chosen._chased(problem, theta, theta, own, support)
    ahead = chosen._ahead(problem, theta, chaser, support, query)
    leader = {k: (v + ahead[k]).detach() for k, v in chaser.items()}
    live = {k: v.detach().requires_grad_() for k, v in theta.items()}
    total = 0.0
    for m in range(3):
        one = {k: v[m] for k, v in leader.items()}
        total = total - (problem.log_likelihood(live, one, query) / query.counts).sum() / 3
    (expected,) = torch.autograd.grad(total, live["noise"])
    torch.testing.assert_close(found["noise"], expected, rtol=1e-12, atol=1e-12)


def test_query_loss_is_the_mean_predictive():
    """Claimed to rounding."""
    name = "lognormal_poisson"
    problem, support, query = parts(name)
    chosen = BMAML(steps=2, step_size=0.05, particles=4, objective="query", spread=0.5)
    own = chosen.parameters(problem, case(name).tasks, 3)
    theta = problem.theta(support)
    found = chosen.loss(problem, theta, own, support, query, {})
    particles = chosen._chased(problem, theta, theta, own, support)
    each = [
        problem.log_likelihood(theta, {k: v[m] for k, v in particles.items()}, query).detach()
        for m in range(4)
    ]
    expected = -(torch.stack(each).exp().mean(0).log()) / query.counts
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)


def test_particles_that_start_together_stay_finite():
    fitted = fit(BMAML(spread=0.0), "varying_intercepts", steps=5)
    assert all(math.isfinite(v) for v in fitted.history)
    assert bool(torch.isfinite(fitted.adapt(case("varying_intercepts").tasks).density.phi).all())


def test_starts_are_learned_for_so_many_particles():
    fitted = fit(BMAML(particles=3), "varying_intercepts", steps=1)
    with pytest.raises(DataError, match=r"adapting can change, among .* found particles=4"):
        fitted.adapt(case("varying_intercepts").tasks, particles=4)
