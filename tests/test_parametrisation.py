"""Coordinates of a sampler against formulas written out, dense Jacobians and exact posteriors."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta import joint_density, load, parametrisation
from hbmeta.inference import NUTS, Pathfinder
from hbmeta.inference.nuts import trouble
from hbmeta.parametrisation import Coordinates, choosable_sites
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import cases, reference

CHOOSABLE = ("effect", "after", "rate", "pair", "both", "kinked")
# Rounding of sums of some hundred terms of size 1 to 100 in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def sites(plate):
    """Sites of all the kinds there are, in a plate; what y is about."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    factor = torch.tensor([[1.0, 0.0], [0.4, 0.8]])
    with plate:
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        after = pyro.sample("after", dist.StudentT(4.0, effect, 0.5))
        rate = pyro.sample("rate", dist.LogNormal(mu, tau))
        pair = pyro.sample("pair", dist.MultivariateNormal(torch.ones(2), scale_tril=tau * factor))
        both = pyro.sample("both", dist.Normal(mu, tau).expand([2]).to_event(1))
        kinked = pyro.sample("kinked", dist.Laplace(mu, 1.0))
        given = pyro.sample("given", dist.Normal(0.0, 1.0))
        shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    return effect + after + rate + pair.sum(-1) + both.sum(-1) + kinked + given * shape


def nested(x, y=None):
    plate = pyro.plate("task", x.shape[0], dim=-2)
    eta = sites(plate)
    with plate, pyro.plate("point", x.shape[1], dim=-1):
        pyro.sample("y", dist.Normal(eta * x[..., 0], 1.0), obs=y)


def flat(x, y=None, *, task, n_tasks):
    eta = sites(pyro.plate("task", n_tasks))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(eta[task] * x[..., 0], 1.0), obs=y)


def some_tasks():
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(3), 4)
    x, y = rng.uniform(0.5, 1.5, (12, 1)), rng.standard_normal(12)
    return Tasks.from_flat(x, y, task, 3, ids=list("abc"), features=["x"])


def somewhere(problem, n_tasks):
    """θ and coordinates at random."""
    generator = torch.Generator().manual_seed(1)
    theta = {
        "mu": torch.tensor(0.3, dtype=torch.float64),
        "tau": torch.tensor(-0.4, dtype=torch.float64),
    }
    shape = (n_tasks, problem.sites.phi_size)
    return theta, torch.randn(shape, generator=generator, dtype=torch.float64)


def mixed(n_tasks):
    """Task 0 non-centered, task 1 centered, task 2 of both kinds."""
    chosen = torch.zeros(n_tasks, len(CHOOSABLE), dtype=torch.float64)
    chosen[1], chosen[2, ::2] = 1.0, 1.0
    return chosen


def by_formula(theta, t, chosen):
    """φ of one task by site, from its coordinates by site, in the order of the program."""
    mu, tau = theta["mu"], theta["tau"].exp()
    factor = tau * torch.tensor([[1.0, 0.0], [0.4, 0.8]], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    out = dict(t)
    for name, keep in zip(CHOOSABLE, chosen, strict=True):
        if keep:
            continue
        out[name] = {
            "effect": lambda e: mu + tau * e,
            "after": lambda e: out["effect"] + 0.5 * e,
            "rate": lambda e: mu + tau * e,
            "pair": lambda e: ones + factor @ e,
            "both": lambda e: mu + tau * e,
            "kinked": lambda e: mu + e,
        }[name](t[name])
    return out


@pytest.mark.parametrize("program", [nested, flat])
def test_phi_is_that_of_the_formula_and_log_det_that_of_the_dense_jacobian(program):
    problem, n = Problem(program, some_tasks()), 3
    batch = problem.batch(some_tasks())
    theta, t = somewhere(problem, n)
    chosen = mixed(n)
    coordinates = Coordinates(problem, CHOOSABLE, chosen)
    phi, log_det = coordinates.phi(theta, t, batch)
    for task in range(n):
        one = {k: v[task] for k, v in problem.sites.from_vector(t).items()}
        expected = by_formula(theta, one, chosen[task])
        for name, value in problem.sites.from_vector(phi).items():
            torch.testing.assert_close(value[task], expected[name], **CLOSE)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: coordinates.phi(theta, v.reshape(t.shape), batch)[0].flatten(), t.flatten()
    )
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], **CLOSE)
    # A change of variables of mass 1 everywhere would be no test.
    assert abs(float(log_det)) > 1.0


