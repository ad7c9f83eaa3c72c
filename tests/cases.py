"""Tiny three-level programs, most of them with a known answer.

Every case is data and a program; what is known exactly about it stands beside it. The numbers come
from fixed seeds, so a case is the same in every process. Programs are written as a person would.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from hbmeta import models
from hbmeta.tasks import Tasks
from tests import reference

MEAN = (0.5, -1.0)
COVARIANCE = ((1.0, 0.3), (0.3, 0.5))
NOISE = 0.4
SCHOOLS_Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOLS_SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
RATE_SHAPE, RATE_RATE = 2.0, 0.8


@dataclass(frozen=True)
class Case:
    """A program with its tasks, and what is known about it.

    Attributes:
        about: the program in a few words, for docs/matrix.md.
        program: what `fit` takes as the model.
        tasks: what `fit` takes as the data.
        site: the local or deterministic site that `posterior` is about.
        posterior: mean and sd (tasks, *shape) of that site given the data, exactly.
        given_theta: whether the program has no level-1 quantity, so that `posterior` is what an
            exact strategy must give at once; else θ is integrated out.
        maximum_likelihood: (tasks, *shape) of that site, each task alone, where it has one.
        log_evidence: (tasks,) log p(y_i).
        gaussian_prior: whether p(φ | θ) is Gaussian in unconstrained space.
    """

    name: str
    about: str
    program: Any = field(repr=False)
    tasks: Tasks
    site: str | None = None
    posterior: tuple[np.ndarray, np.ndarray] | None = None
    given_theta: bool = False
    maximum_likelihood: np.ndarray | None = None
    log_evidence: np.ndarray | None = None
    gaussian_prior: bool = True


# Programs of a person's own


def linear_nested(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        prior = dist.MultivariateNormal(torch.tensor(MEAN), torch.tensor(COVARIANCE))
        coefficients = pyro.sample("coefficients", prior)
        with pyro.plate("point", x.shape[1], dim=-1):
            mean = (x * coefficients).sum(-1)
            return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def linear_flat(x, y=None, *, task, n_tasks):
    with pyro.plate("task", n_tasks, dim=-1):
        prior = dist.MultivariateNormal(torch.tensor(MEAN), torch.tensor(COVARIANCE))
        coefficients = pyro.sample("coefficients", prior)
    with pyro.plate("point", x.shape[0], dim=-1):
        mean = (x * coefficients[task]).sum(-1)
        return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def eight_schools(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        effect = pyro.deterministic("effect", mu + tau * z)
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(effect, x[..., 0]), obs=y)


def eight_schools_centered(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(effect, x[..., 0]), obs=y)


def gamma_poisson(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        rate = pyro.sample("rate", dist.Gamma(RATE_SHAPE, RATE_RATE))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Poisson(rate), obs=y)


def lognormal_poisson(x, y=None, *, task, n_tasks):
    location = pyro.sample("location", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks, dim=-1):
        rate = pyro.sample("rate", dist.LogNormal(location, spread))
    with pyro.plate("point", x.shape[0], dim=-1):
        return pyro.sample("y", dist.Poisson(rate[task] * x[..., 0].exp()), obs=y)


def two_coefficients(x, y=None):
    """Intercept and slope as two local sites, centered."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        intercept = pyro.sample("intercept", dist.Normal(mean[0], scale[0]))
        slope = pyro.sample("slope", dist.Normal(mean[1], scale[1]))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(intercept + slope * x[..., 0], noise), obs=y)


