"""Approximations where they are exact: closed forms, dense linear algebra, and each other."""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize

from hbmeta import models
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import MAML, NUTS, AmortizedGuide, ExactLinear
from hbmeta.inference.gradient_descent import descend
from hbmeta.tasks import LinearTasks, Tasks
from hbmeta.theory import implied_prior_precision, scaled_step_size, type_two_maximum_likelihood
from tests import reference
from tests.cases import COVARIANCE, MEAN, NOISE, case, rows_of

# T1: non-commuting Hessians. L^S = ½x² + x²y + 3/2 y², L^Q = ½ ‖φ − (1, −1)‖².

START = (0.5, -0.3)
TARGET = (1.0, -1.0)
VECTORS = [
    (1, (0.48, -0.235), 0.4278125, (-0.5757, 0.5875), (-0.5757, 0.5875)),
    (
        3,
        (0.4261536365, -0.1519404794),
        0.5242522997,
        (-0.66981503, 0.4222294233),
        (-0.6699570866, 0.4221332996),
    ),
    (
        5,
        (0.3667135101, -0.1028836143),
        0.6029347939,
        (-0.690601059, 0.3253343255),
        (-0.6952744581, 0.3220353105),
    ),
]


def support_loss(phi):
    x, y = phi[..., 0], phi[..., 1]
    return 0.5 * x**2 + x**2 * y + 1.5 * y**2


def query_loss(phi):
    return 0.5 * (phi - torch.tensor(TARGET, dtype=phi.dtype)).square().sum(-1)


def support_gradient(p):
    return np.array([p[0] + 2 * p[0] * p[1], p[0] ** 2 + 3 * p[1]])


def support_hessian(p):
    return np.array([[1 + 2 * p[1], 2 * p[0]], [2 * p[0], 3.0]])


@pytest.mark.parametrize(("steps", "end", "value", "gradient", "transposed"), VECTORS)
def test_meta_gradient(steps, end, value, gradient, transposed):
    start = torch.tensor([START], dtype=torch.float64, requires_grad=True)
    phi = descend(support_loss, start, step_size=0.1, steps=steps)
    np.testing.assert_allclose(phi.detach()[0].numpy(), end, atol=6e-11)
    loss = query_loss(phi)
    assert loss.item() == pytest.approx(value, abs=6e-11)
    (found,) = torch.autograd.grad(loss.sum(), start)
    np.testing.assert_allclose(found[0].numpy(), gradient, atol=6e-10)
    # The dense Jacobian: ∇ = Jᵀ∇L^Q. J∇L^Q is the product in the wrong order.
    path = reference.descent_path(support_gradient, START, 0.1, steps)
    jacobian = reference.descent_jacobian(support_hessian, path, 0.1)
    outer = path[-1] - np.array(TARGET)
    np.testing.assert_allclose(found[0].numpy(), jacobian.T @ outer, rtol=1e-12)
    np.testing.assert_allclose(jacobian @ outer, transposed, atol=6e-10)
    if steps > 1:
        assert np.abs(jacobian @ outer - gradient).max() > 9e-5
    # Differences of the value itself, to 1e-8.
    by_difference = reference.finite_difference(
        lambda s: float(
            query_loss(
                descend(support_loss, torch.tensor(s[None]), step_size=0.1, steps=steps).detach()
            )
        ),
        START,
    )
    np.testing.assert_allclose(found[0].numpy(), by_difference, atol=1e-8)


def test_tasks_descend_by_themselves():
    """One gradient of the sum over tasks gives each task's own iterate and Jacobian."""
    starts = torch.tensor([START, (0.1, 0.2), (-0.7, 0.4)], dtype=torch.float64)
    together = descend(support_loss, starts, step_size=0.1, steps=4)
    for i, start in enumerate(starts):
        alone = descend(support_loss, start[None], step_size=0.1, steps=4)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-14, atol=1e-14)


