"""PACBayes: the bound's minimiser where it is known, its gradient, and what may be certified."""

import functools
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from scipy.optimize import minimize
from torch import nn

import hbmeta as hb
from hbmeta import bounds, models, tasks
from hbmeta.bounds.objectives import objective
from hbmeta.certification import FiniteHyperprior, GaussianHyperprior
from hbmeta.certification.one_task import certify_task
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import PACBayes
from hbmeta.inference.bound_problem import BoundProblem
from hbmeta.problem import Problem
from hbmeta.tasks import Episode, Tasks
from hbmeta.training import Options
from hbmeta.variational.noise import matched_noise
from tests import fits
from tests.cases import case

slow = pytest.mark.slow
SQUARED = {"loss": "truncated-squared", "scale": 2.0}


class Levels(PyroModule):
    """φ_i ~ N(θ, 1), y_ij ~ N(φ_i, 1), θ a parameter."""

    def __init__(self, start=0.0):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(start))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.level, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi + 0.0 * x[..., 0], 1.0), obs=y)


@functools.cache
def levels(n_tasks=6, points=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    y = 1.5 + 0.5 * normal(n_tasks, 1) + normal(n_tasks, points)
    return Tasks(torch.zeros(n_tasks, points, 1, dtype=torch.float64), y)


def cut(whole, shots=3):
    return Episode(
        *(Tasks(whole.x[:, part], whole.y[:, part]) for part in (slice(shots), slice(shots, None)))
    )


def smooth_risk(mean, sd, y, scale):
    """E over N(mean, sd²) of 1 − exp(−(y − φ)²/scale²), averaged over y."""
    spread = scale**2 + 2 * sd**2
    return np.mean(1 - scale / np.sqrt(spread) * np.exp(-((y - mean) ** 2) / spread))


@pytest.mark.parametrize("m", [8, 40])
def test_a_task_alone_gets_the_minimiser_of_its_bound(m):
    """One parameter: 1e-4 in mean and log sd of the minimiser of what the search sees.

    It sees expected losses as averages over 64 fixed draws. From the minimiser of those known in
    closed form it is off by what that rule misses: 1e-3 in the mean and 1e-2 in log sd.
    """
    data = levels(points=40)
    data = Tasks(data.x[:, :m], data.y[:, :m])
    fitted = fits.fit(PACBayes(scale=2.0), data, Levels(), steps=1)
    theta = float(fitted.theta["level"])
    posterior = fitted.adapt(data, draws=64, steps=400).density
    nodes = matched_noise(64, 1, 0).numpy()

    def averaged(mean, sd, y):
        return np.mean(1 - np.exp(-(((y - mean - sd * nodes) / 2.0) ** 2)))

    def known(mean, sd, y):
        return smooth_risk(mean, sd, y, 2.0)

    for i in range(2):
        y = data.y[i].numpy()
        found = [float(posterior.loc[i, 0]), float(posterior.scale[i, 0].log())]
        for risk_of, close in ((averaged, (1e-4, 1e-4)), (known, (1e-3, 1e-2))):

            def bound(at, y=y, risk_of=risk_of):
                kl = 0.5 * (math.exp(2 * at[1]) - 1 - 2 * at[1] + (at[0] - theta) ** 2)
                risk = risk_of(at[0], math.exp(at[1]), y)
                return float(bounds.quadratic(risk=risk, kl=kl, n_samples=m, delta=0.05).raw)

            best = minimize(
                bound, [theta, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-13}
            ).x
            assert found[0] == pytest.approx(best[0], abs=close[0])
            assert found[1] == pytest.approx(best[1], abs=close[1])
        # Neither the prior nor the posterior of the likelihood: the test can fail.
        assert abs(best[0] - theta) > 0.05
        assert abs(best[0] - (theta + y.sum()) / (1 + m)) > 0.01


def bound_of(name, *, tasks_per_step=None, strategy=None):
    data = cut(levels()) if name == "query_split" else levels()
    strategy = strategy or PACBayes(name, scale=2.0, hyperposterior_scale=0.1, steps=3)
    problem = Problem(Levels(0.25).double(), levels())
    assert problem.diagonal_prior
    found = BoundProblem(strategy, problem, data, Options(tasks_per_step=tasks_per_step))
    generator = torch.Generator().manual_seed(5)
    if found.rows is not None:
        found.rows += 0.3 * torch.randn(found.rows.shape, generator=generator, dtype=torch.float64)
    return found, found.draw(generator, found.n_tasks)


def value(found, free, rows, noise):
    """F at θ̂ and (u, raw), from fixed random numbers."""
    part = found.part(None)
    terms = found.terms(free, part._replace(rows=rows), noise)
    return float(
        objective(
            found.strategy.objective,
            risks=terms.risks,
            kls=terms.kls,
            hyper_kl=found.hyper_kl(free),
            n_samples=found.samples,
            delta=0.05,
        ).detach()
    )


@pytest.mark.parametrize("name", ["joint_kl", "amit_meir", "query_split"])
def test_a_step_of_all_tasks_descends_on_the_bound_itself(name):
    """Against central differences of the whole objective: 1e-6 of steps of 1e-5."""
    found, noise = bound_of(name)
    free, rows = found.moving.free, found.rows
    with torch.no_grad():
        found.note(None, found.terms(free, found.part(None), noise))
    weights = found.weights(found.tangent(), None)
    gradients = found.gradient(free, found.part(None), noise, weights)[1]

    def difference(free_step, row_step):
        ends = []
        for sign in (1e-5, -1e-5):
            moved = {"theta/level": free["theta/level"] + sign * free_step}
            there = None if rows is None else rows + sign * row_step
            ends.append(value(found, moved, there, noise))
        return (ends[0] - ends[1]) / 2e-5

    zero = 0.0 if rows is None else torch.zeros_like(rows)
    assert float(gradients[0]) == pytest.approx(difference(1.0, zero), abs=1e-7, rel=1e-5)
    assert abs(float(gradients[0])) > 1e-4
    if rows is None:
        return
    for i, j in ((0, 0), (2, 1), (5, 0)):
        step = torch.zeros_like(rows)
        step[i, j] = 1.0
        expected = difference(0.0, step)
        assert float(gradients[1][i, j]) == pytest.approx(expected, abs=1e-7, rel=1e-5)


@pytest.mark.parametrize("name", ["joint_kl", "amit_meir", "query_split"])
def test_minibatches_are_unbiased(name):
    """The mean over all 20 choices of three tasks of six is the gradient of all: 1e-12."""
    found, noise = bound_of(name, tasks_per_step=3)
    free = found.moving.free
    with torch.no_grad():
        found.note(None, found.terms(free, found.part(None), noise))
    at = found.tangent()
    found.each = 6
    whole = found.gradient(free, found.part(None), noise, found.weights(at, None))[1]
    found.each = 3
    parts, rows = [], torch.zeros_like(torch.cat(found.frame, -1))
    choices = list(itertools.combinations(range(6), 3))
    for choice in map(torch.tensor, choices):
        some = {**noise, "phi": noise["phi"][:, choice]}
        gradients = found.gradient(free, found.part(choice), some, found.weights(at, choice))[1]
        parts.append(gradients[0])
        if found.rows is not None:
            rows[choice] += gradients[1] / len(choices)
    assert len({round(float(g), 6) for g in parts}) > 10
    torch.testing.assert_close(torch.stack(parts).mean(0), whole[0], rtol=1e-12, atol=1e-13)
    if found.rows is not None:
        torch.testing.assert_close(rows, whole[1], rtol=1e-12, atol=1e-13)


def test_divergences_are_those_of_the_closed_form():
    """The mean of K_i over pairs of draws of θ ~ 𝒬 is `expected_kl_fixed_variance`.

    In one parameter and over a pair K_i = K_i(θ̂) + κ²ε²/2, whose standard error over 200 pairs is
    κ²/2 · √(2/200) = 5e-4 at κ = 0.1; five of them, a false alarm in 1e-6.
    """
    found, _ = bound_of("joint_kl")
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(6, dtype=torch.float64)
    for _ in range(200):
        with torch.no_grad():
            noise = found.draw(generator, 6)
            total += found.terms(found.moving.free, found.part(None), noise).kls / 200
    u, raw = found.rows.chunk(2, -1)
    mean, sd = found.frame[0] + found.frame[1] * u, (12 * torch.tanh(raw / 12)).exp()
    expected = bounds.expected_kl_fixed_variance(mean, sd, [0.25], 0.1, 1.0)
    np.testing.assert_allclose(total.numpy(), expected, atol=2.5e-3)
    with torch.no_grad():
        moved = {"theta/level": torch.tensor(0.9, dtype=torch.float64)}
        hyper = float(found.hyper_kl(moved))
    assert hyper == pytest.approx(
        float(bounds.gaussian_hyper_kl([0.9], [0.25], 0.1, 1.0)), abs=1e-9
    )


FAMILY = tasks.LinearTasks([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]], noise=0.3, shots=5, queries=10)


