"""Starts of chains: Pathfinder's in every parametrisation, held against exact posteriors."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.inference import NUTS
from hbmeta.joint_density import staged_log_density, unpack
from hbmeta.parametrisation import Coordinates
from hbmeta.problem import Problem
from hbmeta.starts import non_centered, pathfinder_starts, spread_starts
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
