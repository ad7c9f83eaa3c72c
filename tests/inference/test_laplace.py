"""Laplace where it is exact, its evidence and its derivative, damping, and softened points."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from scipy import integrate, optimize, stats

import hbmeta as hb
from hbmeta import models
from hbmeta.errors import CurvatureError, DataError, UnsupportedModelError
from hbmeta.inference import (
    MAML,
    AmortizedGuide,
    CompletePooling,
    ExactLinear,
    ImplicitMAML,
    Laplace,
    NoPooling,
    laplace,
)
from hbmeta.laplace_evidence import evidence_at, total_evidence
from hbmeta.modes import find_modes
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from hbmeta.theory import implied_prior_precision
from hbmeta.training import Options
from tests import cases
from tests.cases import SCHOOLS_SIGMA, SCHOOLS_Y, case, rows_of


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def fit(strategy, name, **arguments):
    return strategy.fit(case(name).program, case(name).tasks, **{"compile": False, **arguments})


# Linear-Gaussian programs: posterior and evidence are exact


@pytest.mark.parametrize("curvature", ["exact", "ggn"])
@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_nested", "linear_own_flat"])
def test_linear_gaussian_is_exact(name, curvature):
    known = case(name)
    posterior = fit(Laplace(curvature), name).posterior
    mean, sd = known.posterior
    np.testing.assert_allclose(posterior.density.loc.numpy(), mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(posterior.density.sd.numpy(), sd, rtol=1e-9)
    np.testing.assert_allclose(posterior.info["log_evidence"], known.log_evidence, rtol=1e-9)
    closed = fit(ExactLinear(), name).posterior.density
    torch.testing.assert_close(posterior.density.covariance, closed.covariance, rtol=1e-9, atol=0)
    assert bool(posterior.info["met"].all() and posterior.info["positive"].all())
    assert float(posterior.info["damping"].abs().max()) == 0.0


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("name", ["two_coefficients", "varying_intercepts"])
def test_theta_is_that_of_the_exact_evidence(name, prior):
    """L-BFGS stops at gradients of 1e-7 per row; θ̂ is known to about the root of that."""
    found, known = (fit(s(prior=prior), name) for s in (Laplace, ExactLinear))
    assert found.info["log_evidence"] == pytest.approx(known.info["log_evidence"], abs=1e-8)
    for site, value in known.globals().items():
        torch.testing.assert_close(found.globals()[site], value, rtol=1e-4, atol=1e-4)


def test_evidence_of_one_regression():
    """X, y, θ₀ and the parts of log p(y) of one task, computed elsewhere."""
    x = tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]])
    tasks = Tasks(x, tensor([[0.5, 1.2, 2.8]]))
    model = models.LinearRegression((0.2, 0.8), ((0.5, 0.0), (0.0, 0.3)), 0.5)
    posterior = Laplace().fit(model, tasks, compile=False).posterior
    mode = posterior.density.loc
    torch.testing.assert_close(mode, tensor([[0.3883211679, 1.0802919708]]), rtol=0, atol=1e-9)
    evidence = float(posterior.info["log_evidence"])
    assert evidence == pytest.approx(-2.7943973894, abs=1e-9)
    problem, batch = posterior.problem, posterior.problem.batch(tasks)
    likelihood, prior, _ = problem.terms({}, mode, batch)
    volume = 0.5 * 2 * math.log(2 * math.pi) + float(posterior.density.scale[0].logdet())
    assert float(likelihood) == pytest.approx(-0.9727217057, abs=1e-9)
    assert float(likelihood + prior) + volume == pytest.approx(evidence, abs=1e-9)


# Centered eight schools: the joint mode of θ and φ does not exist


def marginal_mode():
    """(μ, τ) at the maximum of log p(y, μ, log τ), φ integrated out by hand."""
    y, sigma = np.array(SCHOOLS_Y), np.array(SCHOOLS_SIGMA)

    def minus(at):
        mu, tau = at[0], np.exp(at[1])
        value = stats.norm(mu, np.hypot(sigma, tau)).logpdf(y).sum()
        value += stats.norm(0, 5).logpdf(mu) + stats.halfcauchy(scale=5).logpdf(tau) + at[1]
        return -value

    found = optimize.minimize(minus, [4.0, 1.0], method="Nelder-Mead",
                              options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 5000})  # fmt: skip
    return found.x[0], np.exp(found.x[1])


@pytest.mark.parametrize("name", ["eight_schools", "eight_schools_centered"])
def test_eight_schools_do_not_collapse(name):
    """τ̂ = 3.63 in either parametrisation; Nelder–Mead knows it to about 1e-7."""
    found = fit(Laplace(), name)
    values = found.globals()
    mu, tau = marginal_mode()
    assert tau == pytest.approx(3.6336, abs=1e-4)
    assert float(values["tau"]) == pytest.approx(tau, rel=1e-5)
    assert float(values["mu"]) == pytest.approx(mu, rel=1e-5)
    posterior = found.posterior
    # φ given θ̂ in closed form: precision 1/σ² + 1/τ².
    y, sigma = np.array(SCHOOLS_Y), np.array(SCHOOLS_SIGMA)
    precision = 1 / sigma**2 + 1 / tau**2
    mean, sd = posterior.moments()["effect"]
    np.testing.assert_allclose(mean, (y / sigma**2 + mu / tau**2) / precision, rtol=1e-4)
    np.testing.assert_allclose(sd, precision**-0.5, rtol=1e-4)


def test_joint_mode_of_centered_eight_schools_is_a_trap(untouched):
    """Pyro's Laplace approximation climbs the joint density of θ and φ, which has no maximum: with

    all effects at μ it grows as τ^−7 (log τ for the Jacobian). Ours holds θ at the marginal mode.
    """
    tasks = case("eight_schools_centered").tasks
    with untouched(), torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        guide = AutoLaplaceApproximation(cases.eight_schools_centered)
        svi = SVI(cases.eight_schools_centered, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(1200):
            svi.step(tasks.x, tasks.y)
        # (μ, log τ, effects), as Pyro lays them out.
        collapsed = float(guide.loc[1].detach().exp())
    assert collapsed < 0.1
    ours = float(fit(Laplace(), "eight_schools_centered").globals()["tau"])
    assert 3.62 < ours < 3.64


# One-parameter programs: the value by SciPy, and how close it is to the integral


@pytest.mark.parametrize("name", ["poisson_offset", "bernoulli"])
def test_evidence_of_one_parameter(name):
    """Laplace's value exactly; within 0.05 nats of log p(y_i), its own error on so few rows."""
    fitted = fit(Laplace(), name)
    found = fitted.posterior.info["log_evidence"]
    values = {key: float(v) for key, v in fitted.globals().items()}
    for i in range(fitted.tasks.n_tasks):
        x, y = rows_of(fitted.tasks, i)
        shift = values.get("fixed", 0.0) * x[:, 0] if name == "bernoulli" else x[:, 0]

        def f(z, x=x, y=y, shift=shift):
            eta = values["mean"] + values["scale"] * z + shift
            if name == "poisson_offset":
                return stats.poisson(np.exp(eta)).logpmf(y).sum() + stats.norm.logpdf(z)
            return (y * eta - np.log1p(np.exp(eta))).sum() + stats.norm.logpdf(z)

        mode = optimize.minimize_scalar(lambda z, f=f: -f(z), bracket=(-1, 1), tol=1e-12).x
        for _ in range(3):  # a bracket knows a mode to half the digits; Newton's steps to all
            eta = values["mean"] + values["scale"] * mode + shift
            p = 1 / (1 + np.exp(-eta))
            rate = np.exp(eta) if name == "poisson_offset" else p
            weights = rate if name == "poisson_offset" else p * (1 - p)
            precision = 1 + values["scale"] ** 2 * weights.sum()
            mode += (values["scale"] * (y - rate).sum() - mode) / precision
        expected = f(mode) + 0.5 * np.log(2 * np.pi / precision)
        assert float(found[i]) == pytest.approx(expected, abs=1e-9)
        top = f(mode)
        integral = integrate.quad(lambda z, f=f, top=top: np.exp(f(z) - top), -9, 9)[0]
        assert float(found[i]) == pytest.approx(top + math.log(integral), abs=0.05)


