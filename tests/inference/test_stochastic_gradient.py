"""SGLD and SGHMC: stationary variances of the recursions, mini-batches, θ, exact posteriors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import linalg

from hbmeta.curvature import log_joint
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.inference import SGHMC, SGLD
from hbmeta.inference.task_chains import TaskChains, curvature_scale
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import cases, reference

F64 = torch.float64


# The recursions: z' = A z + B ξ on a Gaussian target, whose stationary covariance is known


def linear_map(strategy, precision, variance=0.0):
    """A and the covariance of the noise of one transition at d = 1, read off `move` itself.

    The gradient is −λ z plus noise of the given variance.
    """
    size = len(strategy.start(torch.zeros(1, dtype=F64)))
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)

    def moved(state, noise, error):
        return torch.cat(strategy.move(state, -precision * state[0] + error, noise, one)).numpy()

    columns = []
    for j in range(size):
        state = tuple(one if i == j else zero for i in range(size))
        columns.append(moved(state, zero, zero))
    rest = tuple(zero for _ in range(size))
    noises = [moved(rest, one, zero), math.sqrt(variance) * moved(rest, zero, one)]
    return np.stack(columns, 1), sum(np.outer(b, b) for b in noises)


@pytest.mark.parametrize("precision", [0.3, 1.0, 2.5])
def test_sgld_has_the_variance_of_its_formula(precision):
    strategy = SGLD(step_size=0.2)
    found = linalg.solve_discrete_lyapunov(*linear_map(strategy, precision))[0, 0]
    assert found == pytest.approx(1 / (precision * (1 - 0.2 * precision / 4)), rel=1e-12)


@pytest.mark.parametrize("precision", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("step_size", "friction"), [(0.3, 1.0), (0.5, 0.2), (0.8, 1.25)])
def test_sghmc_has_the_variance_of_its_formula(precision, step_size, friction):
    strategy = SGHMC(step_size=step_size, friction=friction)
    found = linalg.solve_discrete_lyapunov(*linear_map(strategy, precision))[0, 0]
    bias = step_size**2 * precision / (4 - 2 * friction * step_size)
    assert found == pytest.approx(1 / (precision * (1 - bias)), rel=1e-12)


def test_sghmc_without_memory_is_sgld():
    a, q = linear_map(SGHMC(step_size=0.5, friction=2.0), 1.3)
    b, r = linear_map(SGLD(step_size=2 * 0.5**2), 1.3)
    assert a[0, 0] == pytest.approx(b[0, 0], rel=1e-12)
    assert a[0, 1] == 0.0
    assert q[0, 0] == pytest.approx(r[0, 0], rel=1e-12)


def test_noise_of_mini_batches_inflates_as_stated():
    step_size, precision, variance = 0.2, 1.5, 3.0
    found = linalg.solve_discrete_lyapunov(
        *linear_map(SGLD(step_size=step_size), precision, variance)
    )
    stated = (1 + step_size * variance / 4) / (precision * (1 - step_size * precision / 4))
    assert found[0, 0] == pytest.approx(stated, rel=1e-12)


# Chains on programs


def means(x, y=None, *, task, n_tasks):
    with pyro.plate("task", n_tasks):
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(phi[task], 1.0), obs=y)


def means_nested(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


def with_a_factor(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        pyro.factor("pull", -0.5 * (phi - 3.0).square())
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


def rows(counts, *, seed=0):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(counts)), counts)
    y = rng.standard_normal(len(task)) + rng.standard_normal(len(counts))[task]
    ids = [f"t{i}" for i in range(len(counts))]
    return Tasks.from_flat(np.ones((len(task), 1)), y, task, len(counts), ids=ids, features=["one"])


def exact_means(tasks):
    """Mean and sd (tasks,) of φ_i | y, and the sum of squares S² of the rows of each."""
    found = []
    for i in range(tasks.n_tasks):
        y = cases.rows_of(tasks, i)[1]
        precision = 0.25 + len(y)
        found.append((y.sum() / precision, precision**-0.5, y.var(ddof=1) if len(y) > 1 else 0.0))
    return np.array(found).T


@pytest.mark.parametrize("strategy", [SGLD(step_size=0.4), SGHMC(step_size=0.5, friction=1.0)])
def test_chains_have_the_posterior_with_the_stated_bias(strategy):
    """Mean and variance of 20 equal tasks at 40 chains, pooled in posterior sds.

    z is standard normal up to the bias; 20 × 40 × 100 draws have at least 20,000 effective ones, so
    that mean and variance have standard errors of 0.007 and 0.01; accepted within 5 of them, which
    the bias of 11 and 8 % is not (false-alarm rate 1e-6).
    """
    tasks = rows((5,) * 20)
    chosen = strategy.replaced(draws=100, warmup=100, thin=5, chains=40)
    fitted = chosen.fit(means, tasks, compile=False)
    mean, sd, _ = exact_means(tasks)
    z = (fitted.adapt(tasks, seed=1).density.phi[..., 0].numpy() - mean) / sd
    ratio = 1 / (1 - 0.4 / 4) if isinstance(strategy, SGLD) else 1 / (1 - 0.25 / (4 - 1.0))
    assert abs(z.mean()) < 0.035
    assert abs(z.var() - ratio) < 0.05
    assert ratio > 1.08


@pytest.mark.parametrize("program", [means, means_nested, with_a_factor])
def test_gradients_of_mini_batches_are_unbiased(program):
    """The mean over all mini-batches of a task, by their law, against the full gradient.

    4,000 draws of 3 rows of 7: standard error 1.6 % of the sd of one, accepted within 5.
    """
    tasks = rows((7, 2, 5, 0))
    problem = Problem(program, tasks, layout="flat" if program is means else "nested")
    batch = problem.batch(tasks)
    chains = TaskChains(problem, batch, SGLD(), rows=3, tier="eager", moves=1, seed=0)
    phi = torch.tensor([[0.5], [-1.0], [0.2], [1.5]], dtype=F64).requires_grad_()
    (position,) = chains._choose(4000)
    assert all(len(set(p.tolist())) == 3 for p in position[:50, 0])
    values = torch.vmap(lambda p: chains._estimate({}, phi, batch, p))(position)
    spread, mean = values.std(0), values.mean(0)
    exact = log_joint(problem, {}, phi, batch)
    assert bool(((mean - exact).abs() <= 5 * spread / 4000**0.5 + 1e-9).all())
    # Tasks with 3 rows or fewer have all of them; the estimate of the others varies.
    assert spread[1] < 1e-9
    assert spread[3] < 1e-9
    assert spread[0] > 0.1
    # The gradient's variance, (n²/b) S² (1 − b/n) for N(φ, 1).
    (found,) = torch.autograd.grad(values[:, 0].sum(), phi)
    assert torch.isfinite(found).all()


def test_mini_batches_inflate_the_variance_as_stated():
    """Variance ratios of 8 tasks at 60 chains against (1 + εV/4) / (1 − ε/4), λ = 1.

    V = (n²/b) S² (1 − b/n) d² with d² = 1/(n + ¼); 60 × 100 draws of each task with 3,000 effective
    ones: standard error 2.6 %, accepted within 13 %, 5 of them, beside an inflation of 30 % or so.
    """
    tasks, step_size, b = rows((20,) * 8), 0.4, 4
    strategy = SGLD(step_size=step_size, draws=100, warmup=100, thin=5, chains=60, rows=b)
    posterior = strategy.fit(means, tasks, compile=False).adapt(tasks, seed=2)
    mean, sd, s2 = exact_means(tasks)
    z = (posterior.density.phi[..., 0].numpy() - mean) / sd
    variance = (20**2 / b) * s2 * (1 - b / 20) * sd**2
    stated = (1 + step_size * variance / 4) / (1 - step_size / 4)
    assert stated.min() > 1.3
    np.testing.assert_allclose(z.var(0), stated, rtol=0.13)
    assert np.abs(z.mean(0)).max() < 0.2


def test_curvature_scale_makes_the_largest_curvature_one():
    """Every diagonal entry alike, then all divided by the largest eigenvalue that is left."""
    precision = torch.tensor([[4.0, 0.5, 0.0], [0.5, 0.25, 0.1], [0.0, 0.1, 9.0]], dtype=F64)

    def function(phi):
        return -0.5 * ((phi @ precision) * phi).sum(-1)

    found = curvature_scale(function, torch.zeros(2, 3, dtype=F64))
    assert bool((found[0] == found[1]).all())
    white = found[0].unsqueeze(-1) * precision * found[0]
    assert float(torch.linalg.eigvalsh(white)[-1]) == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(white.diagonal(), white[0, 0].expand(3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [20, 50])
def test_correlated_entries_do_not_make_a_step_unstable(size):
    """H = I + c 11ᵀ: λ is nearly p, by eigenvalues or, above 32 entries, power iterations."""

    def function(phi):
        return -0.5 * (phi.square().sum(-1) + 33.0 * phi.sum(-1).square())

    d = curvature_scale(function, torch.zeros(2, size, dtype=F64))[0]
    white = d.unsqueeze(-1) * (torch.eye(size) + 33.0 * torch.ones(size, size)) * d
    assert float(torch.linalg.eigvalsh(white)[-1]) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("strategy", "size"), [(SGLD(step_size=0.4), 20), (SGHMC(step_size=0.5), 50)]
)
@pytest.mark.filterwarnings("ignore:SG.*split R̂")
def test_the_stated_bias_is_that_of_correlated_posteriors_too(strategy, size):
    """w ~ N(0, I), three rows of y ~ N(Σ_j w_j, 0.3²): precision 3 / 0.3² + 1/p of the sum.

    60 chains × 80 draws, 10 transitions or two correlation times apart, have at least 2,000
    effective ones: the sd of the sum is known to 1.6 %, and accepted within 5 % of the biased one,
    1.054 (SGLD) and 1.043 times the exact. Other directions take longer.
    """

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(w.sum(-1), 0.3), obs=y)

    tasks = Tasks(np.zeros((1, 3, 1)), [[0.4, 0.9, 1.3]])
    chosen = strategy.replaced(draws=80, warmup=200, thin=10, chains=60)
    found = chosen.fit(program, tasks, compile=False).adapt(tasks, seed=1)
    sums = found.density.phi.sum(-1)
    bias = 0.4 / 4 if isinstance(strategy, SGLD) else 0.25 / (4 - 2 * 0.5)
    exact = (3 / 0.09 + 1 / size) ** -0.5
    assert float(sums.std()) == pytest.approx(exact * (1 - bias) ** -0.5, rel=0.05)


def test_steps_without_a_stationary_law_are_refused():
    """ελ ≥ 4: z' = (1 − ελ/2) z + … doubles and doubles again, and stays finite."""
    tasks = rows((5, 4))
    fitted = SGLD(step_size=4.5, draws=20, warmup=10).fit(means, tasks, compile=False)
    with pytest.raises(ConvergenceError, match=r"draws of task 't.' up to .*Lower step_size"):
        fitted.adapt(tasks)


