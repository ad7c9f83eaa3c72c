"""Standard errors of θ̂ in closed form, against numerical Hessians, and where there are none."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from hbmeta.errors import ConvergenceError, CurvatureError, UnsupportedModelError
from hbmeta.inference import MAML, ExactGP, ExactLinear, Laplace, Quadrature
from hbmeta.standard_errors import standard_errors
from hbmeta.tasks import Tasks
from tests.cases import case, rows_of

NOISE, GROUPS, POINTS = 0.7, 40, 5


def means(x, y=None):
    """ȳ_i ~ N(μ, τ² + σ²/n) with σ given."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    pyro.deterministic("variance", tau**2)
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(mu + tau * z, NOISE), obs=y)


def groups(*, spread=1.2, seed=0) -> Tasks:
    rng = np.random.default_rng(seed)
    level = 2.0 + spread * rng.standard_normal((GROUPS, 1))
    return Tasks(
        np.zeros((GROUPS, POINTS, 1)), level + NOISE * rng.standard_normal((GROUPS, POINTS))
    )


@pytest.mark.parametrize("strategy", [ExactLinear(), Laplace(prior=False), Quadrature(nodes=80)])
def test_closed_form(strategy):
    """SE(μ̂) = √(v/T); at the maximum the observed information of v is T/(2v²): SE(τ̂²) = v √(2/T).

    θ̂ itself is known to about 1e-5 (L-BFGS), the grid of Quadrature is good to 1e-6.
    """
    tasks = groups()
    found = standard_errors(strategy.fit(means, tasks, compile=False))
    level = tasks.y.mean(-1)
    v = float(level.var(correction=0))
    assert not found.prior
    assert float(found.estimates["mu"]) == pytest.approx(float(level.mean()), abs=1e-4)
    tau = math.sqrt(v - NOISE**2 / POINTS)
    assert float(found.estimates["variance"]) == pytest.approx(tau**2, rel=1e-4)
    assert float(found.errors["mu"]) == pytest.approx(math.sqrt(v / GROUPS), rel=1e-4)
    assert float(found.errors["variance"]) == pytest.approx(v * math.sqrt(2 / GROUPS), rel=1e-4)
    # By the delta method dτ² = 2τ dτ, and in unconstrained space d log τ = dτ / τ.
    assert float(found.errors["tau"]) == pytest.approx(
        v * math.sqrt(2 / GROUPS) / (2 * tau), rel=1e-4
    )
    expected = np.array([v / GROUPS, 2 * v**2 / GROUPS / (2 * tau**2) ** 2])
    np.testing.assert_allclose(found.covariance.diagonal(), expected, rtol=1e-4)
    assert abs(float(found.covariance[0, 1])) < 1e-4 * math.sqrt(expected.prod())
    assert found.names == ("mu", "tau")
    frame = found.to_frame()
    assert list(frame.index) == ["mu", "tau", "variance"]
    assert "standard_error" in str(found)


def test_laplace_of_counts_against_a_numerical_hessian():
    """log p(y | θ) of Laplace's own evidence by SciPy, its Hessian by plain differences."""
    name = "poisson_offset"
    fitted = Laplace().fit(case(name).program, case(name).tasks, compile=False)
    found = standard_errors(fitted)
    rows = [rows_of(fitted.tasks, i) for i in range(fitted.tasks.n_tasks)]
    at = np.array([float(fitted.theta["mean"]), float(fitted.theta["scale"])])

    def total(u):
        """Modes by Newton; sites as in the program: mean, and the log of scale."""
        value = 0.0
        for x, y in rows:
            z = 0.0
            for _ in range(60):
                rate = np.exp(u[0] + np.exp(u[1]) * z + x[:, 0])
                slope = np.exp(u[1]) * (y - rate).sum() - z
                precision = 1 + np.exp(2 * u[1]) * rate.sum()
                z += slope / precision
            value += stats.poisson(rate).logpmf(y).sum() + stats.norm.logpdf(z)
            value += 0.5 * np.log(2 * np.pi / precision)
        prior = fitted.problem.log_prior(
            {"mean": torch.tensor(u[:1]), "scale": torch.tensor(u[1:])},
            fitted.problem.batch(fitted.tasks),
        )
        return value + float(prior)

    h = 1e-3
    hessian = np.empty((2, 2))
    for i in range(2):
        for j in range(2):
            a, b = h * np.eye(2)[i], h * np.eye(2)[j]
            corners = total(at + a + b) - total(at + a - b) - total(at - a + b) + total(at - a - b)
            hessian[i, j] = corners / (4 * h * h)
    # Second differences of width 1e-3 are good to about 1e-6.
    np.testing.assert_allclose(found.covariance, np.linalg.inv(-hessian), rtol=1e-4)
    assert found.prior


def test_they_shrink_as_groups_come_in():
    """Four times the groups halve them: exactly, where the groups are the same four times."""
    few = groups()
    many = Tasks(few.x.repeat(4, 1, 1), few.y.repeat(4, 1))
    one, other = (
        standard_errors(Laplace(prior=False).fit(means, t, compile=False)) for t in (few, many)
    )
    for name in ("mu", "tau"):
        assert float(one.errors[name]) == pytest.approx(2 * float(other.errors[name]), rel=1e-4)


