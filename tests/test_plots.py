import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from hbmeta import inference, models, plots, tasks
from hbmeta.comparison import compare
from hbmeta.densities import Delta
from hbmeta.errors import DataError
from hbmeta.posterior import TaskPosterior
from hbmeta.styles import styles_of

SETTINGS = {"compile": "graph", "seed": 0, "progress": False}


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    counts = (1, 3, 3, 4, 20)
    group = np.repeat(list("abcde"), counts)
    x = random.normal(size=len(group))
    y = np.repeat(random.normal(size=len(counts)), counts) + x + random.normal(size=len(group))
    frame = pd.DataFrame({"group": group, "x": x, "y": y})
    return tasks.from_frame(frame, group="group", x="x", y="y").split(support=0.6, seed=1)


@pytest.fixture(scope="module")
def fits(data):
    model = models.VaryingEffects(varying=["intercept", "x"])
    return {
        "exact": inference.ExactLinear(prior=True).fit(model, data, **SETTINGS),
        "no_pooling": inference.NoPooling().fit(model, data, **SETTINGS),
        "complete_pooling": inference.CompletePooling().fit(model, data, **SETTINGS),
        "maml": inference.MAML().fit(model, data, steps=30, **SETTINGS),
    }


@pytest.fixture(scope="module")
def posteriors(fits):
    return {name: fitted.posterior for name, fitted in fits.items()}


def drawn(figure, label):
    """x and y of the line of that label."""
    (line,) = [x for axis in figure.axes for x in axis.get_lines() if x.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_forest_shows_the_means_in_the_order_of_the_reference(posteriors):
    figure = plots.forest(posteriors, coordinate=1)
    mean = posteriors["exact"].moments()["coefficients"][0][:, 1].numpy()
    order = np.argsort(mean)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [posteriors["exact"].ids[i] for i in order[::-1]]
    x, y = drawn(figure, "exact")
    np.testing.assert_allclose(x[np.argsort(y)], mean[order])
    assert figure.axes[0].get_xlabel() == "coefficients[x]"
    other = posteriors["maml"].moments()["coefficients"][0][:, 1].numpy()
    x, y = drawn(figure, "maml")
    np.testing.assert_allclose(x[np.argsort(y)], other[order], rtol=1e-6)


def test_forest_takes_some_tasks_another_order_and_a_label(posteriors):
    figure = plots.forest(posteriors, ids=["d", "b"], reference="maml", label="slope (m/s)")
    assert len(figure.axes[0].get_yticklabels()) == 2
    assert figure.axes[0].get_xlabel() == "slope (m/s)"


def test_forest_of_many_tasks_goes_into_columns(fits):
    random = np.random.default_rng(0)
    many = tasks.Tasks(random.normal(size=(91, 2, 1)), random.normal(size=(91, 2)), features=["x"])
    figure = plots.forest({"exact": fits["exact"].adapt(many)})
    assert len(figure.axes) == 3
    shown = [t.get_text() for axis in figure.axes for t in axis.get_yticklabels()]
    assert sorted(map(int, shown)) == list(range(91))
    assert max(figure.get_size_inches()) < 13


def test_intervals_are_quantiles_of_the_draws(posteriors):
    figure = plots.forest({"exact": posteriors["exact"]}, interval=0.5)
    (bars,) = figure.axes[0].collections
    widths = sorted(segment[1, 0] - segment[0, 0] for segment in bars.get_segments())
    sd = posteriors["exact"].moments()["coefficients"][1][:, 0].numpy()
    # A central half of a Normal is 1.349 sd wide; 4,000 draws give it within 6 % (5 s.e.).
    np.testing.assert_allclose(widths, np.sort(1.349 * sd), rtol=0.06)


def test_shrinkage_leads_from_each_tasks_estimate_to_the_pooled_one(posteriors):
    names = ("no_pooling", "complete_pooling", "exact")
    figure = plots.shrinkage(*(posteriors[name] for name in names))
    x, own = drawn(figure, "no pooling")
    again, pooled = drawn(figure, "partial pooling, 90 % interval")
    np.testing.assert_array_equal(x, again)
    np.testing.assert_array_equal(x, np.arange(5))
    counts = posteriors["exact"].support.counts.numpy()
    expected = posteriors["exact"].moments()["coefficients"][0].numpy()
    # By their number of points; tasks of as many points by their pooled mean.
    order = np.lexsort((expected[:, 0], counts))
    np.testing.assert_allclose(pooled, expected[order, 0], rtol=1e-6)
    alone = posteriors["no_pooling"].moments()["coefficients"][0].numpy()
    np.testing.assert_allclose(own, alone[order, 0], rtol=1e-6)
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == [f"{posteriors['exact'].ids[i]} ({counts[i]})" for i in order]
    assert figure.axes[0].get_ylabel() == "coefficients[intercept]"
    figure = plots.shrinkage(*(posteriors[name] for name in names), coordinate=[0, 1])
    assert len(figure.axes) == 2
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].get_lines()}
    # The tasks stand in the order of the first panel.
    np.testing.assert_allclose(lines["no pooling"], alone[order, 1], rtol=1e-6)
    plots.shrinkage(posteriors["no_pooling"], None, posteriors["maml"], coordinate=1)