# The total derivative of the evidence


def differences(function, theta, direction, width):
    """d/dt function(θ + t direction) at 0, by differences of fourth order."""

    def at(t):
        return float(function({n: v + t * direction[n] for n, v in theta.items()}))

    near, far = ((at(k * width) - at(-k * width)) for k in (1, 2))
    return (8 * near - far) / (12 * width)


@pytest.mark.parametrize("curvature", ["exact", "ggn", "diagonal"])
@pytest.mark.parametrize("name", ["poisson_offset", "student_t", "neural_zero_learned"])
def test_derivative_of_the_evidence_is_total(name, curvature):
    if name == "neural_zero_learned":
        tasks = case("neural_zero").tasks
        program = models.NeuralRegression((2,), noise=0.3, activation="tanh", prior_scale="learned")
        problem = Problem(program.bind(tasks), tasks)
    else:
        tasks = case(name).tasks
        program = case(name).program.bind(tasks)
        problem = Problem(program, tasks)
    batch = problem.batch(tasks)
    start = problem.theta(batch)
    theta = {n: v + 0.2 * normal(*v.shape, seed=1) for n, v in start.items()}
    direction = {n: normal(*v.shape, seed=2) for n, v in start.items()}
    none = torch.zeros(batch.n_tasks, dtype=torch.float64)
    at = find_modes(problem, theta, batch, problem.location(theta, batch), tolerance=1e-14)
    assert bool(at.met.all())

    def value(moved):
        modes = find_modes(problem, moved, batch, at.point, tolerance=1e-14).point
        found = evidence_at(problem, moved, modes, batch, none, curvature, create_graph=False)
        return found.sum().detach()

    def slope(function):
        leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}
        total = function(problem, leaves, at.point, batch, none, curvature).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return sum(
            float((g * direction[n]).sum())
            for n, g in zip(leaves, gradients, strict=True)
            if g is not None
        )

    expected = differences(value, theta, direction, 1e-3)
    assert slope(total_evidence) == pytest.approx(expected, rel=1e-6, abs=1e-7)
    # As if the modes stood still it is another number, unless Λ is the same at every φ, as the
    # information of a location is.
    still = abs(slope(evidence_at) - expected)
    assert (still < 1e-6) if name == "student_t" and curvature != "exact" else (still > 1e-3)