@pytest.mark.parametrize("program", [nested, flat])
def test_log_density_is_that_of_phi_and_the_jacobian_with_its_gradient(program):
    problem, tasks = Problem(program, some_tasks()), some_tasks()
    batch = problem.batch(tasks)
    theta, t = somewhere(problem, 3)
    coordinates = Coordinates(problem, CHOOSABLE, mixed(3))
    vector = joint_density.pack(problem, theta, t)

    def dense(v):
        at, own = joint_density.unpack(problem, v, 3)
        phi, log_det = coordinates.phi(at, own, batch)
        likelihood, local, prior = problem.terms(at, phi, batch)
        return likelihood.sum() + local.sum() + prior + log_det

    expected = torch.autograd.functional.jacobian(dense, vector)
    value, gradient = joint_density.log_density(problem, {}, vector, batch, coordinates)
    torch.testing.assert_close(value, dense(vector), **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)
    run, _ = joint_density.staged_log_density(problem, batch, theta, "graph", 100, coordinates)
    torch.testing.assert_close(run(vector)[1], expected, **CLOSE)
    # One graph serves every choice.
    coordinates.centered = torch.ones_like(coordinates.centered)
    plain = joint_density.log_density(problem, {}, vector, batch)
    torch.testing.assert_close(run(vector), plain, **CLOSE)
    assert abs(float(plain[0] - value)) > 0.1


def test_start_is_where_the_noise_is_zero_or_phi_at_its_location():
    problem = Problem(flat, some_tasks())
    batch = problem.batch(some_tasks())
    theta, _ = somewhere(problem, 3)
    coordinates = Coordinates(problem, CHOOSABLE, mixed(3))
    phi, _ = coordinates.phi(theta, coordinates.start(theta, batch), batch)
    torch.testing.assert_close(phi, problem.location(theta, batch), **CLOSE)


def test_many_draws_are_one_by_one():
    problem = Problem(nested, some_tasks())
    batch = problem.batch(some_tasks())
    theta, t = somewhere(problem, 3)
    coordinates = Coordinates(problem, CHOOSABLE, mixed(3))
    drawn = {k: torch.stack([v, v - 0.5]) for k, v in theta.items()}
    phi, log_det = coordinates.many(drawn, True, torch.stack([t, 2 * t]), batch)
    for s in range(2):
        at = {k: v[s] for k, v in drawn.items()}
        one, det = coordinates.phi(at, (1 + s) * t, batch)
        torch.testing.assert_close(phi[s], one, **CLOSE)
        torch.testing.assert_close(log_det[s], det, **CLOSE)


def test_sites_that_can_be_chosen():
    problem = Problem(flat, some_tasks())
    assert choosable_sites(problem, problem.batch(some_tasks())) == CHOOSABLE
    schools = Problem(cases.eight_schools, cases.case("eight_schools").tasks)
    assert choosable_sites(schools, schools.batch(cases.case("eight_schools").tasks)) == ()


# The choice


def intercepts(x, y=None, *, task, n_tasks):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task], 0.5), obs=y)


def ragged(counts, spread, *, seed=0):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(counts)), counts)
    y = spread * rng.standard_normal(len(counts))[task] + 0.5 * rng.standard_normal(len(task))
    return Tasks.from_flat(np.ones((len(task), 1)), y, task, len(counts), features=["one"])


def test_share_left_is_that_of_the_gaussian_formula():
    """λ = (1/τ²) / (1/τ² + n/σ²), averaged over draws of τ."""
    counts = (1, 5, 40)
    tasks = ragged(counts, 1.0)
    problem = Problem(intercepts, tasks)
    coordinates = Coordinates.of(problem, problem.batch(tasks), "auto", "test")
    log_tau = torch.tensor([-1.5, 0.2], dtype=torch.float64)
    theta = {"mu": torch.tensor([0.1, -0.3], dtype=torch.float64), "tau": log_tau}
    t = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = coordinates.share_left(theta, True, t, problem.batch(tasks))
    expected = [
        np.mean([1 / (1 + math.exp(2 * u) * n / 0.25) for u in log_tau.tolist()]) for n in counts
    ]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10)


def test_share_left_of_correlated_coefficients_is_the_dense_one():
    case = cases.case("two_coefficients")
    problem = Problem(case.program, case.tasks)
    batch = problem.batch(case.tasks)
    coordinates = Coordinates.of(problem, batch, "auto", "test")
    assert coordinates.sites == ("intercept", "slope")
    theta = problem.theta(batch)
    found = coordinates.share_left(theta, False, torch.zeros(1, 6, 2).double(), batch)
    scale, noise = theta["scale"].exp().numpy(), float(theta["noise"].exp())
    for task in range(case.tasks.n_tasks):
        x, _ = cases.rows_of(case.tasks, task)
        design = np.stack([np.ones(len(x)), x[:, 0]], 1) * scale / noise
        left = np.diag(np.linalg.inv(np.eye(2) + design.T @ design))
        np.testing.assert_allclose(found[task], left, rtol=1e-9)


@pytest.mark.parametrize(
    ("counts", "spread", "expected"),
    [
        ((100,) * 8, 2.0, "centered"),
        ((1,) * 8, 0.05, "non-centered"),
        ((100,) * 4 + (1,) * 8, 0.2, "non-centered"),
    ],
)
@pytest.mark.filterwarnings("ignore:NUTS. ")
def test_auto_chooses_by_what_the_data_say(counts, spread, expected):
    """λ at the true τ is 6e-4, 0.99 and (0.06, 0.86): far from ½, wherever a pilot puts τ.

    One task that says little is enough for non-centered.
    """
    tasks = ragged(counts, spread)
    strategy = NUTS(draws=20, warmup=80, chains=2, max_tree_depth=4, processes=1)
    fitted = strategy.fit(intercepts, tasks, compile="graph", seed=0)
    assert fitted.info["parametrisation"] == {"alpha": expected}


