from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.tasks import Schema, TaskSet, from_frame

SLEEP = Path(__file__).parent.parent / "data" / "sleepstudy.csv"


def table():
    return pd.DataFrame(
        {
            "school": ["b", "a", "b", "c", "a", "b"],
            "sex": ["m", "f", "f", "m", "f", "m"],
            "age": [10, 11, 12, 13, 14, 15],
            "size": pd.Categorical(
                ["small", "big", "mid", "mid", "small", "big"],
                categories=["small", "mid", "big", "huge"],
            ),
            "old": [False, False, True, True, True, False],
            "score": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "passed": ["no", "yes", "no", "yes", "no", "yes"],
        }
    )


def read(frame=None, **arguments):
    frame = table() if frame is None else frame
    return from_frame(frame, **{"group": "school", "x": ["age"], "y": "score"} | arguments)


def altered(column, values, dtype=object):
    frame = table()
    frame[column] = pd.Series(values, dtype=dtype)
    return frame


def test_groups_and_rows_keep_their_order():
    frame = table()
    read_set = read(frame)
    assert read_set.ids == ("b", "a", "c")
    assert read_set.support.flat_x[:, 0].tolist() == [10, 12, 15, 11, 14, 13]
    assert read_set.support_rows.tolist() == [0, 2, 5, 1, 4, 3]
    assert read_set.query is None
    assert read_set.support.dtype == torch.float64
    pd.testing.assert_frame_equal(frame, table())


def test_categories_are_treatment_coded():
    read_set = read(x=["age", "sex", "size", "old"])
    assert read_set.features == ("age", "sex[m]", "size[mid]", "size[big]", "old[True]")
    frame = table().iloc[read_set.support_rows.numpy()]
    x = read_set.support.flat_x.numpy()
    slow = np.column_stack(
        [
            frame["age"],
            frame["sex"] == "m",
            frame["size"] == "mid",
            frame["size"] == "big",
            frame["old"],
        ]
    )
    assert np.array_equal(x, slow.astype(float))
    assert "sex: reference level 'f'" in read_set.summary()
    assert "size: reference level 'small'" in read_set.summary()


def test_one_name_no_inputs_and_another_dtype():
    assert read(x="age").features == ("age",)
    empty = read(x=[], dtype=torch.float32)
    assert empty.support.x.shape == (3, 3, 0)
    assert empty.support.dtype == torch.float32
    assert empty.schema.encode(table()).tasks.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "int8", "float32"])
def test_numeric_dtypes_of_pandas(dtype):
    frame = table()
    frame["age"] = frame["age"].astype(dtype)
    assert read(frame).support.same_data(read().support)


@pytest.mark.parametrize("dtype", ["string", "category", object])
def test_text_dtypes_of_pandas(dtype):
    frame = table()
    frame["sex"] = frame["sex"].astype(dtype)
    frame["school"] = frame["school"].astype(dtype)
    assert read(frame, x=["sex"]).support.same_data(read(x=["sex"]).support)


def test_whole_numbers_as_groups_are_ids():
    frame = altered("school", [7, 3, 7, 1, 3, 7], "int64")
    assert read(frame).ids == (7, 3, 1)
    assert all(type(label) is int for label in read(frame).ids)
    with_gap = altered("school", [7, 3, 7, 1, 3, None], "float64")
    assert read(with_gap, missing="drop").ids == (7, 3, 1)


@pytest.mark.parametrize(
    ("y", "levels"),
    [("passed", ("no", "yes")), ("old", (False, True)), ("sex", ("f", "m"))],
)
def test_two_level_outputs_are_coded_0_and_1(y, levels):
    read_set = read(y=y)
    expected = (table()[y] == levels[1]).to_numpy().astype(float)[read_set.support_rows.numpy()]
    assert read_set.support.flat_y.tolist() == expected.tolist()
    assert read_set.schema.y_levels == levels
    assert f"({levels[0]!r} is 0, {levels[1]!r} is 1)" in read_set.summary()


def test_standardise_and_undo():
    plain, scaled = read(), read(standardise=["age", "score"])
    for values, coded in (
        (plain.support.flat_x[:, 0], scaled.support.flat_x[:, 0]),
        (plain.support.flat_y, scaled.support.flat_y),
    ):
        assert torch.allclose(coded, (values - values.mean()) / values.std(correction=0))
    schema = scaled.schema
    assert torch.allclose(schema.restore(scaled.support.flat_y), plain.support.flat_y)
    assert schema.y_location == pytest.approx(3.5)
    assert schema.y_scale == pytest.approx(np.std(table()["score"]))
    assert "standardised by 3.5" in scaled.summary()
    # New rows are scaled by the mean and sd that were learned, not by their own.
    new = schema.encode(table().iloc[:2], need_y=True).tasks
    assert torch.allclose(schema.restore(new.flat_y), torch.tensor([1.0, 2.0]).double())
    assert torch.allclose(new.flat_x[0], scaled.support.flat_x[0])
    assert (plain.schema.y_location, plain.schema.y_scale) == (0.0, 1.0)


