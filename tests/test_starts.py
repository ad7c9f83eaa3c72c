"""Starts of chains: Pathfinder's in every parametrisation, held against exact posteriors."""

import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.inference import NUTS
from hbmeta.joint_density import staged_log_density, unpack
from hbmeta.parametrisation import Coordinates
from hbmeta.problem import Problem
from hbmeta.starts import non_centered, pathfinder_starts, spread_starts
from tests.cases import case


def given(name, choice):
    """What starts are made of."""
    problem = Problem(case(name).program, case(name).tasks)
    batch = problem.batch(case(name).tasks)
    theta = problem.theta(batch)
    coordinates = Coordinates.of(problem, batch, choice, "test")
    potential = staged_log_density(problem, batch, theta, "eager", 1, coordinates)[0]
    return problem, batch, theta, potential, coordinates


@pytest.mark.parametrize("choice", ["non-centered", "centered"])
def test_eight_schools_start_inside_the_typical_set(choice):
    """Finite, different, and with μ and log τ no more than ½ outside the range of 600 draws.

    The joint mode of the centered program is at log τ → −∞.
    """
    problem, batch, theta, potential, coordinates = given("eight_schools_centered", choice)
    found = pathfinder_starts(
        problem, batch, theta, potential, coordinates, count=8, seed=0, where="test"
    )
    values = torch.stack([potential(point)[0] for point in found])
    assert bool(values.isfinite().all())
    assert len(found.unique(dim=0)) == 8
    sampled = NUTS(draws=300, chains=2, warmup=200, parametrisation=choice, processes=1).fit(
        case("eight_schools_centered").program, case("eight_schools_centered").tasks, compile=False
    )
    drawn = sampled.theta
    # Level 1 alone means the same in all coordinates: μ and log τ within the draws' range.
    for name, at in unpack(problem, found, batch.n_tasks)[0].items():
        low, high = drawn[name].min(), drawn[name].max()
        assert bool(((at > low - 0.5) & (at < high + 0.5)).all()), name


def test_starts_are_the_same_draws_in_all_coordinates():
    """φ of the non-centered starts is φ of the centered ones, to rounding."""
    vectors = {}
    for choice in ("non-centered", "centered"):
        problem, batch, theta, potential, coordinates = given("eight_schools_centered", choice)
        found = pathfinder_starts(
            problem, batch, theta, potential, coordinates, count=3, seed=2, where="test"
        )
        before = coordinates.centered.clone()
        drawn, t = unpack(problem, found, batch.n_tasks)
        phi = coordinates.many({**theta, **drawn}, True, t, batch)[0]
        vectors[choice] = torch.cat([found[:, : problem.sites.theta_size], phi.flatten(1)], 1)
        assert torch.equal(coordinates.centered, before)
        again = pathfinder_starts(
            problem, batch, theta, potential, coordinates, count=3, seed=2, where="test"
        )
        assert torch.equal(again, found)
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


def test_nuts_starts_where_it_is_told(untouched):
    """A short run from Pathfinder's draws has the posterior of the spread one, and repeats itself.

    τ of eight schools is heavy-tailed: means of μ and log τ within 0.4 of their sds, five standard
    errors at 150 effective draws each.
    """
    name = "eight_schools"
    draws = {}
    for initial in ("spread", "pathfinder"):
        strategy = NUTS(draws=300, chains=2, warmup=150, initial=initial, processes=1)
        fits = [
            strategy.fit(case(name).program, case(name).tasks, compile="graph", seed=3)
            for _ in range(1 + (initial == "pathfinder"))
        ]
        assert all(torch.equal(fits[0].theta["tau"], f.theta["tau"]) for f in fits)
        draws[initial] = fits[0].theta
    for site in ("mu", "tau"):
        one, other = draws["spread"][site], draws["pathfinder"][site]
        assert abs(float(one.mean() - other.mean())) < 0.6 * float(one.std())


def test_initial_must_be_known():
    with pytest.raises(DataError, match="found 'adapt_diag'"):
        NUTS(initial="adapt_diag")