@pytest.mark.parametrize("curvature", ["ggn", "kronecker"])
def test_derivative_of_the_evidence_of_networks(curvature, monkeypatch):
    """By conjugate gradients; its residual of 1e-9 and differences of 1e-2 leave about 1e-6."""
    monkeypatch.setattr(laplace, "_WHILE_TRAINING", 1e-9)
    monkeypatch.setattr(laplace, "_STEPS_WHILE_TRAINING", 60)
    tasks = case("neural_regression").tasks[:2]
    program = models.NeuralRegression((8, 8), noise=0.3, activation="tanh", prior_scale="learned")
    problem = Problem(program.bind(tasks), tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    direction = {n: normal(*v.shape, seed=2) for n, v in theta.items()}
    strategy = Laplace(curvature)
    leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}
    loss = strategy.loss(problem, leaves, None, batch, batch, {}).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = sum(float((g * direction[n]).sum()) for n, g in zip(leaves, gradients, strict=True))

    def value(moved):
        return strategy.loss(problem, moved, None, batch, batch, {}).sum()

    expected = differences(value, theta, direction, 1e-2)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("curvature", ["ggn", "kronecker"])
def test_evidence_of_many_coefficients_is_exact(curvature, monkeypatch):
    """A network without hidden layers is linear: −log N(y; X̄θ, X̄ S X̄ᵀ + σ² I), and its gradient.

    81 parameters, so that the mode is found without a Hessian and differentiated through by
    conjugate gradients; Kronecker factors are exact for one linear layer.
    """
    monkeypatch.setattr(laplace, "_WHILE_TRAINING", 1e-10)
    monkeypatch.setattr(laplace, "_STEPS_WHILE_TRAINING", 60)
    tasks = Tasks(normal(3, 6, 80, seed=1), normal(3, 6, seed=2))
    program = models.NeuralRegression((), noise=0.4, prior_scale="learned")
    problem = Problem(program.bind(tasks), tasks)
    batch = problem.batch(tasks)
    theta = {n: v + 0.1 * normal(*v.shape, seed=3) for n, v in problem.theta(batch).items()}
    leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}
    found = Laplace(curvature).loss(problem, leaves, None, batch, batch, {})
    gradients = torch.autograd.grad(found.sum(), list(leaves.values()))
    same = {n: v.clone().requires_grad_() for n, v in theta.items()}
    x = torch.cat([tasks.x, torch.ones(3, 6, 1, dtype=torch.float64)], -1)
    mean = torch.cat([same["mean.layer1.weight"][0], same["mean.layer1.bias"]])
    scales = [same[f"log_scale.layer1.{part}"].exp() for part in ("weight", "bias")]
    variance = torch.cat([scales[0].square().expand(80), scales[1].square().expand(1)])
    marginal = torch.distributions.MultivariateNormal(
        x @ mean, (x * variance) @ x.mT + 0.16 * torch.eye(6, dtype=torch.float64)
    )
    expected = -marginal.log_prob(tasks.y)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected.sum(), list(same.values()))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_pieces_have_the_gradient_of_the_loss():
    """In training the same numbers come in staged pieces; inner tolerances of 1e-3 leave 1e-2."""
    tasks = case("neural_regression").tasks
    program = models.NeuralRegression((8, 8), noise=0.3, activation="tanh").bind(tasks)
    problem = Problem(program, tasks)
    batch, strategy = problem.batch(tasks), Laplace("ggn")
    theta = problem.theta(batch)
    pieces = strategy.meta_gradient(problem, None, Options(steps=2, tier="eager"))
    value, gradient = pieces(theta, {}, batch, batch, {})
    leaves = {n: v.clone().requires_grad_() for n, v in theta.items()}
    loss = strategy.loss(problem, leaves, None, batch, batch, {}).mean()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert float(value) == pytest.approx(loss.item(), rel=1e-4)
    for name, wanted in zip(leaves, expected, strict=True):
        found = gradient[f"theta/{name}"]
        assert float((found - wanted).norm()) < 1e-2 * float(wanted.norm())