def test_standardise_true_takes_all_numbers():
    everything = read(x=["age", "sex"], standardise=True).schema
    assert [column.scale != 1 for column in everything.x] == [True, False]
    assert everything.y_scale != 1
    assert read(y="passed", standardise=True).schema.y_scale == 1
    assert read(standardise="age").schema.y_scale == 1
    assert read(standardise=False).schema.x[0].scale == 1


def test_missing_values_raise_or_are_dropped():
    frame = table()
    frame.index = [f"row {i}" for i in range(6)]
    frame.loc["row 2", "sex"] = None
    frame.loc["row 4", "score"] = np.nan
    with pytest.raises(DataError, match=r"column 'sex'; found 1 of 6 missing.*\['row 2'\]"):
        read(frame, x=["sex"])
    kept = read(frame, x=["sex"], missing="drop")
    assert kept.dropped == 2
    assert kept.support_rows.tolist() == [0, 5, 1, 3]
    assert "2 rows dropped" in repr(kept)
    assert "2 rows of the table dropped" in kept.summary()
    # A row without y is no loss where y is not needed, and columns not in use do not matter.
    encoded = kept.schema.encode(frame)
    assert (encoded.dropped, sorted(encoded.rows.tolist())) == (1, [0, 1, 3, 4, 5])
    assert read(frame.drop(columns="score").assign(score=1.5)).dropped == 0
    with pytest.raises(DataError, match="'sex'"):
        read(x=["sex"]).schema.encode(frame)
    unlabelled = altered("school", ["b", None, "b", "c", "a", "b"])
    assert read(unlabelled, missing="drop").support_rows.tolist() == [0, 2, 5, 3, 4]


def test_columns_without_a_value():
    for missing in ("raise", "drop"):
        with pytest.raises(DataError, match=r"'age'; found 6 of 6 missing"):
            read(altered("age", [None] * 6, "float64"), missing=missing)
    frame = altered("age", [1, 2, 3, None, None, None], "float64")
    frame["score"] = [None, None, None, 1.0, 2.0, 3.0]
    with pytest.raises(DataError, match="without a missing value"):
        read(frame, missing="drop")


def test_unseen_levels_raise_or_count_as_reference():
    new = table().assign(size=["small", "hugee", "mid", "mid", "hugee", "big"])
    with pytest.raises(DataError, match=r"levels of 'size'.*found the unseen 'hugee'"):
        read(x=["size"]).schema.encode(new)
    # "huge" is a category of the column, but no row had it.
    with pytest.raises(DataError, match="unseen 'huge'"):
        read(x=["size"]).schema.encode(table().assign(size="huge"))
    lenient = read(x=["size"], unseen="reference").schema
    with pytest.warns(UserWarning, match=r"2 rows of 'size'.*'hugee'.*reference 'small'"):
        encoded = lenient.encode(new)
    assert encoded.tasks.flat_x[(encoded.rows == 1) | (encoded.rows == 4)].eq(0).all()
    with pytest.raises(DataError, match=r"found the unseen 'Yes'\. Was 'yes' meant"):
        read(y="passed", unseen="reference").schema.encode(
            table().assign(passed="Yes"), need_y=True
        )


def test_predictions_align_with_the_rows_of_the_table():
    schema = read(x=["age", "sex"], missing="drop").schema
    new = table().drop(columns="score")
    new["age"] = new["age"].astype(float)
    new.loc[3, "age"] = None
    encoded = schema.encode(new)
    assert encoded.tasks.flat_y is None
    aligned = encoded.align(encoded.tasks.flat_x[:, 0], len(new))
    assert np.array_equal(aligned, new["age"].to_numpy(), equal_nan=True)
    assert encoded.tasks.ids == ("b", "a")


def test_groups_that_are_new_or_alone():
    schema = read().schema
    assert schema.encode(table().assign(school="elsewhere")).tasks.ids == ("elsewhere",)
    assert read(altered("school", list("abcdef"))).n_tasks == 6
    assert read(altered("school", ["only"] * 6)).n_tasks == 1


def test_schema_round_trip():
    read_set = read(
        x=["age", "sex", "size", "old"],
        standardise=["age", "score"],
        missing="drop",
        unseen="reference",
    )
    again = Schema.from_json(read_set.schema.to_json())
    assert again == read_set.schema
    assert again.encode(table(), need_y=True).tasks.same_data(read_set.support)
    binary = read(y="old").schema
    assert Schema.from_json(binary.to_json()) == binary
    assert Schema.from_json(binary.to_json()).y_levels[1] is True
    assert (binary.group, binary.y_name, binary.features) == ("school", "old", ("age",))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"x": [1], "y": {}}'])