class SharedCurve(PyroModule):
    """A curve that tasks share, and their own offsets: θ is learned without a prior."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3]]))
        self.bend = nn.Parameter(torch.tensor(0.0))
        self.start = nn.Parameter(torch.tensor(0.0))
        # A constrained one: Pyro would read it from its global store.
        self.noise = PyroParam(torch.tensor(0.3), constraint=constraints.positive)

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            offset = pyro.sample("offset", dist.Normal(self.start, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                mean = (x @ self.weight).squeeze(-1) + self.bend * x[..., 0] ** 2 + offset
                return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


# Data


def _ragged(counts, draw_y, *, seed, features=("x0",), draw_x=None) -> Tasks:
    """Tasks of the given sizes; draw_y(x, task, rng) gives y of all rows."""
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(counts)), counts)
    x = rng.uniform(-2, 2, (len(task), len(features))) if draw_x is None else draw_x(task, rng)
    y = draw_y(x, task, rng)
    ids = [f"t{i}" for i in range(len(counts))]
    return Tasks.from_flat(x, np.asarray(y, float), task, len(counts), ids=ids, features=features)


def _linear_tasks(counts=(5, 3, 6, 4)) -> Tasks:
    def draw_x(task, rng):
        return np.stack([np.ones(len(task)), rng.uniform(-2, 2, len(task))], 1)

    def draw_y(x, task, rng):
        phi = rng.multivariate_normal(MEAN, COVARIANCE, len(counts))
        return (x * phi[task]).sum(1) + NOISE * rng.standard_normal(len(task))

    return _ragged(counts, draw_y, seed=1, features=("intercept", "x0"), draw_x=draw_x)


def rows_of(tasks: Tasks, position: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of one task, as NumPy arrays."""
    mine = tasks.task == position
    assert tasks.flat_y is not None
    return tasks.flat_x[mine].numpy(), tasks.flat_y[mine].numpy()


def _linear_case(name: str, about: str, program: Any) -> Case:
    tasks = _linear_tasks()
    each = [rows_of(tasks, i) for i in range(tasks.n_tasks)]
    known = [reference.gaussian_posterior(X, y, MEAN, COVARIANCE, NOISE) for X, y in each]
    evidence = [reference.log_evidence(X, y, MEAN, COVARIANCE, NOISE) for X, y in each]
    return Case(
        name,
        about,
        program,
        tasks,
        site="coefficients",
        posterior=(
            np.array([mean for mean, _ in known]),
            np.array([np.sqrt(np.diag(covariance)) for _, covariance in known]),
        ),
        given_theta=True,
        maximum_likelihood=np.array([reference.least_squares(X, y) for X, y in each]),
        log_evidence=np.array(evidence),
    )


def _schools() -> Tasks:
    return Tasks(
        [[[s]] for s in SCHOOLS_SIGMA],
        [[y] for y in SCHOOLS_Y],
        ids=list("ABCDEFGH"),
        features=["sigma"],
    )


def _schools_case(name: str, about: str, program: Any) -> Case:
    exact = reference.normal_means_posterior(SCHOOLS_Y, SCHOOLS_SIGMA, 5.0, 5.0)
    return Case(name, about, program, _schools(), site="effect", posterior=exact["effect"])


def _varying(counts, *, seed) -> Tasks:
    def draw_y(x, task, rng):
        intercept = 1.0 + 0.8 * rng.standard_normal(len(counts))
        return intercept[task] - 0.7 * x[:, 0] + 0.5 * rng.standard_normal(len(task))

    return _ragged(counts, draw_y, seed=seed)


def _binary() -> Tasks:
    def draw_y(x, task, rng):
        eta = 0.3 + rng.standard_normal(6)[task] + 0.5 * x[:, 0]
        return rng.uniform(size=len(task)) < 1 / (1 + np.exp(-eta))

    return _ragged((8, 6, 7, 8, 6, 7), draw_y, seed=3)


def _counts(counts=(6, 4, 5, 7, 6), *, seed=4) -> Tasks:
    def draw_x(task, rng):
        return np.log(rng.uniform(0.5, 2.0, (len(task), 1)))

    def draw_y(x, task, rng):
        rate = np.exp(0.5 + 0.6 * rng.standard_normal(len(counts)))
        return rng.poisson(rate[task] * np.exp(x[:, 0]))

    return _ragged(counts, draw_y, seed=seed, features=("log_exposure",), draw_x=draw_x)