def test_shrinkage_of_many_tasks_says_how_many_points_each_has(fits):
    random = np.random.default_rng(0)
    counts = np.repeat([1, 2, 3, 7], [95, 2, 2, 101])
    group = np.repeat(np.arange(200), counts)
    x, y = random.normal(size=(2, len(group)))
    many = tasks.Tasks.from_flat(x[:, None], y, group, 200, features=["x"])
    figure = plots.shrinkage(fits["no_pooling"].adapt(many), None, fits["exact"].adapt(many))
    axis = figure.axes[0]
    ticks = [(t.get_position()[0], t.get_text()) for t in axis.get_xticklabels()]
    # The label of three points would run into that of two.
    assert ticks == [(47.0, "1"), (95.5, "2"), (149.0, "7")]
    assert list(axis.get_xticks(minor=True)) == [94.5, 96.5, 98.5]
    (mark,) = {x.get_markersize() for x in axis.get_lines() if "partial" in x.get_label()}
    assert mark == pytest.approx(2.8 / 2**0.5)
    text = figure.legends[0].get_lines()
    assert text[0].get_markersize() == pytest.approx(3.2)


def test_a_runaway_estimate_does_not_squeeze_shrinkage(posteriors):
    own = posteriors["no_pooling"]
    loc = own.density.loc.clone()
    loc[1, 0], loc[3, 0] = 1e6, -1e6
    wild = TaskPosterior(own.problem, own.theta, Delta(loc), own.support, units=own.units)
    quiet = plots.shrinkage(own, None, posteriors["exact"]).axes[0]
    assert not [x for x in quiet.get_lines() if x.get_marker() in "^v"]
    figure = plots.shrinkage(wild, None, posteriors["exact"])
    axis = figure.axes[0]
    low, high = axis.get_ylim()
    others = posteriors["exact"].moments()["coefficients"][0][:, 0].numpy()
    assert low < others.min() < others.max() < high
    assert high - low < 4 * np.ptp([*quiet.get_ylim()])
    x, _ = drawn(figure, "no pooling")
    # "b" and "d" stand where their number of points puts them.
    counts = posteriors["exact"].support.counts.numpy()
    place = np.argsort(np.lexsort((others, counts)))
    for marker, task, edge in (("^", 1, high), ("v", 3, low)):
        (arrow,) = [
            line for line in axis.get_lines()
            if line.get_marker() == marker and len(line.get_xdata())
        ]  # fmt: skip
        assert arrow.get_xdata() == pytest.approx([x[place[task]]])
        assert low < arrow.get_ydata()[0] < high
        assert abs(arrow.get_ydata()[0] - edge) < 0.1 * (high - low)
    assert drawn(figure, "no pooling, off the axis (2)")[0].size == 0


def test_scores_of_a_comparison(fits, data):
    compared = compare(fits, data, reference="exact")
    figure = plots.scores(compared)
    assert len(figure.axes) == 3
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == list(fits)
    assert figure.axes[1].get_xlabel() == "NLL − NLL of exact"
    assert len(plots.scores(compare(fits, data)).axes) == 2


def test_loss_and_its_running_mean(fits):
    figure = plots.loss(fits["maml"], window=4)
    history = np.array(fits["maml"].history)
    x, y = drawn(figure, "mean of 4 steps")
    slow = [history[i - 4 : i].mean() for i in range(4, len(history) + 1)]
    np.testing.assert_allclose(y, slow)
    np.testing.assert_array_equal(x, np.arange(4, len(history) + 1))
    assert plots.loss(fits["maml"]).axes[0].get_xlabel() == "training step"


def test_figures_are_saved_and_settings_stay(posteriors, tmp_path, untouched):
    before = dict(mpl.rcParams)
    with untouched():
        figure = plots.forest(posteriors)
    path = tmp_path / "forest.png"
    figure.savefig(path)
    assert dict(mpl.rcParams) == before
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figure.dpi == 200


def test_a_strategy_has_one_colour():
    assert styles_of(["NUTS"])["NUTS"] == styles_of(["x", "nuts"])["nuts"]
    names = ["nuts", "nuts_long", "AmortizedGuide", "mine", "yours", "NoPooling", "no_pooling_2"]
    assert len(set(styles_of(names).values())) == len(names)


def test_what_cannot_be_drawn_is_refused(posteriors, fits, data):
    with pytest.raises(DataError, match="a posterior or more"):
        plots.forest({})
    with pytest.raises(DataError, match="reference as one of"):
        plots.forest(posteriors, reference="nuts")
    with pytest.raises(DataError, match=r"coefficients.*found 'w'"):
        plots.forest(posteriors, site="w")
    with pytest.raises(DataError, match="coordinate from 0 to 1"):
        plots.forest(posteriors, coordinate=2)
    with pytest.raises(DataError, match="'z9'"):
        plots.forest(posteriors, ids=["z9"])
    with pytest.raises(DataError, match="between 0 and 1"):
        plots.forest(posteriors, interval=90)
    with pytest.raises(DataError, match="same tasks"):
        plots.shrinkage(posteriors["no_pooling"].select(["a"]), None, posteriors["exact"])
    with pytest.raises(DataError, match="training history"):
        plots.loss(fits["exact"])
    with pytest.raises(DataError, match="window from 1 to 30"):
        plots.loss(fits["maml"], window=31)
    empty = data.support.keep(data.support.flat_x[:, 0] > 1e9)
    nothing = fits["exact"].adapt(empty)
    with pytest.raises(DataError, match="a task with support"):
        plots.shrinkage(nothing, None, nothing)