def test_many_parameters_are_moved_non_centered():
    """Above 64 the measure is too large, and a centered scale has a funnel and no joint mode."""

    def wide(x, y=None):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            w = pyro.sample("w", dist.Normal(torch.zeros(65), tau).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(w.mean(-1), 1.0), obs=y)

    tasks = Tasks(np.zeros((2, 1, 1)), np.ones((2, 1)))
    for strategy in (
        NUTS(draws=4, warmup=4, chains=1, max_tree_depth=3),
        Pathfinder(paths=1, draws=100),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of draws this few
            found = strategy.fit(wide, tasks, compile="graph", progress=False)
        assert found.info["parametrisation"] == {"w": "non-centered"}


@pytest.mark.filterwarnings("ignore:NUTS. ")
def test_nothing_to_choose_runs_as_written():
    case = cases.case("eight_schools")
    runs = [
        NUTS(draws=5, warmup=10, chains=1, processes=1, parametrisation=choice).fit(
            case.program, case.tasks, compile="graph", seed=3
        )
        for choice in ("auto", "as written")
    ]
    assert torch.equal(runs[0].density.phi, runs[1].density.phi)
    assert torch.equal(runs[0].info["log_density"], runs[1].info["log_density"])
    assert [run.info["parametrisation"] for run in runs] == ["as written"] * 2


@pytest.mark.parametrize("choice", ["centered", "non-centered"])
@pytest.mark.filterwarnings("ignore:NUTS. ")
def test_draws_are_of_phi_with_their_log_density(choice, tmp_path):
    case = cases.case("eight_schools_centered")
    strategy = NUTS(draws=4, warmup=10, chains=2, processes=1, parametrisation=choice)
    fitted = strategy.fit(case.program, case.tasks, compile="graph", seed=0)
    batch = fitted.problem.batch(case.tasks)
    for draw in range(8):
        theta = {k: v[draw] for k, v in fitted.theta.items()}
        terms = fitted.problem.terms(theta, fitted.density.phi[draw], batch)
        found = fitted.info["log_density"].flatten()[draw]
        torch.testing.assert_close(sum(term.sum() for term in terms), found, **CLOSE)
    fitted.save(tmp_path / "fit")
    back = load(tmp_path / "fit", model=case.program)
    assert back.strategy == strategy
    assert back.info["parametrisation"] == {"effect": choice}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "non-centered"])
def test_centered_eight_schools_agree_with_quadrature(choice):
    """Means within 0.1 exact sds and sds within 10 %, and next to no divergence (of 20,000).

    At an effective sample size above 4,000 a mean has a standard error of 0.016 sd: false-alarm
    rate below 1e-8 for all ten.
    """
    case = cases.case("eight_schools_centered")
    strategy = NUTS(draws=5000, chains=4, target_accept=0.95, parametrisation=choice)
    fitted = strategy.fit(case.program, case.tasks, compile=True, seed=0)
    assert fitted.info["parametrisation"] == {"effect": "non-centered"}
    assert fitted.info["divergences"] <= 20
    assert float(fitted.info["ess_bulk"].min()) > 4000
    exact = reference.normal_means_posterior(cases.SCHOOLS_Y, cases.SCHOOLS_SIGMA, 5.0, 5.0)
    mean, sd = (m[:, 0] if m.ndim == 2 else m for m in exact["effect"])
    found = fitted.posterior.values(draws=10**9)[0]["effect"].numpy()
    assert np.abs(found.mean(0) - mean).max() < 0.1 * sd.min()
    np.testing.assert_allclose(found.std(0), sd, rtol=0.1)
    mu = fitted.globals()["mu"].numpy()
    assert abs(mu.mean() - exact["mu"][0]) < 0.1 * exact["mu"][1]
    tau = fitted.globals()["tau"].numpy()
    assert abs(tau.mean() - exact["tau"][0]) < 0.1 * exact["tau"][1]


# What is said


def test_advice_names_the_parametrisation_in_use():
    def said(used):
        info = {
            "divergences": 3,
            "deep_trees": 0,
            "diverging": torch.zeros(1, 4),
            "parametrisation": used,
        }
        (text,) = trouble(info)
        return text

    assert "write the program non-centered" in said("as written")
    assert 'parametrisation="non-centered" (it was: effect centered)' in said(
        {"effect": "centered"}
    )
    both = said({"effect": "centered in 2 of 8 tasks", "slope": "non-centered"})
    assert "effect centered in 2 of 8 tasks, slope non-centered" in both
    already = said({"effect": "non-centered"})
    assert 'parametrisation="centered"' in already
    assert "prior" in already


def test_choices_are_those_of_the_setting():
    assert NUTS().parametrisation == "auto"
    for choice in parametrisation.CHOICES:
        assert NUTS(parametrisation=choice).settings()["parametrisation"] == choice
