"""What the amortized guide asks of a task prior: that it is a density."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from hbmeta import models
from hbmeta.errors import UnsupportedModelError
from hbmeta.inference import AmortizedGuide, LatentNP, amortized_guide
from hbmeta.tasks import Tasks

ROWS = Tasks(torch.ones(3, 4, 1).double(), torch.arange(12.0).reshape(3, 4).double() + 1.0)


def program(law, other=None):
    """A site `phi` of this law, and `other` of another."""

    def model(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", law())
            phi = phi if other is None else phi + pyro.sample("other", other(phi))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi + 0.0 * x[..., 0], 1.0), obs=y)

    return model


def improper():
    return lambda *_: dist.ImproperUniform(constraints.real, (), ())


def fit(model, strategy, tasks=ROWS):
    return strategy.fit(model, tasks, steps=1, compile=False, progress=False)


@pytest.mark.parametrize("strategy", [AmortizedGuide(hidden=4), LatentNP(hidden=4)])
@pytest.mark.parametrize(
    ("model", "site"),
    [
        (program(improper()), "phi"),
        (program(lambda: dist.Normal(0.0, 1.0), improper()), "other"),
        (models.ClassConditional(None, 3), "means"),
    ],
    ids=["real", "one of two", "class means"],
)
def test_a_flat_task_prior_is_refused(model, site, strategy):
    tasks = ROWS if site != "means" else Tasks(ROWS.x, torch.tensor([[0, 1, 2, 0]] * 3))
    with pytest.raises(UnsupportedModelError, match="a proper task prior") as caught:
        fit(model, strategy, tasks)
    assert caught.value.found == f"a flat one of {site!r}"
    assert "prior_scale" in caught.value.do


@pytest.mark.parametrize(
    ("law", "other"),
    [
        (lambda: dist.Laplace(0.0, 2.0), None),
        (lambda: dist.Normal(3.0, 1e4), None),
        (lambda: dist.Uniform(0.0, 9.0), None),
        (lambda: dist.HalfCauchy(2.0), None),
        (lambda: dist.Normal(0.0, 1.0), lambda phi: dist.Laplace(phi, 1.0)),
    ],
    ids=["kink", "wide", "bounded", "tails", "hierarchy"],
)
def test_a_density_is_not_mistaken_for_a_flat_prior(law, other):
    density = fit(program(law, other), AmortizedGuide(hidden=4)).adapt(ROWS).density
    assert bool(torch.isfinite(density.loc).all())


@pytest.mark.parametrize(
    "model", [models.VaryingEffects(fixed=[]), program(lambda: dist.Normal(0.0, 1.0))]
)
def test_tasks_in_parts_are_tasks_at_once(model, monkeypatch):
    """So many rows that they are read part by part, a task without rows among them."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5, 1, 2, 4, 3])
    task = torch.arange(7).repeat_interleave(counts)
    y = torch.randn(len(task), generator=generator, dtype=torch.float64)
    tasks = Tasks.from_flat(y.unsqueeze(1).cos(), y, task, 7)
    fitted = fit(model, AmortizedGuide(hidden=4), tasks)
    once = fitted.adapt(tasks).density
    monkeypatch.setattr(amortized_guide, "_ROWS_AT_ONCE", 5)
    parts = fitted.adapt(tasks).density
    torch.testing.assert_close(parts.loc, once.loc, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts.scale, once.scale, atol=1e-12, rtol=0)
