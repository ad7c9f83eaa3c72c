"""Effects of level 1 with a scale of their own: found in both forms, refused, integrated out."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.effects import SharedEffects, shared_effects
from hbmeta.errors import UnsupportedModelError
from hbmeta.inference import (
    MAML,
    AmortizedGuide,
    ExactLinear,
    Laplace,
    NestedLaplace,
    NoPooling,
    Variational,
)
from hbmeta.problem import Problem
from tests import fits
from tests.cases import NAMES, case
from tests.inference.test_crossed_laplace import ITEMS, data, ratings

SCALES = {
    "a scale": lambda: pyro.sample("tau", dist.HalfNormal(1.0)),
    "a precision": lambda: pyro.sample("tau", dist.Gamma(2.0, 2.0)) ** -0.5,
    "a logarithm": lambda: pyro.sample("tau", dist.Normal(0.0, 1.0)).exp(),
    "between bounds": lambda: pyro.sample("tau", dist.Uniform(0.0, 3.0)),
    "one of several": lambda: pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))[1],
}


def non_centered(scale):
    """The ratings of tests/inference/test_crossed_laplace.py with item = τ z."""

    def program(x, y=None, *, task, n_tasks):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = scale()
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        slopes = pyro.sample("slopes", dist.Normal(x.new_zeros(ITEMS), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(x.new_zeros(ITEMS), 1.0).to_event(1))
        which = x[:, 0].long()
        with pyro.plate("task", n_tasks):
            person = pyro.sample("person", dist.Normal(x.new_zeros(()), spread))
        with pyro.plate("point", x.shape[0]):
            mean = mu + slopes[which] * x[:, 0] + tau * z[which] + person[task]
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return program


def found_in(program, tasks):
    problem = Problem(program, tasks)
    return shared_effects(problem, problem.batch(tasks[:2]))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_effects_are_found_whatever_their_scale_is(scale, dtype):
    """ "slopes", which no scale multiplies, are none."""
    assert found_in(non_centered(scale), data().to(dtype=dtype)) == SharedEffects((), ("z",))


def test_effects_are_found_centered():
    assert found_in(ratings, data()) == SharedEffects(("item",), ())


def test_no_case_of_the_contract_has_any():
    """Means, scales, coefficients, kernels and networks of level 1: no false alarm."""
    for name in NAMES:
        program, tasks = case(name).program, case(name).tasks
        program = program.bind(tasks) if hasattr(program, "bind") else program
        assert found_in(program, tasks) == SharedEffects((), ()), name


@pytest.mark.parametrize(
    "strategy",
    [MAML(), AmortizedGuide(), ExactLinear(), NoPooling(), Variational(), Laplace(damping=0.1)],
    ids=lambda strategy: strategy.name,
)
def test_strategies_that_hold_them_at_a_point_refuse(strategy):
    with pytest.raises(UnsupportedModelError, match=r"'item', whose scale.*integrated=\('item',\)"):
        fits.fit(strategy, data(), ratings)
    with pytest.raises(UnsupportedModelError, match=r"'z', effects that.*integrated=\('z',\)"):
        fits.fit(strategy, data(), non_centered(SCALES["a scale"]))


def test_laplace_integrates_effects_out_by_itself():
    """The fit is that of the setting, and its scale the centered program's, to the tolerance."""
    centered = Laplace().fit(ratings, data(), compile=False)
    assert centered.info["integrated"] == ["item"]
    asked = Laplace(integrated=("item",)).fit(ratings, data(), compile=False)
    assert torch.equal(centered.theta["tau"], asked.theta["tau"])
    assert centered.strategy == asked.strategy

    def apart(x, y=None, *, task, n_tasks):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(x.new_zeros(ITEMS), 1.0).to_event(1))
        with pyro.plate("task", n_tasks):
            person = pyro.sample("person", dist.Normal(x.new_zeros(()), spread))
        with pyro.plate("point", x.shape[0]):
            mean = mu + tau * z[x[:, 0].long()] + person[task]
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    fitted = Laplace().fit(apart, data(), compile=False)
    assert fitted.info["integrated"] == ["z"]
    for name in ("mu", "tau", "spread", "sigma"):
        # Both searches end at 1e-6 nats per row and unit.
        np.testing.assert_allclose(fitted.theta[name][0], centered.theta[name][0], atol=1e-4)


def test_nested_laplace_draws_them_in_either_form():
    """One posterior in two parametrisations, each by weights around modes of its own."""

    def apart(x, y=None, *, task, n_tasks):
        zero = x.new_zeros(())
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        z = pyro.sample("z", dist.Normal(zero, 1.0).expand([ITEMS]).to_event(1))
        item = pyro.deterministic("item", tau * z)
        with pyro.plate("task", n_tasks):
            person = pyro.sample("person", dist.Normal(zero, spread))
        with pyro.plate("point", x.shape[0]):
            pyro.sample("y", dist.Normal(mu + item[x[:, 0].long()] + person[task], sigma), obs=y)

    few = data(persons=12, rows=60)  # with much data the other form is far from a Student-t
    fitted = [NestedLaplace().fit(program, few, compile=False) for program in (ratings, apart)]
    assert all(fit.info["pareto_k"] < 0.7 for fit in fitted)
    one, other = (fit.globals() for fit in fitted)
    for name in ("mu", "tau", "spread", "sigma", "item"):
        # 2,000 draws, 300 of them effective at worst: errors of 0.06 sd, and 5 of them.
        gap = (one[name].mean(0) - other[name].mean(0)).abs() / other[name].std(0)
        assert float(gap.max()) < 0.3, name