@functools.cache
def linear(name="joint_kl", **settings):
    return fits.fit(
        PACBayes(name, scale=2.0, steps=None if name == "query_split" else 60, **settings),
        FAMILY.sample(40, seed=1),
        models.LinearRegression(noise=0.3),
        steps=150,
        compile="graph",
    )


@functools.cache
def untrained():
    """Where training starts."""
    return fits.fit(
        linear().strategy,
        FAMILY.sample(40, seed=1),
        models.LinearRegression(noise=0.3),
        steps=1,
        theta_learning_rate=0.0,
        learning_rate=0.0,
    )


@pytest.mark.parametrize(
    ("name", "least"),
    [("joint_kl", 0.2), ("query_split", 0.03), pytest.param("amit_meir", 0.2, marks=slow)],
)
def test_training_lowers_the_bound(name, least):
    """Of query_split 0.44 is K_H and δ at 40 tasks, which no training lowers."""
    fitted = linear(name)
    assert fitted.info["bound"] < fitted.history[0] - least
    assert fitted.info["dimension"] == 4
    assert (fitted.density is None) == (name == "query_split")


@slow
@pytest.mark.parametrize("name", ["joint_kl", "amit_meir", "query_split"])
def test_minibatches_find_the_same(name):
    """As many steps of every task's own parameters, in parts of half of the tasks: within 0.03."""
    fitted = linear(name)
    some = fits.fit(
        fitted.strategy,
        FAMILY.sample(40, seed=1),
        models.LinearRegression(noise=0.3),
        steps=300,
        compile="graph",
        tasks_per_step=20,
    )
    assert some.info["bound"] < fitted.info["bound"] + 0.03