# Modes, damping, empty supports


def squared(x, y=None):
    """y ~ N(φ², ½²): two modes, and at φ = 0 a curvature of the wrong sign where y is positive."""
    with pyro.plate("task", x.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(level**2, 0.5), obs=y)


def squares():
    return Tasks(torch.zeros(3, 2, 1).double(), tensor([[2.0, 2.2], [0.05, -0.04], [1.0, 1.3]]),
                 ids=["a", "b", "c"])  # fmt: skip


def test_a_start_at_a_kink_is_no_mode():
    """y ~ N(relu φ, 0.5²), φ ~ N(μ, 1), μ ~ N(0, 2²) starts at φ = 0, where relu' is taken as 0."""

    def program(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(z.relu(), 0.5), obs=y)

    tasks = squares()
    fitted = Laplace().fit(program, tasks, compile=False)
    assert fitted.info["modes_missed"] == []
    mu = float(fitted.theta["mu"])
    # On the side of the data, φ̂ (1 + n/s²) = μ + Σ y / s², n = 2.
    expected = (mu + tasks.y.sum(-1) / 0.25) / 9.0
    torch.testing.assert_close(fitted.adapt(tasks).density.loc[:, 0], expected)
    assert mu > 0.3


def at_zero():
    """Points φ = 0, where MAML without steps leaves them."""
    return MAML(steps=0).fit(squared, squares(), steps=1, compile=False)


