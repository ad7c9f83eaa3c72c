import math
from dataclasses import replace

import pytest
import torch

from hbmeta.densities import Delta, Gaussian
from hbmeta.inference import ExactLinear
from hbmeta.models import LinearRegression
from hbmeta.posterior import TaskPosterior
from hbmeta.scores import gaussian_kl
from hbmeta.studies import linear
from hbmeta.studies.linear import divergences, mean_field_divergence
from hbmeta.tasks import LinearTasks

# Chains are too short here to converge, and fit says so.
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:UserWarning")

TINY = linear.Budget(guide=30, draws=150, tasks=12)


@pytest.fixture(scope="module")
def outcome():
    return linear.run(budget=TINY, compile="graph")


@pytest.fixture(scope="module")
def exact():
    family = LinearTasks(linear._MEAN, linear._COVARIANCE, noise=0.5, shots=(1, 6))
    model = LinearRegression(mean=linear._MEAN, covariance=linear._COVARIANCE, noise=0.5)
    support = family.sample(5, seed=3).support
    return ExactLinear().fit(model, support).posterior_of(support)


def test_points_have_no_spread_and_references_have_the_right_one(outcome):
    rows = {row.name: row for row in outcome.comparisons["all"].rows}
    assert [*rows][:3] == ["exact", "quadrature", "nuts"]
    spread = {name: row.distance.sd_ratio for name, row in rows.items() if row.distance}
    assert spread["maml"] == spread["no pooling"] == spread["complete pooling"] == 0.0
    assert spread["quadrature"] == pytest.approx(1.0, abs=0.05)
    # The sd of 600 draws, an effective number of 200 or more, has a relative error below 0.05; this
    # is the median over 24 of them.
    assert spread["nuts"] == pytest.approx(1.0, abs=0.1)
    assert "exact                             0            0" in outcome.text
    assert all(len(line) <= 100 for line in outcome.text.splitlines())


@pytest.mark.slow
def test_divergences_order_the_strategies_as_theory_says():
    budget = replace(TINY, guide=3_000, tasks=40)
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        patch.setattr(linear, "_text", lambda values, *_: found.update(values) or "")
        linear.run(budget=budget, compile="graph")
    kl = {name: value for name, (value, _) in found.items()}
    exact, full, mean_field = kl["exact"], kl["amortized full"], kl["amortized mean-field"]
    assert exact == pytest.approx(0.0, abs=1e-12)
    # No factorised Gaussian is nearer than the best one, which is 0.3 or more away here.
    assert full < 0.1 < 0.3 < mean_field < kl["maml"] == math.inf


def test_no_fit_saw_what_it_is_judged_by(outcome):
    assert not any(row.saw_query for row in outcome.comparisons["all"].rows)


def test_a_factorised_gaussian_is_as_far_off_as_theory_says(exact):
    whole = exact.density
    precision = torch.cholesky_inverse(whole.scale)
    sd = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    best = TaskPosterior(exact.problem, exact.theta, Gaussian(whole.loc, sd), exact.support)
    covariance = whole.scale @ whole.scale.mT
    dense = gaussian_kl(whole.loc, torch.diag_embed(sd.square()), whole.loc, covariance)
    assert mean_field_divergence(exact) == pytest.approx(float(dense.mean()), abs=1e-9)
    found = divergences({"exact": exact, "best": best, "wide": best})
    assert found["exact"] == pytest.approx((0.0, 0.0), abs=1e-6)
    assert found["best"][0] == pytest.approx(mean_field_divergence(exact), abs=1e-9)


def test_a_point_is_infinitely_far(exact):
    point = exact.select(exact.ids)
    point.density = Delta(exact.density.loc)
    assert math.isinf(divergences({"exact": exact, "point": point})["point"][0])


def test_the_figure_needs_no_task_of_three_points(exact):
    few = exact.select([i for i, n in zip(exact.ids, exact.support.counts, strict=True) if n != 3])
    figure = linear._figures({"exact": few})["posterior"]()
    assert len(figure.axes) == 3


def test_numbers_that_are_not_finite_are_said():
    numbers = [math.nan, math.inf, 1e-9, -1e-9, 0.123]
    assert [linear._number(value) for value in numbers] == ["NaN", "∞", "0", "0", "0.12"]


def test_the_figure_shows_one_task(outcome):
    assert set(outcome.figures) == {"posterior"}
    figure = outcome.figures["posterior"]()
    assert len(figure.axes) == 3
