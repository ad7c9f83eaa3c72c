"""Figures of diagnoses, and every figure of trust from three fits that differ in kind."""

import dataclasses

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta
from hbmeta import inference, plots
from hbmeta.calibration_plots import rank_plots
from hbmeta.diagnosis import Diagnosis, reference_fit
from hbmeta.diagnosis.records import Parameter, Task
from hbmeta.diagnosis_plots import pareto_k, verdicts
from hbmeta.errors import DataError
from hbmeta.predictive_plots import predictive_checks, reliability
from hbmeta.tasks import Episode, Tasks

NAN = float("nan")

# So few draws are enough to be drawn.
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:UserWarning")


def parameter(shift, ratio, task="a", verdict="right"):
    return Parameter("level", (), task, verdict, shift, ratio, 1.0)


def diagnosis(parameters, k=(0.1,)):
    rows = tuple(Task(f"t{i}", "right", "", value) for i, value in enumerate(k))
    return Diagnosis("Laplace", "p", "point", "NUTS", tuple(parameters), rows, (), 0, 0.1, {})


def points(axis):
    return np.concatenate([line.get_xydata() for line in axis.get_lines()])


def test_parameters_stand_at_their_shift_and_ratio_and_far_ones_at_the_edge():
    given = [
        parameter(0.1, 0.9),
        parameter(-0.5, 2.0, verdict="wrong"),
        parameter(40.0, 0.0, verdict="wrong"),
        parameter(0.2, 1.1, task=None),
        parameter(NAN, NAN, verdict="unverified"),
    ]
    figure = verdicts({"Laplace": diagnosis(given)})
    (axis,) = figure.axes
    wanted = {(0.1, 0.9), (-0.5, 2.0), (10.0, 0.1), (0.2, 1.1)}
    assert {tuple(point) for point in points(axis).tolist()} == wanted
    (box,) = axis.patches
    assert box.get_bbox().extents == pytest.approx([-0.3, 0.75, 0.3, 1.33])
    colours = {line.get_color() for line in axis.get_lines() if len(line.get_xdata())}
    assert len(colours) == 2
    diamonds = [line for line in axis.get_lines() if line.get_marker() == "D"]
    assert sum(len(line.get_xdata()) for line in diamonds) == 1
    assert axis.get_title() == "Laplace: wrong"


def test_five_diagnoses_go_into_two_rows():
    figure = verdicts({str(i): diagnosis([parameter(0.0, 1.0)]) for i in range(5)})
    assert sum(axis.axison for axis in figure.axes) == 5
    assert figure.get_size_inches()[0] < 10


def test_tasks_stand_by_their_largest_k_and_those_above_are_counted():
    one = diagnosis([parameter(0.0, 1.0)], k=(0.9, -np.inf, 0.3))
    other = diagnosis([parameter(0.0, 1.0)], k=(0.2, 0.8, NAN))
    drawn = diagnosis([parameter(0.0, 1.0)], k=(NAN, NAN, NAN))
    figure = pareto_k({"a": one, "b": other, "NUTS": drawn})
    (axis,) = figure.axes
    found = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    np.testing.assert_array_equal(found["a (1 of 3 above 0.7)"], [0.3, -0.5, 0.9])
    np.testing.assert_array_equal(found["b (1 of 3 above 0.7)"], [NAN, 0.8, 0.2])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["t2", "t1", "t0"]
    assert not any("NUTS" in name for name in found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verdicts({}), "diagnoses by name"),
        (lambda: pareto_k([diagnosis([])]), "diagnoses by name"),
        (lambda: verdicts({"a": diagnosis([parameter(NAN, NAN)])}), "judged by NUTS"),
        (lambda: pareto_k({"a": diagnosis([], k=(NAN,))}), "k̂ in 0 of 1"),
        (
            lambda: pareto_k({"a": diagnosis([]), "b": diagnosis([], k=(0.1, 0.2))}),
            "2 sets of tasks",
        ),
    ],
)
def test_mistakes_are_said(call, message):
    with pytest.raises(DataError, match=message):
        call()


def varying(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        level = pyro.deterministic("level", mu + tau * z)
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(level + x[..., 0], 0.5), obs=y)


STRATEGIES = {
    "Laplace": inference.Laplace(),
    "AmortizedGuide": inference.AmortizedGuide(hidden=8),
    "NUTS": inference.NUTS(draws=100, chains=2, warmup=50, max_tree_depth=4, processes=1),
}


@pytest.fixture(scope="module")
def episode():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (12, 9, 1))
    y = rng.standard_normal((12, 1)) + x[..., 0] + 0.5 * rng.standard_normal((12, 9))
    cut = (slice(6), slice(6, 9))
    return Episode(*(Tasks(torch.from_numpy(x[:, c]), torch.from_numpy(y[:, c])) for c in cut))


@pytest.fixture(scope="module")
def fits(episode):
    settings = {"steps": 100, "compile": "graph", "progress": False}
    return {name: s.fit(varying, episode.support, **settings) for name, s in STRATEGIES.items()}


def test_every_figure_comes_from_a_gaussian_a_network_and_draws_alike(fits, episode):
    posteriors = {name: fitted.posterior for name, fitted in fits.items()}
    predictives = {name: p.predict(episode.query) for name, p in posteriors.items()}
    judge = reference_fit(fits["Laplace"], episode.support, reference="nested")
    found = {
        name: hbmeta.diagnose(fitted, episode.support, reference=judge)
        for name, fitted in fits.items()
    }
    alone = inference.NoPooling().fit(varying, episode.support, compile="graph", progress=False)
    figures = [
        plots.forest(posteriors, "level"),
        predictive_checks(predictives, episode.query.y),
        reliability(predictives, episode.query.y),
        verdicts(found),
        pareto_k(found),
        *(plots.shrinkage(alone.posterior, None, one, "level") for one in posteriors.values()),
    ]
    for figure in figures:
        assert all(axis.has_data() for axis in figure.axes)
    # Draws have no density to weigh; the other two have one k̂ for each task.
    labels = [line.get_label() for line in figures[4].axes[0].get_lines()]
    assert sum("of 12 above" in label for label in labels) == 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_ranks_of_every_kind_are_drawn(name):
    strategy = STRATEGIES[name]
    if name == "NUTS":
        strategy = dataclasses.replace(strategy, draws=20, warmup=10)
    x = Tasks(torch.zeros(3, 4, 1, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))
    found = hbmeta.sbc(
        varying, strategy, x, simulations=3, draws=19, steps=20, compile="graph", progress=False
    )
    figure = rank_plots(found, names=["mu"] if name == "NUTS" else None)
    assert all(axis.has_data() for axis in figure.axes)
