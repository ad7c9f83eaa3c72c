"""Figures of bounds: what is drawn is what the bounds say."""

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
import pytest

from hbmeta import bounds
from hbmeta.certificate_plots import BOUNDS, bounds_by_tasks, certificates_by_tasks
from hbmeta.errors import DataError


def test_one_panel_per_bound_and_number_of_samples():
    figure = bounds_by_tasks(names=["amit_meir", "query_split"], samples=(5, 100), tasks=(2, 500))
    top, _, bottom, _ = figure.axes
    assert top.get_title() == "5 samples per task"
    assert [axis.get_ylabel() for axis in (top, bottom)] == ["amit meir", "query split"]
    T, drawn = top.get_lines()[0].get_data()
    assert T[0] == 2
    assert T[-1] == 500
    wanted = bounds.amit_meir(
        risk=0.1, hyper_kl=5.0, task_kls=2.0, n_samples=5, n_tasks=T, delta=0.05
    )
    np.testing.assert_array_equal(drawn, wanted.raw)
    (said,) = [text.get_text() for text in top.texts]
    assert said == "1 or more for all of these"
    (said,) = [text.get_text() for text in bottom.texts]
    assert said.endswith("at 500 tasks")
    # The layers of the query split meet: the empirical risk, nothing within, all across.
    edges = [c.get_paths()[0].get_extents() for c in bottom.collections if c.get_paths()]
    assert min(box.y0 for box in edges) == 0.0
    assert any(box.y1 == pytest.approx(0.1) for box in edges)


def test_the_bounds_are_listed_from_large_to_small():
    case = {"risk": 0.1, "hyper_kl": 5.0, "n_tasks": 200, "delta": 0.05}
    own = {"task_kls": 2.0, "n_samples": 50}
    values = [
        float(bound(**case, **({} if name == "query_split" else own)).raw)
        for name, bound in BOUNDS.items()
    ]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "arguments",
    [{"names": ["vapnik"]}, {"names": []}, {"samples": []}, {"tasks": (1, 9)}, {"risk": 2.0}],
)
def test_bad_arguments(arguments):
    with pytest.raises(DataError):
        bounds_by_tasks(**arguments)


def test_certificates_stand_over_the_true_risk_and_are_named_at_their_ends():
    values = {"joint_kl": [1.4, 0.5, 0.21], "query_split": [0.6, 0.3, 0.2]}
    (axis,) = certificates_by_tasks([10, 100, 1000], values, [0.1, 0.09, 0.08], title="why").axes
    drawn = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    np.testing.assert_array_equal(drawn["joint_kl"], [1.0, 0.5, 0.21])  # cut where it says nothing
    np.testing.assert_array_equal(drawn["query_split"], values["query_split"])
    said = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert list(said) == ["0.20  query split", "0.21  joint kl", "true risk"]
    assert said["0.21  joint kl"] - said["0.20  query split"] == pytest.approx(0.05)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["10", "100", "1,000"]


@pytest.mark.parametrize(
    ("tasks", "values", "risk"),
    [
        ([10], {"a": [0.5]}, [0.1]),
        ([10, 5], {"a": [0.5, 0.4]}, [0.1, 0.1]),
        ([5, 10], {"a": [0.5]}, [0.1, 0.1]),
        ([5, 10], {"a": [0.5, np.nan]}, [0.1, 0.1]),
        ([5, 10], {}, [0.1, 0.1]),
    ],
)
def test_certificates_that_cannot_be_drawn_are_refused(tasks, values, risk):
    with pytest.raises(DataError, match="increasing numbers of tasks"):
        certificates_by_tasks(tasks, values, risk)