def _gamma_poisson_case() -> Case:
    def draw_x(task, rng):
        return np.zeros((len(task), 1))

    def draw_y(x, task, rng):
        return rng.poisson(rng.gamma(RATE_SHAPE, 1 / RATE_RATE, 4)[task])

    tasks = _ragged((3, 5, 4, 6), draw_y, seed=5, draw_x=draw_x)
    total = np.array([rows_of(tasks, i)[1].sum() for i in range(tasks.n_tasks)])
    n = tasks.counts.numpy()
    shape, rate = RATE_SHAPE + total, RATE_RATE + n
    # Π_j Poisson(y_j | r) Gamma(r | a, b) integrates over r to
    # b^a Γ(a + Σy) / (Γ(a) (b + n)^(a + Σy) Π y_j!).
    factorials = np.array(
        [sum(math.lgamma(v + 1) for v in rows_of(tasks, i)[1]) for i in range(tasks.n_tasks)]
    )
    log_evidence = (
        RATE_SHAPE * math.log(RATE_RATE)
        - math.lgamma(RATE_SHAPE)
        + np.array([math.lgamma(s) for s in shape])
        - shape * np.log(rate)
        - factorials
    )
    return Case(
        "gamma_poisson",
        "counts with a Gamma rate per task, θ given; own program",
        gamma_poisson,
        tasks,
        site="rate",
        posterior=(shape / rate, np.sqrt(shape) / rate),
        given_theta=True,
        maximum_likelihood=total / n,
        log_evidence=log_evidence,
        gaussian_prior=False,
    )


def _student_t() -> Tasks:
    def draw_y(x, task, rng):
        return 1.0 + 0.8 * rng.standard_normal(5)[task] + 0.4 * rng.standard_t(4, len(task))

    return _ragged((5, 6, 4, 6, 5), draw_y, seed=6)


def _two_coefficients() -> Tasks:
    def draw_y(x, task, rng):
        a, b = 0.5 + 0.7 * rng.standard_normal(6), -0.4 + 0.5 * rng.standard_normal(6)
        return a[task] + b[task] * x[:, 0] + 0.3 * rng.standard_normal(len(task))

    return _ragged((5, 4, 6, 5, 5, 4), draw_y, seed=7)


def _curves() -> Tasks:
    def draw_y(x, task, rng):
        offset = rng.standard_normal(5)
        return x[:, 0] - 0.5 * x[:, 0] ** 2 + offset[task] + 0.3 * rng.standard_normal(len(task))

    return _ragged((6, 6, 6, 6, 6), draw_y, seed=8)


def _functions(seed, *, noise=0.15) -> Tasks:
    def draw_y(x, task, rng):
        y = np.empty(len(task))
        for i in range(5):
            at = x[task == i, 0]
            k = reference.kernel_matrix("rbf", at, at, lengthscale=0.8)
            y[task == i] = rng.multivariate_normal(
                np.zeros(len(at)), k + noise**2 * np.eye(len(at))
            )
        return y

    return _ragged((6, 9, 7, 8, 7), draw_y, seed=seed)


def _waves() -> Tasks:
    def draw_y(x, task, rng):
        amplitude, phase = rng.uniform(0.5, 1.5, 4), rng.uniform(0, np.pi, 4)
        wave = amplitude[task] * np.sin(x[:, 0] + phase[task])
        return wave + 0.1 * rng.standard_normal(len(task))

    return _ragged((6, 5, 7, 6), draw_y, seed=14)


def _clusters() -> Tasks:
    rng = np.random.default_rng(13)
    labels = np.concatenate([rng.permutation(np.arange(n) % 3) for n in (6, 7, 9, 6)])
    task = np.repeat(np.arange(4), (6, 7, 9, 6))
    x = rng.normal(0, 1.5, (4, 3, 2))[task, labels] + 0.8 * rng.standard_normal((28, 2))
    ids = [f"t{i}" for i in range(4)]
    return Tasks.from_flat(x, labels, task, 4, ids=ids, features=("x0", "x1"))