def test_curvature_scale_of_many_parameters_is_estimated():
    """Exact for a diagonal H, whatever the signs; a flat function has scale 1."""
    curvature = torch.linspace(1, 5, 40, dtype=F64)
    found = curvature_scale(
        lambda p: -0.5 * (curvature * p.square()).sum(-1), torch.ones(3, 40, dtype=F64)
    )
    torch.testing.assert_close(found, curvature.rsqrt().expand(3, 40), rtol=1e-12, atol=0)
    flat = curvature_scale(lambda p: 0.0 * p.sum(-1), torch.ones(3, 40, dtype=F64))
    assert bool((flat == 1).all())


# θ


def effects(x, y=None, *, task, n_tasks):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(10.0))
    with pyro.plate("task", n_tasks):
        phi = pyro.sample("phi", dist.Normal(mu, tau))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(phi[task], 1.0), obs=y)


def test_theta_is_the_maximum_of_the_marginal_posterior():
    """Against the maximum of log p(y | μ, log τ) + log p(μ) + log p(log τ) found by quadrature-free
    closed form: ȳ_i ~ N(μ, τ² + 1/n_i).

    The learning rate falls to zero, and with it the noise of θ; what is left is the chains' bias at
    ε = 0.05, about 1 % of the variance of φ given y.
    """
    tasks = rows((4, 6, 3, 8, 5, 4, 7, 5, 6, 4), seed=3)
    fitted = SGLD(step_size=0.05, chains=8, draws=50, warmup=200).fit(
        effects, tasks, steps=1000, compile="graph", seed=0
    )
    y = np.array([cases.rows_of(tasks, i)[1].mean() for i in range(10)])
    n = tasks.counts.numpy()

    def negative(at):
        v = np.exp(2 * at[1]) + 1 / n
        fit = 0.5 * ((y - at[0]) ** 2 / v + np.log(v)).sum()
        prior = 0.5 * (at[0] / 10) ** 2 + 0.5 * (np.exp(at[1]) / 10) ** 2 - at[1]
        return fit + prior

    best = reference.optimize.minimize(negative, [0.0, 0.0], method="BFGS", tol=1e-10).x
    found = fitted.globals()
    assert float(found["mu"]) == pytest.approx(best[0], abs=0.05)
    assert float(found["tau"]) == pytest.approx(math.exp(best[1]), rel=0.06)
    assert len(fitted.history) == 1000


