"""The baselines where a likelihood has a saddle, or no maximum."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta import models
from hbmeta.inference import CompletePooling, NoPooling
from hbmeta.tasks import Tasks


def squared(x, y=None):
    """y ~ N(φ², s): where φ starts, at 0, the likelihood has no gradient."""
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi**2, noise), obs=y)


def tasks_of(y, ids="abc") -> Tasks:
    y = torch.tensor(y, dtype=torch.float64)
    return Tasks(torch.zeros(*y.shape, 1, dtype=torch.float64), y, ids=list(ids))


SQUARES = [[1.0, 1.1, 0.9], [2.0, 2.1, 1.9], [3.0, 2.9, 3.1]]


def test_no_pooling_leaves_a_saddle():
    """Each task's φ² is its mean, the noise the root mean square of what is left."""
    tasks = tasks_of(SQUARES)
    fitted = NoPooling().fit(squared, tasks, compile=False)
    means = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for posterior in (fitted.posterior, fitted.adapt(tasks)):
        torch.testing.assert_close(
            posterior.density.loc[:, 0].square(), means, rtol=1e-4, atol=1e-4
        )
    assert float(fitted.globals()["noise"]) == pytest.approx((0.02 / 3) ** 0.5, rel=1e-3)
    assert fitted.info["converged"]


def test_complete_pooling_leaves_a_saddle():
    fitted = CompletePooling().fit(squared, tasks_of(SQUARES), compile=False)
    torch.testing.assert_close(
        fitted.density.loc.square(), torch.full((3, 1), 2.0).double(), rtol=1e-4, atol=1e-4
    )


def test_a_task_without_a_maximum_is_named_when_adapting_too():
    counts = tasks_of([[1.0, 3.0, 2.0], [4.0, 2.0, 3.0], [2.0, 1.0, 1.0]])
    fitted = NoPooling().fit(models.VaryingEffects(family="poisson"), counts, compile=False)
    new = tasks_of([[0.0, 0.0, 0.0], [2.0, 5.0, 1.0], [0.0, 0.0, 0.0]], ids="xyz")
    with pytest.warns(UserWarning, match=r"NoPooling.adapt: .* no maximum for 'x', 'z' \("):
        posterior = fitted.adapt(new)
    rate = posterior.predict(new).mean[1]
    torch.testing.assert_close(rate, torch.full((3,), 8 / 3).double(), rtol=1e-6, atol=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted.adapt(new.select(["y"]))
        # A task without rows stays at the location of its prior.
        fitted.adapt(new.keep(torch.zeros(9, dtype=torch.bool)))
    assert caught == []
