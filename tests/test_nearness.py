"""The distance to the mode of a task: exact where the log joint is quadratic, in any units."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.inference import BMAML, MAML, ImplicitMAML
from hbmeta.nearness import complaint, distance_to_mode
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import reference
from tests.cases import COVARIANCE, MEAN, NOISE, case, rows_of


def test_it_counts_posterior_standard_deviations():
    """Claimed to rounding: √(δᵀ Σ⁻¹ δ / 2) for N(m, Σ), the posterior of a line, at m + δ."""
    tasks = case("linear_own_nested").tasks
    problem = Problem(case("linear_own_nested").program, tasks)
    generator = np.random.default_rng(2)
    points, expected = [], []
    for i in range(tasks.n_tasks):
        mean, covariance = reference.gaussian_posterior(*rows_of(tasks, i), MEAN, COVARIANCE, NOISE)
        off = generator.normal(size=2)
        points.append(mean + off)
        expected.append(np.sqrt(off @ np.linalg.solve(covariance, off) / 2))
    phi = torch.as_tensor(np.array(points))
    found = distance_to_mode(problem, {}, phi, problem.batch(tasks))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def scaled(unit):
    """A log rate a / unit + x b; rows at x far from 0 make a and b depend on each other."""

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 5.0 * unit))
            b = pyro.sample("b", dist.Normal(0.0, 5.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Poisson((a / unit + x[..., 0] * b).exp()), obs=y)

    return program


def test_units_of_phi_drop_out():
    """Claimed to rounding, where the log joint is no quadratic too."""
    x = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(1, 6, 1).expand(2, 6, 1)
    tasks = Tasks(x, torch.tensor([[1.0, 0, 2, 1, 3, 2], [4.0, 6, 5, 9, 7, 12]]).double())
    found = []
    for unit in (1.0, 1e4):
        problem = Problem(scaled(unit), tasks)
        phi = torch.tensor([[0.3 * unit, -0.2], [1.0 * unit, 0.9]], dtype=torch.float64)
        found.append(distance_to_mode(problem, {}, phi, problem.batch(tasks)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0.0)
    assert float(found[0][0]) > 1.0


def two_modes(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        root = pyro.sample("root", dist.Normal(0.0, 3.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(root**2, 0.5), obs=y)


def test_between_two_modes_a_slope_is_far_and_no_number_is_unknown():
    """At φ = 0.2 the log joint curves upwards; NaN only where it has no derivatives."""
    tasks = Tasks(torch.zeros(3, 4, 1).double(), torch.full((3, 4), 4.0).double())
    problem = Problem(two_modes, tasks)
    phi = torch.tensor([[0.2], [1.99], [torch.inf]], dtype=torch.float64)
    found = distance_to_mode(problem, {}, phi, problem.batch(tasks))
    assert float(found[0]) > 2.0
    assert float(found[1]) < 1.0
    assert torch.isnan(found[2])
    assert "task 'a'" in complaint(found, ("a", "b", "c"))
    assert not complaint(found[1:], ("b", "c"))


def test_a_fit_whose_steps_end_too_soon_says_so():
    """Five steps of a millionth of what the rows need; with enough of them there is silence."""
    tasks = case("linear_given_theta").tasks
    settings = {"steps": 1, "compile": False, "progress": False}
    with pytest.warns(UserWarning, match=r"BMAML: needed .* of 4 tasks .* Change steps"):
        fitted = BMAML(steps=5, step_size=1e-6).fit(
            case("linear_given_theta").program, tasks, **settings
        )
    assert fitted.info["distance_to_mode"].shape == (4,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A point does not claim to be a posterior: it is looked at, and predictions judge it.
        point = MAML(steps=5, step_size=1e-6).fit(
            case("linear_given_theta").program, tasks, **settings
        )
        assert complaint(point.info["distance_to_mode"], tasks.ids)
        near = ImplicitMAML(damping=1e-3).fit(case("linear_given_theta").program, tasks, **settings)
    assert float(near.info["distance_to_mode"].max()) < 1.0


def test_networks_are_not_looked_at():
    """Their weights are more than 64."""
    chosen = case("neural_regression")
    fitted = MAML(steps=1).fit(chosen.program, chosen.tasks, steps=1, compile=False)
    assert fitted.problem.sites.phi_size > 64
    assert "distance_to_mode" not in fitted.info