def test_parameters_without_a_prior_are_learned():
    case = cases.case("module_parameters")
    fitted = SGLD(chains=2, draws=4, warmup=4).fit(
        case.program, case.tasks, steps=600, learning_rate=0.02, compile="graph"
    )
    # Drawn with weight 1, bend −0.5 and noise 0.3.
    assert float(fitted.theta["weight"]) == pytest.approx(1.0, abs=0.25)
    assert float(fitted.theta["bend"]) == pytest.approx(-0.5, abs=0.25)


# What is given back, and what is refused


@pytest.mark.parametrize("strategy", [SGLD, SGHMC])
@pytest.mark.filterwarnings("ignore:SG.*split R̂")
def test_the_posterior_holds_chains_and_what_they_are_worth(strategy):
    tasks = rows((5, 4, 0))
    fitted = strategy(draws=20, warmup=20, thin=4, chains=3).fit(means, tasks, compile=False)
    posterior = fitted.adapt(tasks, seed=0)
    assert posterior.density.phi.shape == (60, 3, 1)
    assert posterior.chains == 3
    assert posterior.info["r_hat"].shape == (3, 1)
    assert posterior.info["ess_bulk"].shape == (3, 1)
    again = fitted.adapt(tasks, seed=0)
    assert torch.equal(again.density.phi, posterior.density.phi)
    assert not torch.equal(fitted.adapt(tasks, seed=1).density.phi, posterior.density.phi)


def test_chains_that_did_not_mix_are_warned_of_by_task():
    tasks = rows((5, 4))
    strategy = SGLD(step_size=1e-6, draws=20, warmup=1, thin=1, chains=4)
    fitted = strategy.fit(means, tasks, compile=False)
    with pytest.warns(UserWarning, match=r"SGLD: split R̂ of task 't.' is .* \(above 1.05"):
        fitted.adapt(tasks)


def test_mini_batches_want_independent_points():
    case = cases.case("gaussian_process")
    with pytest.raises(UnsupportedModelError, match="points that are independent given φ"):
        SGLD(rows=3).fit(case.program, case.tasks, compile=False)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"tasks_per_step": 2}, "tasks_per_step"),
        ({"checkpoint": "somewhere"}, "a checkpoint, which holds no chains"),
    ],
)
def test_tasks_must_stay(arguments, found):
    with pytest.raises(DataError, match=found):
        SGLD().fit(effects, rows((5, 4, 3)), compile=False, **arguments)