def test_damping_is_chosen_and_said():
    fitted = at_zero()
    softened = Laplace.soften(fitted, curvature="exact")
    with pytest.warns(UserWarning, match=r"2 of 3 tasks is not positive.*worst of task 'a'.*ggn"):
        posterior = softened.adapt(squares())
    # −f'' = ¼ − 2 Σ y / ½² at 0, f = −(y − φ²)² / (2 · ½²) − φ²/8.
    curvature = 0.25 - 8 * squares().y.sum(-1)
    positive = curvature > 0
    assert posterior.info["positive"].tolist() == positive.tolist() == [False, True, False]
    # Bent the wrong way, φ gets the variance of the prior, 2²; else its own.
    expected = torch.where(positive, curvature.rsqrt(), torch.full_like(curvature, 2.0))
    torch.testing.assert_close(posterior.density.sd[:, 0], expected)
    torch.testing.assert_close(
        posterior.info["damping"], torch.where(positive, 0.0 * curvature, 0.25 - curvature)
    )


def test_damping_of_zero_raises_and_gauss_newton_needs_none():
    fitted = at_zero()
    with pytest.raises(CurvatureError, match=r"eigenvalue -33.4 of task 'a'.*curvature=\"ggn\""):
        Laplace.soften(fitted, curvature="exact", damping=0.0).adapt(squares())
    posterior = Laplace.soften(fitted, curvature="ggn", damping=0.0).adapt(squares())
    # At φ = 0 the mean of y does not move with φ: the prior is left.
    torch.testing.assert_close(posterior.density.sd[:, 0], tensor([2.0, 2.0, 2.0]))
    given = Laplace.soften(fitted, curvature="ggn", damping=0.75).adapt(squares())
    torch.testing.assert_close(given.density.sd[:, 0], tensor([1.0, 1.0, 1.0]))


def test_a_search_for_a_mode_leaves_the_saddle_and_one_that_ends_early_is_said():
    tasks = squares()
    posterior = Laplace().fit(squared, tasks, compile=False).posterior
    phi = posterior.density.loc[:, 0]
    # f' = 0: 8 φ Σ (y − φ²) − φ / 4 = 0, so that φ² = mean y − 1/64.
    expected = (tasks.y.mean(-1) - 1 / 64).clamp_min(0).sqrt()
    torch.testing.assert_close(phi.abs(), expected, rtol=1e-9, atol=1e-9)
    with pytest.warns(UserWarning, match="above its tolerance for 2 of 3 tasks"):
        early = Laplace().fit(squared, tasks, compile=False).adapt(tasks, iterations=1, damping=1e3)
    assert early.info["met"].tolist() == [False, True, False]


@pytest.mark.parametrize("curvature", ["exact", "ggn", "diagonal"])
def test_no_rows_give_the_prior_and_the_order_of_rows_does_not_matter(curvature):
    name = "bernoulli"
    tasks, fitted = case(name).tasks, fit(Laplace(curvature), name)
    empty = fitted.adapt(tasks.keep(tasks.task != 0))
    assert float(empty.density.loc[0].abs()) == 0.0
    torch.testing.assert_close(empty.density.sd[0], tensor([1.0]), rtol=1e-12, atol=0)
    assert float(empty.info["log_evidence"][0]) == pytest.approx(0.0, abs=1e-12)
    turned = Tasks.from_flat(
        tasks.flat_x.flip(0), tasks.flat_y.flip(0), tasks.task.flip(0), tasks.n_tasks,
        ids=tasks.ids, features=tasks.features,
    )  # fmt: skip
    one, other = (fitted.adapt(t).density for t in (tasks, turned))
    torch.testing.assert_close(one.loc, other.loc, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-9, atol=0)
    torch.testing.assert_close(empty.density.loc[1:], one.loc[1:], rtol=1e-9, atol=1e-12)


def test_a_flat_prior_without_rows_has_no_posterior():
    tasks = case("class_conditional").tasks
    fitted = Laplace().fit(models.ClassConditional(None, 3), tasks, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CurvatureError, match="task 't0': no rows, and"):
            fitted.adapt(tasks.keep(tasks.task != 0))