def test_kernels_and_parameters_of_a_module():
    name = "module_parameters"
    found = standard_errors(Laplace().fit(case(name).program, case(name).tasks, compile=False))
    known = standard_errors(
        ExactLinear(prior=True).fit(case(name).program, case(name).tasks, compile=False)
    )
    assert set(found.errors) == {"weight", "bend", "start", "noise_unconstrained"}
    for site, error in known.errors.items():
        torch.testing.assert_close(found.errors[site], error, rtol=1e-3, atol=0)
    name = "gaussian_process_learned"
    found = standard_errors(
        ExactGP(nodes=32, prior=True).fit(case(name).program, case(name).tasks, compile=False)
    )
    assert all(bool((e > 0).all()) for e in found.errors.values())


def test_no_standard_errors_at_a_boundary():
    tasks = Tasks(np.zeros((6, 4, 1)), np.tile([0.5, -0.7, 0.9, -0.6], (6, 1)))
    with pytest.warns(UserWarning, match="the estimate of tau is zero"):
        fitted = ExactLinear().fit(means, tasks, compile=False)
    with pytest.raises(UnsupportedModelError, match="the estimate of tau at zero, the boundary"):
        standard_errors(fitted)


SCALES = {
    "uniform": lambda: dist.Uniform(0.0, 20.0),
    "weibull": lambda: dist.Weibull(5.0, 2.0),
    "chi2": lambda: dist.Chi2(3.0),
    "folded": lambda: dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 5.0)),
    "vector": lambda: dist.Uniform(0.0, 20.0).expand([1]).to_event(1),
}


def schools(prior):
    def program(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", SCALES[prior]()).sum()
        with pyro.plate("task", x.shape[0], dim=-2):
            effect = pyro.sample("effect", dist.Normal(mu, tau))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(effect, x[..., 0]), obs=y)

    return program


@pytest.mark.parametrize(
    ("strategy", "prior"),
    [
        (ExactLinear(), "uniform"),
        (Laplace(prior=False), "uniform"),
        (Quadrature(), "uniform"),
        *((ExactLinear(), prior) for prior in SCALES if prior != "uniform"),
    ],
)
def test_a_scale_at_zero_is_named_whatever_its_prior(strategy, prior):
    """Eight schools, whose estimate of the scale between schools is zero (BDA3, §5.5)."""
    with pytest.warns(UserWarning, match="the estimate of tau is zero"):
        fitted = strategy.fit(schools(prior), case("eight_schools").tasks, compile=False)
    with pytest.raises(UnsupportedModelError, match="the estimate of tau at zero, the boundary"):
        standard_errors(fitted)


def test_only_supports_that_start_at_zero_have_that_boundary():
    """A lower end elsewhere, however near the estimate, is no variance of zero; nor is a share."""

    def program(x, y=None):
        low = pyro.sample("low", dist.Uniform(-1.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("task", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(low + share[..., 0], 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    tasks = Tasks(np.zeros((4, 2, 1)), np.full((4, 2), -9.0))
    assert ExactLinear().fit(program, tasks, compile=False).info["at_zero"] == []


def test_the_damping_of_the_fit_is_that_of_its_errors():
    """θ̂ under a δ that was chosen is the maximum of that evidence, as under one that was given."""
    tasks = groups()
    given = Laplace(prior=False, damping=2.0).fit(means, tasks, compile=False)
    assert given.info["damping"] == [2.0] * GROUPS
    known = standard_errors(given)
    chosen = Laplace(prior=False).fit(means, tasks, compile=False)
    assert chosen.info["damping"] == [0.0] * GROUPS
    chosen.theta.update(given.theta)
    with pytest.raises(ConvergenceError, match="would still gain"):
        standard_errors(chosen)
    chosen.info["damping"] = given.info["damping"]
    found = standard_errors(chosen)
    torch.testing.assert_close(found.covariance, known.covariance, rtol=1e-6, atol=0)


def test_no_standard_errors_without_a_maximum():
    fitted = Laplace(prior=False).fit(means, groups(), compile=False)
    fitted.theta["mu"] += 0.5
    with pytest.raises(ConvergenceError, match="would still gain"):
        standard_errors(fitted)


def test_what_the_data_do_not_tell_is_named():
    def twice(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(a + b, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    fitted = ExactLinear().fit(twice, groups(), compile=False)
    with pytest.raises(CurvatureError, match=r"along a direction of '[ab]'"):
        standard_errors(fitted)


def test_other_strategies_have_none():
    fitted = MAML(steps=1).fit(means, groups(), steps=1, compile=False)
    with pytest.raises(UnsupportedModelError, match="found MAML"):
        standard_errors(fitted)
    name = "linear_given_theta"
    given = ExactLinear().fit(case(name).program, case(name).tasks, compile=False)
    with pytest.raises(UnsupportedModelError, match="found 0"):
        standard_errors(given)
