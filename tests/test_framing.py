"""Predictions for data frames: rows and units of the person, known, adapted and new groups."""

import numpy as np
import pandas as pd
import pytest
import torch

from hbmeta import models, tasks
from hbmeta.errors import DataError
from hbmeta.inference import MAML, ExactLinear
from tests import cases, fits

COLUMNS = ["school", "status", "mean", "sd", "lower", "upper"]

every_strategy = pytest.mark.parametrize("name", fits.STRATEGIES)


@pytest.fixture
def frame() -> pd.DataFrame:
    """Rows of known schools (a, c), an observed new one (y) and an unobserved one (z), mixed."""
    return pd.DataFrame(
        {
            "note": list("ABCDEF"),
            "hours": [0.0, 0.5, -0.5, 1.0, 0.2, 0.3],
            "school": ["c", "y", "a", "z", "c", "y"],
        },
        index=[7, 7, 3, 1, 2, 9],
    )


@pytest.fixture
def observed() -> pd.DataFrame:
    return fits.table("yx", (5, 3), seed=4)


def encoded(table: pd.DataFrame, *, y: bool) -> tasks.Tasks:
    schema = fits.task_set().schema
    assert schema is not None
    return schema.encode(table, need_y=y).tasks


@every_strategy
def test_rows_and_columns_are_those_of_the_frame(name, frame, observed, untouched):
    fitted = fits.fitted(name)
    before = frame.copy()
    with untouched():
        found = fitted.predict(frame, support=observed)
    pd.testing.assert_frame_equal(frame, before)
    assert list(found.columns) == COLUMNS
    assert found.index.equals(frame.index)
    pd.testing.assert_series_equal(found["school"], frame["school"])
    assert found["status"].tolist() == ["known", "adapted", "known", "new", "known", "adapted"]
    numbers = found[["mean", "sd", "lower", "upper"]].to_numpy()
    assert numbers.dtype == np.float64
    assert np.isfinite(numbers).all()
    assert (found["lower"] < found["mean"]).all()
    assert (found["mean"] < found["upper"]).all()
    # In the units of the table, where the mean is 50 and the standard deviation 10.
    assert found["mean"].between(20, 80).all()
    again = fitted.predict(frame, support=observed)
    pd.testing.assert_frame_equal(found, again)


@every_strategy
def test_each_group_is_predicted_from_its_own_posterior(name, frame, observed):
    """Row by row against `adapt` and `predict` on tasks."""
    fitted = fits.fitted(name)
    found = fitted.predict(frame, support=observed, interval=0.8)
    empty = encoded(observed, y=True).select(["y"]).keep(torch.zeros(5, dtype=torch.bool))
    posteriors = {
        "a": fitted.posterior.select(["a"]),
        "c": fitted.posterior.select(["c"]),
        "y": fits.adapted(name, encoded(observed, y=True).select(["y"])),
        "z": fits.adapted(name, empty),
    }
    # Draws for tasks adapted together and alone differ: NUTS (400 draws of a school's effect, whose
    # sd is below 12 where nothing was observed) within 5 standard errors.
    tolerance = {"a": 1e-9, "c": 1e-9, "y": 1.0, "z": 3.0} if name == "NUTS" else {}
    for position, row in enumerate(frame.itertuples()):
        x = torch.tensor([[[row.hours]]], dtype=torch.float64)
        predictive = posteriors[row.school].predict(x)
        lower, upper = predictive.interval(0.8)
        expected = [float(v.squeeze()) for v in (predictive.mean, predictive.sd, lower, upper)]
        actual = found[["mean", "sd", "lower", "upper"]].iloc[position].to_numpy()
        near = tolerance.get(row.school, 1e-6)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=near)


