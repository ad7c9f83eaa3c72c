"""Draws from a prior: consistent with the densities, seeded, refused where it is improper."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from scipy import stats

from hbmeta.errors import ConvergenceError, UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.simulation import simulate
from tests import cases

NAMES = (
    *("two_coefficients", "eight_schools_centered", "lognormal_poisson"),
    *("varying_intercepts", "gaussian_process_learned"),
)


def bound(case):
    program = case.program
    return program.bind(case.tasks) if hasattr(program, "bind") else program


@pytest.mark.parametrize("name", NAMES)
def test_what_was_drawn_is_what_the_program_makes_of_it(name, untouched):
    """θ and φ in unconstrained space give back every constrained value, in all three layouts."""
    case = cases.case(name)
    problem = Problem(bound(case), case.tasks)
    with untouched():
        found = simulate(problem, {}, case.tasks, 3)
        again, other = (simulate(problem, {}, case.tasks, seed) for seed in (3, 4))
    values = problem.values(found.theta, found.phi, problem.batch(case.tasks))
    assert set(values) == set(found.values)
    for site, value in values.items():
        torch.testing.assert_close(found.values[site].expand_as(value), value)
    assert torch.equal(found.tasks.flat_y, again.tasks.flat_y)
    assert not torch.equal(found.tasks.flat_y, other.tasks.flat_y)
    assert found.tasks.flat_y.dtype == case.tasks.flat_y.dtype
    assert torch.equal(found.tasks.flat_x, case.tasks.flat_x)
    assert found.tasks.ids == case.tasks.ids


def test_draws_are_from_the_prior():
    case = cases.case("gamma_poisson")
    problem = Problem(case.program, case.tasks)
    found = [simulate(problem, {}, case.tasks, seed) for seed in range(200)]
    rates = torch.stack([one.values["rate"] for one in found]).flatten()
    expected = stats.gamma(cases.RATE_SHAPE, scale=1 / cases.RATE_RATE)
    # One set of seeds in 100,000 gives a smaller p-value.
    assert stats.kstest(rates.numpy(), expected.cdf).pvalue > 1e-5
    y = torch.stack([one.tasks.flat_y for one in found])
    rate = torch.stack([one.values["rate"] for one in found])[:, case.tasks.task]
    standard = ((y - rate) / rate.sqrt()).flatten()
    # Mean 0 and sd 1: five standard errors.
    assert abs(float(standard.mean())) < 5 / len(standard) ** 0.5


def test_a_site_that_is_held_is_not_drawn():
    case = cases.case("eight_schools_centered")
    problem = Problem(case.program, case.tasks)
    held = {"mu": torch.tensor(2.5).double(), "tau": torch.tensor(1e-6).double().log()}
    found = simulate(problem, held, case.tasks, 0)
    effect = found.values["effect"]
    torch.testing.assert_close(effect, torch.full_like(effect, 2.5), atol=1e-4, rtol=0)
    assert found.theta == held


def with_prior(prior, factor=False, y_scale=1.0):
    def program(x, y=None):
        mean = pyro.sample("mean", prior())
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(mean, 1.0))
            if factor:
                pyro.factor("tilt", -phi.square())
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi * y_scale, 1.0), obs=y)

    return program


@pytest.mark.parametrize(
    ("program", "found", "error"),
    [
        (with_prior(lambda: dist.Normal(0.0, 1.0).mask(False)), "masked", UnsupportedModelError),
        (with_prior(lambda: dist.Normal(0.0, 1.0), factor=True), "tilt", UnsupportedModelError),
        (with_prior(lambda: dist.Normal(0.0, 1.0), y_scale=1e400), "NaN", ConvergenceError),
    ],
)
def test_what_cannot_be_drawn_is_refused(program, found, error):
    tasks = cases.case("two_coefficients").tasks
    sound = Problem(with_prior(lambda: dist.Normal(0.0, 1.0)), tasks)
    sound.program = program  # past the inspection, which refuses some of them too
    with pytest.raises(error, match=found):
        simulate(sound, {}, tasks, 0)


def test_an_improper_prior_is_refused():
    tasks = cases.case("two_coefficients").tasks
    flat = with_prior(lambda: dist.ImproperUniform(constraints.real, (), ()))
    problem = Problem(with_prior(lambda: dist.Normal(0.0, 1.0)), tasks)
    problem.program = flat
    with pytest.raises(UnsupportedModelError, match="'mean', which cannot be drawn from"):
        simulate(problem, {}, tasks, 0)
