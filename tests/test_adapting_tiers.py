"""Adapting runs as the fit did, and traces once for data of one shape."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta import staging
from hbmeta.inference import SGLD, Variational
from hbmeta.tasks import Tasks

F64 = torch.float64
STRATEGIES = [
    Variational(fixed_draws=4),
    Variational(family="flow", fixed_draws=4, steps=3, hidden=2),
    SGLD(draws=5, warmup=8, thin=1, chains=2),
    SGLD(draws=5, warmup=8, thin=1, chains=2, rows=2),
]


def data(shift=0.0):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 12, generator=g, dtype=F64)
    return Tasks.from_flat(x[:, None], y + shift, torch.arange(12) // 4, 3)


def plain(x, y=None, *, size=lambda x: 1):
    """Means of tasks."""
    k = size(x)
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones((), dtype=F64)))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(z * k, scale), obs=y)


@pytest.fixture
def traced(monkeypatch):
    """Names of the functions that were traced; "auto" climbs at once."""
    names, trace = [], staging.trace

    def counted(function, args):
        names.append(function.__qualname__)
        return trace(function, args)

    def at_once(self, plan):
        return "graph" if self.wanted == "auto" else self.wanted

    monkeypatch.setattr(staging, "trace", counted)
    monkeypatch.setattr(staging.Staged, "_target", at_once)
    return names


def levels(x, y=None):
    """The same with a size that is read from the data: no graph can have it."""
    return plain(x, y, size=lambda x: int(x.max().item()) + 1)


def fit(strategy, program, tier):
    return strategy.fit(program, data(), steps=2, compile=tier, progress=False)


@pytest.mark.filterwarnings("ignore:SGLD. split R̂")
# (A mini-batch of each chain is mapped over the program, which then cannot read a size at all.)
@pytest.mark.parametrize("strategy", STRATEGIES[:-1], ids=repr)
def test_what_was_fitted_without_a_graph_is_adapted_without_one(strategy, traced):
    fitted = fit(strategy, levels, False)
    found = fitted.adapt(data(0.3)).moments()["z"]
    assert traced == []
    assert all(bool(torch.isfinite(part).all()) for part in found)


@pytest.mark.filterwarnings("ignore:SGLD. split R̂")
@pytest.mark.parametrize(
    "strategy", [s for s in STRATEGIES if s.settings().get("family") != "flow"], ids=repr
)
def test_data_of_one_shape_are_traced_once(strategy, traced):
    """The graph takes other data as inputs: the second answer is that of the eager function."""
    fitted = fit(strategy, plain, "graph")
    fitted.adapt(data(0.1))
    before = len(traced)
    found = fitted.adapt(data(0.3)).moments()["z"]
    assert len(traced) == before > 0
    expected = fit(strategy, plain, False).adapt(data(0.3)).moments()["z"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