def test_text_that_is_no_schema(text):
    with pytest.raises(DataError, match=r"Schema.to_json"):
        Schema.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": ["agee"]}, r"one column 'agee'.*Was 'age' meant\?"),
        ({"group": "School"}, r"'School'.*Was 'school' meant\?"),
        ({"y": "zzz"}, "found the columns 'school', 'sex'"),
        ({"order": "wen"}, "one column 'wen'"),
        ({"x": ["age", "school"]}, "found 'school' more than once"),
        ({"x": ["age", "age"]}, "found 'age' more than once"),
        ({"x": ["age", "score"]}, "found 'score' more than once"),
        ({"missing": "ignore"}, "missing as one of 'raise', 'drop'; found 'ignore'"),
        ({"unseen": "drop"}, "unseen as one of 'raise', 'reference'"),
        ({"dtype": torch.int64}, "floating dtype"),
        ({"standardise": ["sex"], "x": ["sex"]}, "'sex', which is categorical"),
        ({"standardise": ["size"]}, "'age', 'score'; found 'size'"),
        ({"y": "size"}, r"two-level y in 'size'; found 3 levels: 'small', 'mid', 'big'"),
        ({"frame": {"a": [1]}}, "DataFrame"),
        ({"frame": table().iloc[:0]}, "table with rows"),
        ({"frame": pd.concat([table(), table()[["age"]]], axis=1)}, "several columns"),
        ({"frame": table().assign(age=3), "standardise": "age"}, "'age' that varies.*found 3.0"),
        ({"frame": table().assign(sex="m"), "x": ["sex"]}, "two levels.*found only 'm'"),
        ({"frame": table().assign(passed="no"), "y": "passed"}, "found only 'no'"),
        (
            {"frame": table().assign(age=[1, 2, np.inf, 4, 5, 6])},
            r"finite numbers in 'age'; found 1 infinite, first in the rows \[2\]",
        ),
        ({"frame": altered("age", [1, 2, 3, 4, 5, 6])}, "pandas.to_numeric"),
        ({"frame": altered("sex", ["m", 1, "f", "m", "f", "m"]), "x": ["sex"]}, "holding mixed"),
        ({"frame": table().assign(age=pd.Timestamp("2020-01-01"))}, "datetime64"),
        ({"frame": altered("school", [0.5] * 6, "float64")}, "found 0.5 of type float"),
        ({"frame": altered("school", [True] * 6, "bool")}, "found True of type bool"),
        (
            {"frame": altered("sex", pd.Categorical([(1,), (2,)] * 3), "category"), "x": ["sex"]},
            "type tuple",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        read(**arguments)


def test_a_later_table_of_another_kind():
    with pytest.raises(DataError, match=r"numbers in 'age', as they were learned"):
        read().schema.encode(table().assign(age="ten"))
    with pytest.raises(DataError, match="'score'"):
        read().schema.encode(table().drop(columns="score"), need_y=True)


def test_simulated_sleep_study():
    sleep = from_frame(pd.read_csv(SLEEP), group="subject", x=["days"], y="reaction")
    assert isinstance(sleep, TaskSet)
    assert sleep.support.counts.tolist() == [10] * 18
    assert sleep.ids[0] == "s01"
    assert sleep.support.flat_x[:10, 0].tolist() == list(range(10))
    # One overall line: intercept 250 (se about 25/√18 = 6), slope 10 (se about 1.6),
    # within 3 standard errors; the file is fixed, so this never changes.
    slope, intercept = np.polyfit(sleep.support.flat_x[:, 0], sleep.support.flat_y, 1)
    assert abs(intercept - 250) < 20
    assert abs(slope - 10) < 4.5


def test_groups_are_numbered_by_their_first_row():
    """Whatever the type of the labels, and with whole numbers that pandas holds as floats."""
    for labels, ids in (
        (["b", "a", "b", "c"], ("b", "a", "c")),
        ([7, 3, 7, 5], (7, 3, 5)),
        ([7.0, 3.0, 7.0, 5.0], (7, 3, 5)),
        (pd.Categorical(["b", "a", "b", "c"]), ("b", "a", "c")),
        (pd.array(["b", "a", "b", "c"], dtype="string"), ("b", "a", "c")),
        (np.array([7, "a", 7, "c"], dtype=object), (7, "a", "c")),
    ):
        frame = pd.DataFrame({"group": labels, "y": [1.0, 2.0, 3.0, 4.0]})
        tasks = from_frame(frame, group="group", x=[], y="y").support
        assert tasks.ids == ids
        assert all(type(label) in (str, int) for label in tasks.ids)
        assert tasks.flat_y.tolist() == [1.0, 3.0, 2.0, 4.0]


@pytest.mark.parametrize("label", [True, 2.5, 2.0])
def test_a_label_of_another_type_among_whole_numbers_is_named(label):
    frame = pd.DataFrame({"group": np.array([1, 2, label], dtype=object), "y": [1.0, 2.0, 3.0]})
    with pytest.raises(DataError, match=rf"{label!r} of type {type(label).__name__}"):
        from_frame(frame, group="group", x=[], y="y")