def test_what_is_certified_and_what_is_refused():
    fitted, known, new = linear(), FAMILY.sample(40, seed=1), FAMILY.sample(30, seed=2)
    assert hb.certify(fitted, new, **SQUARED).bound == "meta_test"
    with pytest.raises(DataError, match="tasks that the fit did not see"):
        hb.certify(fitted, known, **SQUARED)
    centre = untrained().theta
    around = GaussianHyperprior(1.0, 0.03, centre=centre)
    split = hb.certify(
        fitted, known, bound="query_split", hyperprior=around, evaluations=20, draws=20, **SQUARED
    )
    assert split.statement.hyper_kl == pytest.approx(fitted.info["hyper_kl"], rel=1e-6)
    # The posteriors of training were made jointly, and E KL of the map is not known.
    with pytest.raises(UnsupportedModelError, match="known, not estimated"):
        hb.certify(fitted, known, bound="joint_kl", hyperprior=around, **SQUARED)
    # Over a finite set of fits that other tasks taught it is known.
    several = FiniteHyperprior([fitted, untrained()])
    joint = hb.certify(
        fitted, new, bound="joint_kl", hyperprior=several, evaluations=200, draws=20, **SQUARED
    )
    assert joint.check() == ()
    assert 0 < np.mean(joint.statement.inputs["task_kls"]) < 10


def test_a_new_task_is_certified_with_the_learned_prior():
    """Learned from 40 tasks, the prior's bound on a new task is below that of one never trained."""
    new = FAMILY.sample(6, seed=3).all
    found = [
        np.mean(
            [
                certify_task(fit, new[[i]], evaluations=400, **SQUARED).statement.raw
                for i in range(6)
            ]
        )
        for fit in (linear(), untrained())
    ]
    assert found[0] < found[1] - 0.05


@slow
def test_interrupted_training_ends_where_it_would_have(tmp_path):
    data, program = levels(), Levels()
    strategy = PACBayes(scale=2.0, steps=3)
    settings = {"steps": 1001, "tasks_per_step": 3, "compile": "graph"}
    whole = fits.fit(strategy, data, program, **settings)
    path = tmp_path / "state"
    fits.fit(strategy, data, program, checkpoint=path, **settings)
    assert path.exists()
    again = fits.fit(strategy, data, program, checkpoint=path, **settings)
    assert torch.equal(whole.theta["level"], again.theta["level"])
    assert whole.history == again.history


def test_classes_and_programs_of_label_and_embedding():
    for name in ("neural_classifier", "bernoulli", "class_conditional"):
        fitted = fits.fit(PACBayes(steps=2), case(name).tasks, case(name).program, steps=3)
        assert all(0 < value < 10 for value in fitted.history)


@pytest.mark.parametrize(
    ("strategy", "data", "error", "match"),
    [
        (PACBayes(), levels(), UnsupportedModelError, "takes a scale"),
        (PACBayes("query_split", scale=1.0), levels(), DataError, "an Episode"),
        (PACBayes(scale=1.0), FAMILY, DataError, "the T tasks"),
        (PACBayes(scale=1.0), levels(1), DataError, "two tasks or more"),
        (PACBayes("amit_meir", scale=1.0), levels(4, 1), DataError, "2 rows or more"),
    ],
)
def test_refusals(strategy, data, error, match):
    with pytest.raises(error, match=match):
        fits.fit(strategy, data, Levels(), steps=1)


def test_points_that_depend_on_each_other_are_refused():
    known = case("gaussian_process")
    with pytest.raises(UnsupportedModelError, match="independent given φ"):
        fits.fit(PACBayes(scale=1.0), known.tasks, known.program, steps=1)
