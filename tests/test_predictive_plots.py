"""Predictive checks and reliability: what is drawn is what a plain calculation gives."""

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from hbmeta import inference, tasks
from hbmeta.errors import DataError
from hbmeta.predictive_plots import predictive_checks, reliability


def program(family):
    def varying(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", family(level), obs=y)

    return varying


FAMILIES = {
    "Normal": lambda level: dist.Normal(level, 0.5),
    "Poisson": lambda level: dist.Poisson(level.exp()),
    "Bernoulli": lambda level: dist.Bernoulli(logits=2.0 * level),
}


def sample(family, seed):
    """20 tasks of 5 rows to adapt to and 10 to predict."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        level = torch.randn(20, 1, generator=generator, dtype=torch.float64)
        y = FAMILIES[family](level.expand(20, 15)).sample()
    x = torch.zeros(20, 15, 1, dtype=torch.float64)
    support, query = (tasks.Tasks(x[:, cut], y[:, cut]) for cut in (slice(5), slice(5, 15)))
    return tasks.Episode(support, query)


def predictive(family, *, strategy=None, seed=0):
    episode = sample(family, seed)
    strategy = strategy or inference.Quadrature()
    fit = strategy.fit(program(FAMILIES[family]), episode.support, compile=False, progress=False)
    return fit.posterior.predict(episode.query), episode.query


def lines(axis):
    return {line.get_label(): line.get_xydata() for line in axis.get_lines()}


def test_pit_of_numbers_is_the_distribution_function_of_their_cdf():
    found, query = predictive("Normal")
    figure = predictive_checks({"exact": found}, query.y)
    (curve,) = figure.axes[1].get_lines()
    x, height = curve.get_data()
    u = np.sort(found.cdf(query.flat_y).flatten().numpy())
    steps = np.searchsorted(u, u, side="right") / len(u)
    # After its jump at the r-th u the curve stands at r/n − u.
    np.testing.assert_allclose(height[2:-1:2], steps - u, atol=1e-12)
    np.testing.assert_allclose(x[2:-1:2], u)
    (band,) = figure.axes[1].collections
    low, high = band.get_paths()[0].get_extents().intervaly
    reach = np.sqrt(np.log(2 / 0.05) / (2 * len(u)))
    assert (low, high) == pytest.approx((-reach, reach))
    assert np.abs(height).max() < reach


def test_too_narrow_predictions_leave_the_band_above_then_below():
    found, query = predictive("Normal")
    sure = {"point": predictive("Normal", strategy=inference.CompletePooling())[0], "exact": found}
    figure = predictive_checks(sure, query.flat_y)
    heights = [figure.axes[i].get_lines()[0].get_ydata() for i in (2, 3)]
    reach = np.sqrt(np.log(2 / 0.05) / (2 * query.n_points))
    assert heights[0].max() > reach
    assert heights[0].min() < -reach
    assert np.abs(heights[1]).max() < reach
    assert figure.axes[2].get_ylim() == figure.axes[3].get_ylim()


@pytest.mark.parametrize("family", ["Poisson", "Bernoulli"])
def test_whole_numbers_have_a_bin_each_and_uniform_u(family):
    found, query = predictive(family)
    figure = predictive_checks({"exact": found}, query.flat_y, seed=3)
    observed = query.flat_y.numpy()
    (stairs,) = [p for p in figure.axes[0].patches if hasattr(p, "get_data")]
    shares, edges, _ = stairs.get_data()
    assert (edges % 1 == 0.5).all()
    assert set(np.diff(edges)) == {1.0}
    counts = np.bincount(observed.astype(int), minlength=len(shares))[: len(shares)]
    np.testing.assert_allclose(shares, counts / len(observed))
    (curve,) = figure.axes[1].get_lines()
    u = curve.get_xdata()[2:-1:2]
    # A right model; the alarm is false once in ten thousand.
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    # And u lies on the steps of the distribution function.
    upper = found.cdf(query.flat_y).flatten().numpy()
    lower = found.cdf(query.flat_y - 1).flatten().numpy()
    assert (np.sort(upper) >= np.sort(u) - 1e-9).all()
    assert (np.sort(lower) <= np.sort(u) + 1e-9).all()


def test_the_band_of_shares_is_that_of_data_sets_drawn():
    found, query = predictive("Bernoulli")
    figure = predictive_checks({"exact": found}, query.flat_y)
    (band,) = figure.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    ones = found.sample(200, 0).flatten(1).mean(1).numpy()
    low, high = np.quantile(ones, [0.05, 0.95])
    assert np.isclose(heights, low).any()
    assert np.isclose(heights, high).any()


def test_reliability_of_numbers_is_their_coverage():
    found, query = predictive("Normal")
    figure = reliability({"exact": found}, query.y)
    drawn = lines(figure.axes[0])["exact"]
    for p, share in drawn[::6]:
        assert share == pytest.approx(float(found.coverage(query.y, float(p)).double().mean()))


def test_reliability_of_two_classes_counts_ones():
    found, query = predictive("Bernoulli")
    figure = reliability({"exact": found}, query.flat_y)
    p, y = found.probabilities[..., 1].flatten().numpy(), query.flat_y.numpy()
    drawn = lines(figure.axes[0])["exact"]
    bins = np.floor(10 * p)
    wanted = [(p[bins == b].mean(), y[bins == b].mean()) for b in np.unique(bins)]
    np.testing.assert_allclose(drawn, wanted)
    assert figure.axes[0].get_ylabel() == "share of ones"


def test_reliability_of_many_classes_is_that_of_the_predicted_one():
    clusters = tasks.Clusters(ways=3, shots=2, queries=20, dtype=torch.float64)
    from hbmeta import models

    episode = clusters.sample(6, seed=1)
    fit = inference.ProtoNet().fit(
        models.ClassConditional(None, 3), clusters.sample(4, seed=0), steps=1, compile=False,
        progress=False,
    )  # fmt: skip
    found = fit.adapt(episode.support).predict(episode.query)
    figure = reliability({"prototypes": found}, episode.query.flat_y)
    drawn = lines(figure.axes[0])["prototypes"]
    p = found.probabilities.flatten(0, -2)
    right = (p.argmax(-1) == episode.query.flat_y).double()
    top = p.max(-1).values
    inside = (top >= drawn[-1, 0] - 0.1) & (torch.floor(10 * top) >= 9)
    assert drawn[-1, 1] == pytest.approx(float(right[inside].mean()))
    assert figure.axes[0].get_ylabel() == "share that it was right"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p, y: ({}, y), "predictives by name"),
        (lambda p, y: ([p], y), "predictives by name"),
        (lambda p, y: ({"a": p}, y[:-1]), "a number each"),
    ],
)
@pytest.mark.parametrize("figure", [predictive_checks, reliability])
def test_mistakes_are_said(figure, arguments, message):
    found, query = predictive("Normal")
    with pytest.raises(DataError, match=message):
        figure(*arguments(found, query.flat_y))


def test_no_share_for_a_band_that_is_none():
    found, query = predictive("Normal")
    with pytest.raises(DataError, match="alpha between 0 and 1"):
        predictive_checks({"a": found}, query.flat_y, alpha=1.0)


def test_numbers_and_classes_have_no_common_figure():
    number, query = predictive("Normal")
    classes, _ = predictive("Bernoulli")
    with pytest.raises(DataError, match="same response"):
        reliability({"a": number, "b": classes}, query.flat_y)