def test_save_and_load(tmp_path):
    fitted = fit(Laplace("ggn", damping=0.5), "poisson_offset")
    fitted.save(tmp_path / "fit")
    loaded = hb.load(tmp_path / "fit")
    assert loaded.strategy == fitted.strategy
    one, other = (f.adapt(case("poisson_offset").tasks) for f in (fitted, loaded))
    assert torch.equal(one.density.scale, other.density.scale)
    assert torch.equal(one.info["damping"], torch.full((5,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"curvature": "hessian"}, "'hessian'"),
        ({"damping": -1.0}, "-1.0"),
        ({"damping": True}, "True"),
        ({"tolerance": 0.0}, "0.0"),
        ({"iterations": 2.5}, "2.5"),
        ({"sites": ("layer3",)}, "curvature='exact'"),
    ],
)
def test_settings(settings, found):
    with pytest.raises(DataError) as caught:
        Laplace(**settings)
    assert found in caught.value.found


# Softened points


ALPHA, STEPS = 0.01, 5
SOFT_X = tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, -1.0]]])
SOFT_Y = tensor([[0.5, 1.2, 2.8, -0.7]])


def softened_regression(strategy, **options):
    tasks = Tasks(SOFT_X.expand(2, -1, -1), SOFT_Y.expand(2, -1))
    model = models.LinearRegression((0.2, -0.1), ((1.0, 0.3), (0.3, 0.5)), 0.5)
    fitted = strategy.fit(model, tasks, steps=1, learning_rate=0, compile=False)
    return Laplace.soften(fitted, **options).adapt(tasks).density


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_softened_maml_is_the_posterior_under_the_prior_that_it_implies(reduction):
    """Five steps from θ₀ are the mode under N(θ₀, P⁻¹): then q is the posterior under it."""
    density = softened_regression(
        MAML(steps=STEPS, step_size=ALPHA, reduction=reduction), prior="implied"
    )
    hessian = (SOFT_X[0].T @ SOFT_X[0] / 0.25).double()
    step = ALPHA if reduction == "sum" else ALPHA / 4
    prior = implied_prior_precision(hessian, step, STEPS)
    covariance = torch.linalg.inv(hessian + prior)
    start = tensor([0.2, -0.1])
    mean = covariance @ (SOFT_X[0].T @ SOFT_Y[0] / 0.25 + prior @ start)
    torch.testing.assert_close(density.loc[1], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(density.covariance[1], covariance, rtol=1e-9, atol=1e-12)
    if reduction == "sum":
        known = tensor([0.50884352, 0.804299776])
        torch.testing.assert_close(density.loc[0], known, rtol=0, atol=1e-8)


def test_softened_implicit_maml_has_its_damping_as_prior():
    strategy = ImplicitMAML(damping=2.0, tolerance=1e-10, steps=50)
    density = softened_regression(strategy, prior="implied")
    hessian = SOFT_X[0].T @ SOFT_X[0] / 0.25
    covariance = torch.linalg.inv(hessian + 4 * 2.0 * torch.eye(2).double())
    torch.testing.assert_close(density.covariance[0], covariance, rtol=1e-9, atol=1e-12)


def test_softened_at_the_mode_is_the_exact_posterior():
    density = softened_regression(MAML(steps=2, step_size=ALPHA), move=True)
    prior = torch.linalg.inv(tensor([[1.0, 0.3], [0.3, 0.5]]))
    hessian = SOFT_X[0].T @ SOFT_X[0] / 0.25
    covariance = torch.linalg.inv(hessian + prior)
    mean = covariance @ (SOFT_X[0].T @ SOFT_Y[0] / 0.25 + prior @ tensor([0.2, -0.1]))
    torch.testing.assert_close(density.loc[0], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(density.covariance[0], covariance, rtol=1e-9, atol=1e-12)


def test_implied_prior_of_a_network_is_low_rank_and_the_same():
    """97 weights, 5 to 7 points: eigenvectors of the rows alone, against all of them."""
    tasks = case("neural_regression").tasks
    model = models.NeuralRegression((8, 8), noise=0.3, activation="tanh")
    fitted = MAML(steps=3, step_size=0.002).fit(model, tasks, steps=2, compile=False)
    posterior = Laplace.soften(fitted, prior="implied").adapt(tasks)
    density, problem = posterior.density, fitted.problem
    assert torch.equal(density.centre, fitted.adapt(tasks).density.loc)
    batch = problem.batch(tasks)
    phi = density.centre

    def mean(vector):
        whole = torch.cat([vector[None], phi[1:]])
        return problem.response(fitted.theta, problem.sites.from_vector(whole), batch).mean[0]

    n = int(batch.counts[0])
    rows = torch.func.jacrev(mean)(phi[0])[:n] / 0.3
    hessian = rows.T @ rows
    hessian = 0.5 * (hessian + hessian.T)
    prior = implied_prior_precision(hessian, 0.002 / n, 3)
    truth = torch.distributions.MultivariateNormal(phi[0], precision_matrix=hessian + prior)
    at = phi + 0.05 * normal(2, *phi.shape)
    torch.testing.assert_close(
        density.log_prob(at)[:, 0], truth.log_prob(at[:, 0]), rtol=1e-7, atol=1e-7
    )


def test_steps_too_long_for_a_prior_are_refused():
    with pytest.raises(CurvatureError, match=r"2\.89 in task"):
        softened_regression(MAML(steps=5, step_size=0.1, reduction="sum"), prior="implied")
    with pytest.raises(UnsupportedModelError, match="optimizer='adam'"):
        softened_regression(MAML(steps=5, optimizer="adam"), prior="implied")


@pytest.mark.parametrize("strategy", [NoPooling(), CompletePooling(), MAML(steps=2)])
def test_softened_fits_are_saved_and_overridden(strategy, tmp_path):
    name = "varying_intercepts"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = fit(strategy, name, steps=2)
        soft = Laplace.soften(fitted)
        soft.save(tmp_path / "fit")
        loaded = hb.load(tmp_path / "fit")
        one, other = soft.posterior.density, loaded.posterior.density
        assert torch.equal(one.loc, fitted.posterior.density.loc)
        assert torch.equal(one.scale, other.scale)
        assert loaded.strategy.base == strategy
        new = loaded.adapt(case(name).tasks)
        torch.testing.assert_close(new.density.scale, one.scale, rtol=1e-6, atol=0)
        if isinstance(strategy, MAML):
            further = loaded.adapt(case(name).tasks, steps=9, damping=0.5)
            wanted = fitted.adapt(case(name).tasks, steps=9).density.loc
            assert torch.equal(further.density.loc, wanted)
            assert bool((further.density.sd < new.density.sd).all())
    assert soft.theta.keys() == fitted.theta.keys()
    assert all(torch.equal(soft.theta[k], fitted.theta[k]) for k in fitted.theta)


@pytest.mark.parametrize("curvature", ["ggn", "kronecker", "diagonal", "last_layer"])
def test_softened_networks_predict_and_are_saved(curvature, tmp_path):
    tasks = case("neural_regression").tasks
    model = models.NeuralRegression((8, 8), noise=0.3)
    fitted = MAML(steps=2).fit(model, tasks, steps=2, compile=False)
    soft = Laplace.soften(fitted, curvature=curvature)
    posterior = soft.adapt(tasks)
    predictive, plain = posterior.predict(tasks, draws=400), fitted.adapt(tasks).predict(tasks)
    assert bool((predictive.variance > plain.variance)[tasks.mask].all())
    soft.save(tmp_path / "fit")
    loaded = hb.load(tmp_path / "fit").adapt(tasks)
    for name, value in vars(posterior.density).items():
        assert torch.equal(value, getattr(loaded.density, name)), name


def test_what_has_a_spread_is_not_softened():
    fitted = fit(AmortizedGuide(hidden=8), "linear_given_theta", steps=2)
    with pytest.raises(UnsupportedModelError, match="whose posterior is Gaussian"):
        Laplace.soften(fitted)
    soft = Laplace.soften(fit(MAML(steps=1), "linear_given_theta", steps=1))
    with pytest.raises(UnsupportedModelError, match="Softened"):
        Laplace.soften(soft)