def test_exact_predictions_are_the_dense_ones(frame, observed):
    """ExactLinear at its θ: school means by the formula for the posterior of one intercept."""
    fitted = fits.fitted("ExactLinear")
    found = fitted.predict(frame, support=observed)
    values = {name: float(value.squeeze()) for name, value in fitted.globals().items()}
    location, scale = fitted.units
    everything = pd.concat([fits.table(), observed])
    for position, row in enumerate(frame.itertuples()):
        mine = everything[everything["school"] == row.school]
        residual = (mine["score"] - location) / scale - values["fixed"] * mine["hours"]
        precision = len(mine) / values["noise"] ** 2 + 1 / values["scale"] ** 2
        total = residual.sum() / values["noise"] ** 2 + values["mean"] / values["scale"] ** 2
        mean = location + scale * (total / precision + values["fixed"] * row.hours)
        sd = scale * np.sqrt(1 / precision + values["noise"] ** 2)
        assert found["mean"].iloc[position] == pytest.approx(mean, rel=1e-8)
        assert found["sd"].iloc[position] == pytest.approx(sd, rel=1e-8)
        # 1.6449 is the 0.95 quantile of the standard normal.
        assert found["upper"].iloc[position] == pytest.approx(mean + 1.644854 * sd, rel=1e-6)


def test_more_data_make_a_new_group_less_uncertain(frame, observed):
    fitted = fits.fitted("ExactLinear")
    without = fitted.predict(frame)
    with_support = fitted.predict(frame, support=observed)
    assert without["status"].tolist() == ["known", "new", "known", "new", "known", "new"]
    y = frame["school"].to_numpy() == "y"
    assert (with_support["sd"].to_numpy()[y] < without["sd"].to_numpy()[y]).all()
    columns = ["mean", "sd", "lower", "upper"]
    rest = with_support[columns].to_numpy()[~y]
    np.testing.assert_allclose(rest, without[columns].to_numpy()[~y], rtol=1e-12)


@pytest.mark.parametrize("groups", [["a"], ["z"], ["z", "q"]])
def test_groups_of_one_kind_only(groups):
    table = pd.DataFrame({"school": groups, "hours": 0.0})
    found = fits.fitted("MAML").predict(table)
    assert set(found["status"]) == {"known" if groups == ["a"] else "new"}


@pytest.mark.parametrize("support", [None, "empty"])
def test_no_support_is_no_support(support, frame, observed):
    given = None if support is None else observed.iloc[:0]
    found = fits.fitted("MAML").predict(frame, support=given)
    assert "adapted" not in set(found["status"])


def test_y_may_be_in_the_frame_and_does_not_matter(frame):
    fitted = fits.fitted("ExactLinear")
    with_y = fitted.predict(frame.assign(score=1e6))
    pd.testing.assert_frame_equal(with_y, fitted.predict(frame))


def test_a_saved_fit_predicts_the_same(frame, observed, tmp_path):
    from hbmeta.loading import load

    fitted = fits.fitted("NUTS")
    fitted.save(tmp_path / "fit")
    found = load(tmp_path / "fit").predict(frame, support=observed)
    pd.testing.assert_frame_equal(found, fitted.predict(frame, support=observed))


# Missing values, levels, kinds of y


def classes(**policies) -> tasks.TaskSet:
    """A table with a categorical column and a two-level y."""
    rng = np.random.default_rng(0)
    n = 60
    table = pd.DataFrame(
        {
            "group": rng.integers(0, 4, n),
            "sex": rng.choice(["f", "m"], n),
            "age": rng.normal(size=n),
            "passed": rng.choice(["no", "yes"], n, p=[0.3, 0.7]),
        }
    )
    return tasks.from_frame(table, group="group", x=["sex", "age"], y="passed", **policies)


def fit_classes(**policies):
    model = models.VaryingEffects(fixed=["sex[m]", "age"], family="bernoulli")
    return fits.fit(MAML(), classes(**policies), model)


def test_rows_with_missing_values_stay_empty():
    fitted = fit_classes(missing="drop")
    table = pd.DataFrame(
        {"group": [1, 9, 2], "sex": ["f", None, "m"], "age": [0.0, 0.0, None]}, index=list("xyz")
    )
    found = fitted.predict(table)
    assert found["group"].tolist() == [1, 9, 2]
    assert found["status"].iloc[0] == "known"
    assert found["status"].isna().tolist() == [False, True, True]
    assert found[["mean", "sd", "lower", "upper"]].isna().all(axis=1).tolist() == [
        False,
        True,
        True,
    ]


def test_missing_values_are_refused_where_the_fit_refused_them():
    table = pd.DataFrame({"group": [1, 2], "sex": ["f", "m"], "age": [0.0, None]})
    with pytest.raises(DataError, match="values in the column 'age'"):
        fit_classes().predict(table)


