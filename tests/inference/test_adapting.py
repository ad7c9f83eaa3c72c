"""Tasks that a fit knows, under every strategy that keeps draws of θ given all of its rows.

Their rows are in the draws of θ already: weights p(S | θ) for them would count the rows twice.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from hbmeta.inference import NUTS, Laplace, NestedLaplace, Pathfinder, Variational
from hbmeta.tasks import Tasks
from tests import fits

STRATEGIES = {
    "NUTS": NUTS(draws=50, chains=2, warmup=50, max_tree_depth=4, processes=1),
    "Pathfinder": Pathfinder(paths=2, draws=100),
    "Variational": Variational(theta="distribution"),
    "Laplace": Laplace(integrated=("mu",)),
    "NestedLaplace": NestedLaplace(draws=100, proposals=2),
}
DATA = Tasks(
    torch.zeros(4, 3, 1, dtype=torch.float64),
    torch.tensor(
        [[1.2, 0.7, 1.6], [-0.4, 0.1, 0.2], [0.9, 1.1, 0.3], [2.0, 1.4, 1.9]], dtype=torch.float64
    ),
    ids=["a", "b", "c", "d"],
)
NEW = Tasks(
    torch.zeros(1, 2, 1, dtype=torch.float64),
    torch.tensor([[0.5, 0.8]], dtype=torch.float64),
    ids=["new"],
)


def means(x, y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 2.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(mu, 0.8))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi, 0.5), obs=y)


@pytest.fixture(scope="module", params=STRATEGIES)
def fitted(request):
    return fits.fit(STRATEGIES[request.param], DATA, means, steps=200, compile="graph")


def together(*parts: Tasks) -> Tasks:
    """All tasks of several batches of one task each."""
    return Tasks.from_flat(
        torch.cat([part.flat_x for part in parts]),
        torch.cat([part.flat_y for part in parts]),
        torch.cat([part.task + k for k, part in enumerate(parts)]),
        len(parts),
        ids=[part.ids[0] for part in parts],
    )


def quietly(fitted, support):
    """Adapted, where few draws are said of so small a fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fitted.adapt(support)


def test_the_rows_of_a_task_count_once(fitted):
    """Adapting to what was fitted is the posterior of the fit, not a second use of its rows."""
    assert fitted.drawn
    assert fitted.adapt(fitted.tasks) is fitted.posterior
    ids = ["c", "a"]
    some = fitted.adapt(fitted.tasks.select(ids))
    assert torch.equal(some.density.phi, fitted.density.phi[:, [2, 0]])
    # Beside a new task, a known one keeps the draws of the fit, in step with those of θ.
    found = quietly(fitted, together(fitted.tasks.select(["c"]), NEW))
    assert torch.equal(found.density.phi[:, 0], fitted.density.phi[:, 2])
    draws = len(fitted.density.phi)
    assert float(found.info["effective_draws"][0]) == pytest.approx(draws)
    alone = quietly(fitted, NEW)
    assert float(alone.info["effective_draws"]) < 0.999 * draws
    torch.testing.assert_close(found.density.log_weights[:, 1:], alone.density.log_weights)


def test_other_rows_of_a_known_task_are_told_of(fitted):
    known = fitted.tasks.select(["b"])
    more = Tasks.from_flat(
        torch.cat([known.flat_x, NEW.flat_x]),
        torch.cat([known.flat_y, NEW.flat_y]),
        torch.zeros(5, dtype=torch.long),
        1,
        ids=["b"],
    )
    name = fitted.strategy.name
    with pytest.warns(
        UserWarning, match=rf"{name}\.adapt: task 'b' was fitted with other rows"
    ) as w:
        fitted.adapt(more)
    assert all(warning.filename == __file__ for warning in w)
    # Without rows there is nothing to count twice, and the prior given the fit is exact.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = fitted.adapt(known.keep(torch.zeros(3, dtype=torch.bool)))
    assert float(nothing.info["effective_draws"]) == pytest.approx(len(fitted.density.phi))


class Lines(nn.Module):
    """Effects of level 1 beside a parameter of the module, which has no draws."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, x, y=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=x.dtype), 2.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(mu, 0.8))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi + x @ self.weight, 0.5), obs=y)


@pytest.mark.parametrize("name", ["Variational", "Laplace"])
def test_parameters_without_a_prior_have_one_value(name):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 3, 2)
    data = Tasks(x, DATA.y, ids=DATA.ids)
    fitted = fits.fit(STRATEGIES[name], data, Lines())
    assert fitted.theta["weight"].shape == (2,)
    new = Tasks(x[:1], DATA.y[:1] + 1.0, ids=["new"])
    found = quietly(fitted, new)
    assert torch.isfinite(found.density.phi).all()