_MAKERS: dict[str, Callable[[], Case]] = {
    "linear_given_theta": lambda: _linear_case(
        "linear_given_theta",
        "linear regression, θ given (`LinearRegression`)",
        models.LinearRegression(MEAN, COVARIANCE, NOISE),
    ),
    "linear_own_nested": lambda: _linear_case(
        "linear_own_nested", "the same as an own program, nested plates", linear_nested
    ),
    "linear_own_flat": lambda: _linear_case(
        "linear_own_flat", "the same as an own program, flat plates", linear_flat
    ),
    "varying_intercepts": lambda: Case(
        "varying_intercepts",
        "varying intercepts (`VaryingEffects`)",
        models.VaryingEffects(fixed=["x0"]),
        _varying((4, 6, 5, 4, 6), seed=2),
    ),
    "ragged_one_row": lambda: Case(
        "ragged_one_row",
        "the same with 1 to 12 rows per task",
        models.VaryingEffects(fixed=["x0"]),
        _varying((1, 12, 3, 7, 2), seed=9),
    ),
    "two_coefficients": lambda: Case(
        "two_coefficients",
        "intercept and slope as two centered sites; own program",
        two_coefficients,
        _two_coefficients(),
    ),
    "eight_schools": lambda: _schools_case(
        "eight_schools", "eight schools, non-centered, one row per task", eight_schools
    ),
    "eight_schools_centered": lambda: _schools_case(
        "eight_schools_centered",
        "eight schools, centered, one row per task",
        eight_schools_centered,
    ),
    "bernoulli": lambda: Case(
        "bernoulli",
        "yes/no answers (`VaryingEffects`, bernoulli)",
        models.VaryingEffects(fixed=["x0"], family="bernoulli"),
        _binary(),
    ),
    "poisson_offset": lambda: Case(
        "poisson_offset",
        "counts with an exposure (`VaryingEffects`, poisson)",
        models.VaryingEffects(family="poisson", offset="log_exposure"),
        _counts(),
    ),
    "student_t": lambda: Case(
        "student_t",
        "heavy tails (`VaryingEffects`, student_t)",
        models.VaryingEffects(family="student_t", degrees_of_freedom=4.0),
        _student_t(),
    ),
    "gamma_poisson": _gamma_poisson_case,
    "lognormal_poisson": lambda: Case(
        "lognormal_poisson",
        "counts with a LogNormal rate per task; own program, flat plates",
        lognormal_poisson,
        _counts((2, 9, 1, 4), seed=10),
    ),
    "module_parameters": lambda: Case(
        "module_parameters",
        "a `PyroModule` whose θ is parameters without a prior",
        SharedCurve(),
        _curves(),
    ),
    "gaussian_process": lambda: Case(
        "gaussian_process",
        "functions with a lengthscale of their own (`GaussianProcess`)",
        models.GaussianProcess("rbf", lengthscale=(0.1, 4.0), scale=1.0, noise=0.15),
        _functions(12),
        gaussian_prior=False,
    ),
    "gaussian_process_learned": lambda: Case(
        "gaussian_process_learned",
        "the same, its distribution over tasks learned",
        models.GaussianProcess("matern32", scale=1.0, noise=0.15),
        _functions(12),
    ),
    "class_conditional": lambda: Case(
        "class_conditional",
        "Gaussian classes around means of each task (`ClassConditional`)",
        models.ClassConditional(None, 3, prior_scale=1.5),
        _clusters(),
    ),
    "neural_regression": lambda: Case(
        "neural_regression",
        "networks of 97 weights around a learned mean (`NeuralRegression`)",
        models.NeuralRegression((8, 8), noise=0.3),
        _waves(),
    ),
    "neural_zero": lambda: Case(
        "neural_zero",
        "Bayesian networks of 7 weights (`NeuralRegression`, mean zero)",
        models.NeuralRegression((2,), noise=0.3, mean="zero", activation="tanh"),
        _waves(),
    ),
    "neural_classifier": lambda: Case(
        "neural_classifier",
        "networks that give the probabilities of classes (`NeuralClassifier`)",
        models.NeuralClassifier(3, (12,)),
        _clusters(),
    ),
    "latent_process": lambda: Case(
        "latent_process",
        "functions from a decoder of a code per task (`LatentProcess`)",
        models.LatentProcess(2, (4,), noise=0.3, frequencies=0, linear=False),
        _waves(),
    ),
}

NAMES = tuple(_MAKERS)


@cache
def case(name: str) -> Case:
    """The case of that name."""
    return _MAKERS[name]()