def test_unseen_levels_go_by_the_policy():
    table = pd.DataFrame({"group": [1], "sex": ["x"], "age": [0.0]})
    with pytest.raises(DataError, match="the learned levels of 'sex'"):
        fit_classes().predict(table)
    fitted = fit_classes(unseen="reference")
    with pytest.warns(UserWarning, match="count as the reference 'f'"):
        found = fitted.predict(table)
    expected = fitted.predict(table.assign(sex="f"))
    pd.testing.assert_frame_equal(found, expected)


def test_the_mean_of_a_two_level_y_is_the_probability_of_the_level_coded_one():
    fitted = fit_classes()
    assert fitted.schema.y_levels == ("no", "yes")
    table = pd.DataFrame({"group": [1, 8], "sex": ["f", "m"], "age": [0.0, 1.0]})
    support = table.assign(group=8, passed=["yes", "no"])
    found = fitted.predict(table, support=support)
    assert found["status"].tolist() == ["known", "adapted"]
    assert found["mean"].between(0, 1).all()
    np.testing.assert_allclose(found["sd"] ** 2, found["mean"] * (1 - found["mean"]), rtol=1e-9)
    assert found[["lower", "upper"]].isin([0.0, 1.0]).all(axis=None)
    posterior = fitted.posterior.select([1])
    x = tasks.Tasks([[[0.0, 0.0]]], ids=[1], features=["sex[m]", "age"])
    assert found["mean"].iloc[0] == pytest.approx(
        float(posterior.predict(x).probabilities[0, 0, 1])
    )


def test_a_categorical_group_column_keeps_its_type(frame):
    found = fits.fitted("MAML").predict(frame.astype({"school": "category"}))
    assert isinstance(found["school"].dtype, pd.CategoricalDtype)


# What is refused


def test_a_fit_without_a_data_frame_is_told_what_to_do(frame):
    fitted = fits.fit(MAML(), fits.task_set().tasks)
    with pytest.raises(DataError, match=r"tasks\.from_frame"):
        fitted.predict(frame)


@pytest.mark.parametrize("interval", [0.0, 1.0, 90, -0.1, float("nan")])
def test_an_interval_that_is_no_probability(interval, frame):
    with pytest.raises(DataError, match="probability between 0 and 1"):
        fits.fitted("MAML").predict(frame, interval=interval)


def test_columns_that_are_not_there(frame, observed):
    fitted = fits.fitted("MAML")
    with pytest.raises(DataError, match="one column 'hours'"):
        fitted.predict(frame.rename(columns={"hours": "hour"}))
    with pytest.raises(DataError, match="one column 'school'"):
        fitted.predict(frame.drop(columns="school"))
    with pytest.raises(DataError, match="one column 'score'"):
        fitted.predict(frame, support=observed.drop(columns="score"))
    with pytest.raises(DataError, match="a table with rows"):
        fitted.predict(frame.iloc[:0])


def test_support_rows_of_known_groups(frame):
    with pytest.raises(DataError, match=r"rows of 'a', .*and of 1 more.* fit again with them"):
        fits.fitted("MAML").predict(frame, support=fits.table("cay", (1, 2, 3)))


def test_labels_of_another_type():
    """Group 1 as the word "1" would pass for a new group without a word."""
    table = pd.DataFrame({"group": ["1"], "sex": ["f"], "age": [0.0]})
    with pytest.raises(DataError, match=r"found '1' of type str\. Convert"):
        fit_classes().predict(table)


def test_a_group_column_with_the_name_of_a_result():
    table = fits.table().rename(columns={"school": "status"})
    found = tasks.from_frame(table, group="status", x=["hours"], y="score")
    fitted = fits.fit(ExactLinear(), found)
    with pytest.raises(DataError, match="a group column named otherwise"):
        fitted.predict(table)


def test_programs_of_ones_own_predict_data_frames_too():
    table = fits.table().assign(intercept=1.0)
    found = tasks.from_frame(table, group="school", x=["intercept", "hours"], y="score")
    fitted = fits.fit(ExactLinear(), found, cases.linear_flat)
    assert fitted.predict(table)["status"].eq("known").all()
