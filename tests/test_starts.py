"""Starts of chains: Pathfinder's in every parametrisation, held against exact posteriors."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.errors import ConvergenceError
from hbmeta.inference import NUTS, AmortizedGuide, ExactLinear, NoPooling
from hbmeta.joint_density import staged_log_density, unpack
from hbmeta.parametrisation import Coordinates
from hbmeta.problem import Problem
from hbmeta.starts import (
    non_centered,
    pathfinder_starts,
    require_finite_start,
    spread_starts,
)
from hbmeta.tasks import Tasks
from tests.cases import case


def given(name, choice):
    """What starts are made of."""
    problem = Problem(case(name).program, case(name).tasks)
    batch = problem.batch(case(name).tasks)
    theta = problem.theta(batch)
    coordinates = Coordinates.of(problem, batch, choice, "test")
    potential = staged_log_density(problem, batch, theta, "graph", 1, coordinates)[0]
    return problem, batch, theta, potential, coordinates


@pytest.mark.parametrize("choice", ["non-centered", "centered"])
def test_eight_schools_start_inside_the_typical_set(choice):
    """Finite, different, and with μ and log τ within 5 of their posterior sds.

    μ has 4.4 ± 3.3 and log τ 0.8 ± 1.2; the joint mode of the centered program is at log τ → −∞.
    """
    problem, batch, theta, potential, coordinates = given("eight_schools_centered", choice)
    found = pathfinder_starts(
        problem, batch, theta, potential, coordinates, count=3, seed=0, where="test"
    )
    values = torch.stack([potential(point)[0] for point in found])
    assert bool(values.isfinite().all())
    assert len(found.unique(dim=0)) == 3
    # Level 1 means the same in all coordinates.
    drawn = unpack(problem, found, batch.n_tasks)[0]
    for site, mean, sd in (("mu", 4.4, 3.3), ("tau", 0.8, 1.2)):
        assert bool(((drawn[site] - mean).abs() < 5 * sd).all()), site


def test_starts_are_the_same_draws_in_all_coordinates():
    """φ of the non-centered starts is φ of the centered ones, to rounding."""
    vectors = {}
    for choice in ("non-centered", "centered"):
        problem, batch, theta, potential, coordinates = given("eight_schools_centered", choice)
        found = pathfinder_starts(
            problem, batch, theta, potential, coordinates, count=2, seed=2, where="test"
        )
        before = coordinates.centered.clone()
        drawn, t = unpack(problem, found, batch.n_tasks)
        phi = coordinates.many({**theta, **drawn}, True, t, batch)[0]
        vectors[choice] = torch.cat([found[:, : problem.sites.theta_size], phi.flatten(1)], 1)
        assert torch.equal(coordinates.centered, before)
    torch.testing.assert_close(vectors["centered"], vectors["non-centered"], rtol=1e-9, atol=1e-9)


def test_non_centered_ends_when_it_ends():
    *_, coordinates = given("eight_schools_centered", "centered")
    with non_centered(coordinates):
        assert not bool(coordinates.centered.any())
    assert bool(coordinates.centered.all())
    with pytest.raises(ZeroDivisionError), non_centered(coordinates):
        1 / 0  # noqa: B018
    assert bool(coordinates.centered.all())


def test_spread_starts_are_within_one_of_the_location():
    problem, batch, theta, potential, coordinates = given("eight_schools", "as written")
    found = spread_starts(problem, batch, theta, potential, coordinates, count=6, seed=0)
    centre = torch.cat(
        [problem.sites.theta_to_vector(theta), problem.location(theta, batch).flatten()]
    )
    assert bool(((found - centre).abs() <= 1).all())
    assert float((found - centre).abs().max()) > 0.8


@pytest.mark.slow
def test_nuts_starts_where_it_is_told(untouched):
    """A short run from Pathfinder's draws has the posterior of the spread one, and repeats itself.

    Means of μ and log τ within 0.6 of their sds: five standard errors of a difference of means of
    150 effective draws each (false-alarm rate below 1e-5).
    """
    name = "eight_schools"

    def run(initial):
        strategy = NUTS(draws=200, chains=2, warmup=100, initial=initial, processes=1)
        with warnings.catch_warnings():
            # Fewer than 400 effective draws.
            warnings.filterwarnings("ignore", message="NUTS: ")
            return strategy.fit(case(name).program, case(name).tasks, compile="graph", seed=3).theta

    with untouched():
        spread, found, again = (run(i) for i in ("spread", "pathfinder", "pathfinder"))
    for site in ("mu", "tau"):
        assert torch.equal(found[site], again[site])
        assert abs(float(found[site].mean() - spread[site].mean())) < 0.6 * float(
            spread[site].std()
        )


def correlated(x, y=None):
    """A correlation r ~ N(0, 1): at |r| ≥ 1 there is no Cholesky factor."""
    r = pyro.sample("r", dist.Normal(0.0, 1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        covariance = torch.eye(2, dtype=x.dtype) + r * (1 - torch.eye(2, dtype=x.dtype))
        mean = (z @ torch.linalg.cholesky(covariance).mT).sum(-1)
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:NUTS:UserWarning")
def test_a_point_without_a_cholesky_factor_is_rejected(untouched):
    data = Tasks(
        torch.zeros(6, 4, 1).double(),
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(),
    )
    strategy = NUTS(draws=60, chains=1, warmup=60, processes=1)
    with untouched():
        fitted = strategy.fit(correlated, data, seed=0, compile=False, progress=False)
    r = fitted.globals()["r"]
    assert float(r.abs().max()) < 1.0
    # The prior alone has an sd of 0.54 between −1 and 1.
    assert float(r.std()) > 0.2


# Programs that cannot start


def program(prior=lambda m: m, effect=lambda z: z):
    """y ~ N(effect(z), 1), z ~ N(0, prior(1 + m²)), m ~ N(0, 1)."""

    def model(x, y=None):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            scale = prior(1 + m**2)
            z = pyro.sample("z", dist.Normal(torch.zeros_like(m), scale, validate_args=False))
            with pyro.plate("point", x.shape[1], dim=-1):
                mean = effect(z).expand(x.shape[:2])
                return pyro.sample("y", dist.Normal(mean, 1.0, validate_args=False), obs=y)

    return model


def three():
    y = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    return Tasks(torch.ones_like(y).unsqueeze(-1), y, ids=["a", "b", "c"])


@pytest.mark.parametrize(
    "strategy",
    [NUTS(draws=4, warmup=4, chains=1), AmortizedGuide(), ExactLinear(), NoPooling()],
    ids=lambda s: s.name,
)
def test_a_density_that_is_not_finite_is_refused_before_a_fit(strategy):
    with pytest.raises(ConvergenceError, match="found nan for the likelihood of task 'a'") as said:
        strategy.fit(program(effect=lambda z: torch.log(z - 5.0)), three(), compile=False)
    assert said.value.where == f"{strategy.name}.fit"


def test_the_prior_is_named_where_it_is_what_is_not_finite():
    """A scale below zero: y has a density given φ, φ has none."""
    problem = Problem(program(), three())
    problem.program = program(prior=lambda s: -s)
    with pytest.raises(ConvergenceError, match=r"found nan for log p\(φ \| θ\) of task 'a'"):
        require_finite_start(problem, three(), "test")


def test_a_location_that_alone_is_bad_is_no_harm():
    """log z² is infinite at 0, the location, and nowhere else."""
    problem = Problem(program(effect=lambda z: torch.log(z**2)), three())
    batch = problem.batch(three())
    theta = problem.theta(batch)
    assert not bool(problem.terms(theta, problem.location(theta, batch), batch)[0].isfinite().any())
    require_finite_start(problem, three(), "test")


def test_starts_without_a_gradient_are_refused():
    """√|0 z| has a value, and 0 · ∞ for a gradient."""
    problem = Problem(program(effect=lambda z: (0.0 * z).abs().sqrt()), three())
    batch = problem.batch(three())
    theta = problem.theta(batch)
    potential = staged_log_density(problem, batch, theta, "eager", 1)[0]
    with pytest.raises(ConvergenceError, match="3 entries of its gradient not finite"):
        spread_starts(problem, batch, theta, potential, None, count=1, seed=0)