def test_no_steps_return_the_start():
    start = torch.tensor([START], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(
        query_loss(descend(support_loss, start, step_size=0.1, steps=0)).sum(), start
    )
    np.testing.assert_allclose(found[0].numpy(), np.array(START) - TARGET)


# MAML on linear programs


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_maml_is_the_map_estimate_under_its_implied_prior(steps, reduction):
    known = case("linear_given_theta")
    strategy = MAML(steps=steps, step_size=0.004, reduction=reduction)
    posterior = strategy.fit(known.program, known.tasks, compile=False).adapt(known.tasks)
    for i, found in enumerate(posterior.density.loc.numpy()):
        X, y = rows_of(known.tasks, i)
        hessian, optimum = X.T @ X / NOISE**2, reference.least_squares(X, y)
        step_size = scaled_step_size(0.004, len(y), NOISE, reduction)
        closed = reference.descended(hessian, optimum, np.array(MEAN), step_size, steps)
        np.testing.assert_allclose(found, closed, rtol=1e-10, atol=1e-10)
        precision = implied_prior_precision(hessian, step_size, steps).numpy()
        estimate = reference.map_estimate(hessian, optimum, np.array(MEAN), precision)
        np.testing.assert_allclose(found, estimate, rtol=1e-10, atol=1e-10)


def test_maml_converges_to_maximum_likelihood():
    known = case("linear_given_theta")
    strategy = MAML(steps=2000, step_size=0.05)
    fitted = MAML().fit(known.program, known.tasks, compile=False)
    posterior = fitted.adapt(known.tasks, steps=strategy.steps, step_size=strategy.step_size)
    np.testing.assert_allclose(posterior.density.loc.numpy(), known.maximum_likelihood, rtol=1e-8)


# ExactLinear against dense linear algebra


def test_exact_linear_predictive():
    known = case("linear_given_theta")
    episode = known.tasks.split(0.6, seed=1)
    posterior = ExactLinear().fit(known.program, known.tasks, compile=False).adapt(episode.support)
    predictive = posterior.predict(episode.query)
    joint = predictive.log_prob(episode.query.y, joint=True)
    assert episode.query.flat_y is not None
    for i in range(known.tasks.n_tasks):
        X, y = rows_of(episode.support, i)
        X_new, y_new = rows_of(episode.query, i)
        mean, covariance = reference.predictive(X_new, X, y, MEAN, COVARIANCE, NOISE)
        n = len(y_new)
        np.testing.assert_allclose(predictive.mean[i, :n].numpy(), mean, rtol=1e-10, atol=1e-10)
        variance = predictive.variance[i, :n].numpy()
        np.testing.assert_allclose(variance, np.diag(covariance), rtol=1e-10)
        # log p(Q | S) = log p(S ∪ Q) − log p(S)
        both = reference.log_evidence(
            np.concatenate([X, X_new]), np.concatenate([y, y_new]), MEAN, COVARIANCE, NOISE
        )
        alone = reference.log_evidence(X, y, MEAN, COVARIANCE, NOISE)
        assert float(joint[i]) == pytest.approx(both - alone, rel=1e-9)


def means_problem(counts, seed=0, spread=0.8, noise=0.5):
    """One coefficient per task, known noise: the scalar model of Type-II maximum likelihood."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(counts)), counts)
    y = (1.5 + spread * rng.standard_normal(len(counts)))[task] + noise * rng.standard_normal(
        len(task)
    )
    tasks = Tasks.from_flat(np.ones((len(task), 1)), y, task, len(counts), features=["intercept"])
    means = np.array([y[task == i].mean() for i in range(len(counts))])
    return tasks, means, models.LinearRegression(noise=noise)


@pytest.mark.parametrize("counts", [(5,) * 12, (2, 5, 10, 1, 4, 7, 3, 6)])
def test_type_two_maximum_likelihood(counts):
    """Against the root of the score, to the tolerance of L-BFGS (gradient 1e-7 per row)."""
    tasks, means, model = means_problem(counts)
    fitted = ExactLinear().fit(model, tasks, compile=False)
    mean, variance, negative = reference.type_two(means, counts, 0.25)
    found = fitted.globals()
    assert float(found["mean"]) == pytest.approx(mean, abs=2e-5)
    assert float(found["scale"]) ** 2 == pytest.approx(variance, rel=2e-4)
    assert fitted.info["at_zero"] == []
    closed = type_two_maximum_likelihood(means, np.array(counts), 0.25)
    assert (closed.mean, closed.variance) == pytest.approx((mean, variance), rel=1e-9)
    # The evidence of all rows: that of the means plus what does not depend on μ and τ.
    dense = sum(
        reference.log_evidence(*rows_of(tasks, i), [mean], [[variance]], 0.5)
        for i in range(tasks.n_tasks)
    )
    assert fitted.info["log_evidence"] == pytest.approx(dense, abs=1e-6)
    assert closed.log_likelihood == pytest.approx(-negative, rel=1e-12)


def test_varying_effects_reach_the_same_maximum():
    """Non-centered with a learned noise: against a dense maximisation over (μ, log τ, log σ)."""
    counts = (3, 6, 4, 5, 2, 6, 4, 5)
    tasks, _, _ = means_problem(counts, seed=3)
    tasks = Tasks.from_flat(tasks.flat_x[:, :0], tasks.flat_y, tasks.task, tasks.n_tasks)
    fitted = ExactLinear().fit(models.VaryingEffects(), tasks, compile=False)
    each = [rows_of(tasks, i)[1] for i in range(tasks.n_tasks)]

    def objective(theta):
        mean, tau, sigma = theta[0], np.exp(theta[1]), np.exp(theta[2])
        return -sum(
            reference.log_evidence(np.ones((len(y), 1)), y, [mean], [[tau**2]], sigma) for y in each
        )

    best = optimize.minimize(objective, [1.0, 0.0, 0.0], method="Nelder-Mead", tol=1e-12)
    found = fitted.globals()
    assert float(found["mean"]) == pytest.approx(best.x[0], abs=1e-4)
    assert float(found["scale"]) == pytest.approx(np.exp(best.x[1]), rel=1e-3)
    assert float(found["noise"]) == pytest.approx(np.exp(best.x[2]), rel=1e-3)
    assert fitted.info["log_evidence"] == pytest.approx(-best.fun, abs=1e-6)


def test_zero_variance_between_tasks_is_flagged():
    tasks, means, model = means_problem((4,) * 6, seed=2, spread=0.0)
    assert reference.type_two(means, np.full(6, 4), 0.25)[1] == 0.0
    with pytest.warns(UserWarning, match="the estimate of scale is zero"):
        fitted = ExactLinear().fit(model, tasks, compile=False)
    assert fitted.info["at_zero"] == ["scale"]
    assert float(fitted.globals()["scale"]) < 0.01
    assert float(fitted.globals()["mean"]) == pytest.approx(means.mean(), abs=1e-4)
    # Every task then has the common mean.
    loc = fitted.adapt(tasks).density.loc.numpy()
    np.testing.assert_allclose(loc, means.mean(), atol=2e-3)


def test_prior_on_theta_gives_the_dense_mode():
    """prior=True: the mode of log p(y | θ) + log p(θ) over (μ, log τ), Jacobian of the log kept."""
    counts = (2, 5, 10, 1, 4, 7)
    tasks, _, _ = means_problem(counts)
    model = models.LinearRegression(noise=0.5, prior_mean_scale=0.5, prior_scale=0.3)
    fitted = ExactLinear(prior=True).fit(model, tasks, compile=False)

    def objective(theta):
        mean, tau = theta[0], np.exp(theta[1])
        evidence = sum(
            reference.log_evidence(*rows_of(tasks, i), [mean], [[tau**2]], 0.5)
            for i in range(tasks.n_tasks)
        )
        log_prior = -0.5 * (mean / 0.5) ** 2 - 0.5 * (tau / 0.3) ** 2 + theta[1]
        return -evidence - log_prior

    best = optimize.minimize(objective, [0.0, 0.0], method="Nelder-Mead", tol=1e-12)
    assert float(fitted.globals()["mean"]) == pytest.approx(best.x[0], abs=1e-4)
    assert float(fitted.globals()["scale"]) == pytest.approx(np.exp(best.x[1]), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "family"), [("bernoulli", "Bernoulli"), ("student_t", "StudentT")]
)
def test_exact_linear_refuses_other_families_by_name(name, family):
    with pytest.raises(UnsupportedModelError, match=rf"families: .*{family}") as caught:
        ExactLinear().fit(case(name).program, case(name).tasks, compile=False)
    assert "Use NUTS" in caught.value.do


@pytest.mark.parametrize("strategy", [ExactLinear(), AmortizedGuide(), MAML()])
def test_one_group_says_nothing_of_how_groups_vary(strategy):
    tasks, _, model = means_problem((6,))
    with pytest.raises(DataError, match="two groups or more"):
        strategy.fit(model, tasks, steps=2, compile=False)


# Approximations against each other

FAMILY = LinearTasks(MEAN, COVARIANCE, noise=NOISE, shots=(1, 6), queries=0)


def test_amortized_guide_reaches_the_exact_posterior():
    """Trained on 60 tasks of 6 rows: their means within 0.2 sds on average, sds within 15 %.

    The exact answer is ExactLinear's, which meets the dense one above. Loose, for a short training.
    """
    model = models.LinearRegression(MEAN, COVARIANCE, NOISE)
    tasks = replace(FAMILY, shots=6).sample(60, seed=0).support
    exact = ExactLinear().fit(model, tasks, compile=False).adapt(tasks)
    guide = AmortizedGuide(hidden=32).fit(
        model, tasks, steps=700, learning_rate=5e-3, compile="graph"
    )
    found = guide.adapt(tasks)
    distance = (found.density.loc - exact.density.loc).abs() / exact.density.sd
    ratio = (found.density.sd / exact.density.sd).log().abs()
    assert float(distance.mean()) < 0.2
    assert float(ratio.mean()) < 0.15
    assert float(found.kl(exact).median()) < 0.1


@pytest.mark.slow
def test_three_strategies_agree_on_the_same_program():
    """θ learned by each in its own way, from 40 tasks; posteriors of the same tasks compared.

    NUTS integrates θ out, the others hold it at a point: means within 0.3 sds on average, sds
    within 15 %, of each other.
    """
    tasks = replace(FAMILY, shots=5).sample(40, seed=2).support
    model = models.LinearRegression()
    exact = ExactLinear(prior=True).fit(model, tasks, compile=False)
    nuts = NUTS(draws=500, chains=4).fit(model, tasks, seed=0)
    guide = AmortizedGuide().fit(model, tasks, steps=3000, learning_rate=3e-3)
    at = exact.adapt(tasks).density
    for fitted in (nuts, guide):
        density = fitted.posterior.density
        assert float(((density.mean - at.mean) / at.sd).abs().mean()) < 0.3
        assert float((density.sd / at.sd).log().mean().abs()) < 0.15
    means = nuts.globals()["mean"].mean(0)
    np.testing.assert_allclose(exact.globals()["mean"].numpy(), means.numpy(), atol=0.1)
    np.testing.assert_allclose(guide.globals()["mean"].numpy(), means.numpy(), atol=0.15)


def test_evidence_is_the_laplace_formula_term_by_term():
    """T16: the mode, its log likelihood and log prior density, and half the log determinant."""
    X, y = np.array([(1.0, 0.0), (1.0, 1.0), (1.0, 2.0)]), np.array([0.5, 1.2, 2.8])
    start, variance = np.array([0.2, 0.8]), np.array([0.5, 0.3])
    tasks = Tasks(X[None], y[None], features=["intercept", "slope"])
    model = models.LinearRegression(tuple(start), np.diag(variance).tolist(), 0.5)
    posterior = ExactLinear().fit(model, tasks, compile=False).adapt(tasks)
    mode = posterior.density.loc[0].numpy()
    np.testing.assert_allclose(mode, (0.3883211679, 1.0802919708), atol=6e-11)
    assert float(posterior.info["log_evidence"]) == pytest.approx(-2.7943973894, abs=6e-11)
    log_likelihood = -0.5 * ((y - X @ mode) ** 2).sum() / 0.25 - 1.5 * np.log(2 * np.pi * 0.25)
    log_prior = (-0.5 * (mode - start) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)).sum()
    half = -0.5 * np.linalg.slogdet(np.diag(1 / variance) + X.T @ X / 0.25)[1]
    # log p(D) = log p(D | φ̂) + log p(φ̂) + (d/2) log 2π − ½ log det(H + Λ)
    terms = (log_likelihood, log_prior, half)
    assert terms == pytest.approx((-0.9727217057, -1.0557212511, -2.6038314991), abs=1e-9)
    assert sum(terms) + np.log(2 * np.pi) == pytest.approx(-2.7943973894, abs=1e-9)


def test_a_small_scale_under_a_wide_prior_is_not_zero():
    """τ̂ of order 1 where the prior's scale is 10⁴: against the root of the score."""
    tasks, means, _ = means_problem((5,) * 12)

    def program(x, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1e4))
        scale = pyro.sample("scale", dist.HalfNormal(1e4))
        with pyro.plate("task", len(x), dim=-2):
            phi = pyro.sample("phi", dist.Normal(mean, scale))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi, 0.5), obs=y)

    fitted = ExactLinear().fit(program, tasks, compile=False)
    _, variance, _ = reference.type_two(means, np.full(12, 5), 0.25)
    assert fitted.info["at_zero"] == []
    assert float(fitted.globals()["scale"]) ** 2 == pytest.approx(variance, rel=1e-2)
