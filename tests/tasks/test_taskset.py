import pandas as pd
import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.tasks import Tasks, TaskSet, from_frame, load_radon

COUNTS = {"a": 5, "b": 1, "c": 2, "d": 10, "e": 4}


def frame():
    labels = [label for label, count in COUNTS.items() for _ in range(count)]
    n = len(labels)
    return pd.DataFrame(
        {
            "group": labels,
            "when": pd.date_range("2020-01-01", periods=n)[::-1],
            "row": range(n),
            "age": [(7 * i) % 11 for i in range(n)],
            "y": [0.5 * i for i in range(n)],
        }
    ).sample(frac=1, random_state=0)


def whole(**arguments):
    return from_frame(frame(), group="group", x=["row", "age"], y="y", **arguments)


def rows(tasks):
    """For each group the set of its rows, which the column "row" numbers."""
    numbers = {label: set() for label in tasks.ids}
    for index, row in zip(tasks.task.tolist(), tasks.flat_x[:, 0].tolist(), strict=True):
        numbers[tasks.ids[index]].add(row)
    return numbers


def assert_parts_of(part, original):
    """Support and query are disjoint, cover the groups' rows, and point back to the table."""
    for label in part.ids:
        support, query = rows(part.support)[label], rows(part.query)[label]
        assert not support & query
        assert support | query == rows(original.support)[label]
    for tasks, positions in ((part.support, part.support_rows), (part.query, part.query_rows)):
        source = frame().iloc[positions.numpy()]
        assert source["row"].tolist() == tasks.flat_x[:, 0].tolist()
        assert source["y"].tolist() == tasks.flat_y.tolist()
        assert source["group"].tolist() == [tasks.ids[i] for i in tasks.task.tolist()]


def test_an_unsplit_set_is_all_support():
    data = whole()
    assert data.tasks is data.support
    assert data.without_query == data.ids
    assert (len(data), data.n_tasks) == (5, 5)
    assert data.features == ("row", "age")
    assert repr(data) == "TaskSet(5 groups, 22 rows, not split, features [row, age])"
    assert "1 to 10 each, median 4" in data.summary()
    with pytest.raises(DataError, match=r"Call \.split"):
        _ = data.episode


def test_split_within_groups():
    data = whole()
    part = data.split(seed=0)
    assert_parts_of(part, data)
    assert part.ids == data.ids
    counts = dict(zip(part.ids, part.support.counts.tolist(), strict=True))
    # 0.8 of 5, 1, 2, 10, 4, with a row left for the query where there are two
    assert counts == {"a": 4, "b": 1, "c": 1, "d": 8, "e": 3}
    assert part.without_query == ("b",)
    assert part.episode.n_tasks == 4
    assert "b" not in part.episode.ids
    assert part.tasks.n_points == 22
    assert part.tasks.ids == data.ids
    assert "17 support rows, 5 query rows" in repr(part)
    assert "1 groups without query" in repr(part)
    assert "1 groups without a query row: 'b'" in part.summary()
    assert part.schema is data.schema


def test_split_into_known_and_new_groups():
    data = whole()
    for groups, expected in ((0.6, 3), (2, 2), (0.01, 1), (0.99, 4)):
        known, new = data.split(groups=groups, new_support=2, seed=1)
        assert (known.n_tasks, new.n_tasks) == (expected, 5 - expected)
        assert set(known.ids) | set(new.ids) == set(data.ids)
        for part in (known, new):
            assert_parts_of(part, data)
            assert [label for label in data.ids if label in part.ids] == list(part.ids)
        for label, count in zip(new.ids, new.support.counts.tolist(), strict=True):
            assert count == {"a": 2, "b": 1, "c": 1, "d": 2, "e": 2}[label]


def test_new_groups_without_support():
    _, new = whole().split(groups=1, new_support=0, seed=0)
    assert new.support.n_points == 0
    assert new.without_query == ()


def test_split_is_a_function_of_its_seed(untouched):
    data = whole()
    with untouched():
        (known, new), (known_again, new_again) = (data.split(0.5, seed=3) for _ in range(2))
        others = [data.split(0.5, seed=seed)[0].ids for seed in range(10)]
    assert known.support.same_data(known_again.support)
    assert new.query.same_data(new_again.query)
    assert len(set(others)) > 1


def test_split_by_a_column_that_is_no_input():
    data = whole(order="when")
    part = data.split(support=0.5, order="when", seed=0)
    assert_parts_of(part, data)
    # The dates run against the row numbers: the earliest rows have the largest numbers.
    for label in part.ids:
        if rows(part.query)[label]:
            assert min(rows(part.support)[label]) > max(rows(part.query)[label])
    assert part.support.same_data(data.split(support=0.5, order="when", seed=9).support)
    known, new = data.split(0.5, order="when", seed=0)
    for part in (known, new):
        assert_parts_of(part, data)
        for label in part.ids:
            if rows(part.query)[label]:
                assert min(rows(part.support)[label]) > max(rows(part.query)[label])


def test_split_by_an_input_with_ties():
    data = from_frame(
        pd.DataFrame({"g": ["a"] * 6, "x": [1, 0, 1, 0, 1, 0], "y": range(6)}),
        group="g",
        x=["x"],
        y="y",
    )
    part = data.split(support=4, order="x", seed=0)
    assert part.support_rows.tolist() == [0, 1, 3, 5]
    assert part.query_rows.tolist() == [2, 4]


def test_text_and_missing_values_in_the_order_column():
    table = pd.DataFrame(
        {"g": ["a"] * 4, "wave": ["w3", "w1", None, "w2"], "y": [1.0, 2.0, 3.0, 4.0]}
    )
    with pytest.raises(DataError, match="'wave'; found 1 of 4 missing"):
        from_frame(table, group="g", x=[], y="y", order="wave")
    data = from_frame(table, group="g", x=[], y="y", order="wave", missing="drop")
    part = data.split(support=2, order="wave", seed=0)
    assert part.support_rows.tolist() == [1, 3]
    assert part.dropped == 1


def test_one_group_splits_within_itself_only():
    data = from_frame(frame().query("group == 'd'"), group="group", x=["age"], y="y")
    assert data.split(support=0.5, seed=0).support.n_points == 5
    with pytest.raises(DataError, match=r"groups=0.5 of 1\. Pass groups=None"):
        data.split(groups=0.5, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 5}, "groups=5 of 5"),
        ({"groups": 0}, "leaves a new group"),
        ({"groups": 1.0}, "leaves a new group"),
        ({"groups": True}, "leaves a new group"),
        ({"support": 1.0}, "support as a number of rows"),
        ({"groups": 2, "new_support": -1}, "support as a number of rows"),
        ({"order": "when"}, r"'row', 'age'; found 'when'\. Pass order='when' to from_frame"),
        ({"seed": -1}, "seed as a whole number"),
    ],
)
def test_errors_of_split(arguments, message):
    with pytest.raises(DataError, match=message):
        whole().split(**{"seed": 0} | arguments)


def test_a_split_set_is_not_split_again():
    with pytest.raises(DataError, match="that was not split"):
        whole().split(seed=0).split(seed=0)


def test_a_set_without_a_held_out_row_has_no_episode():
    data = TaskSet(Tasks([[[1.0]], [[2.0]]], [[1.0], [2.0]])).split(seed=0)
    assert data.without_query == (0, 1)
    with pytest.raises(DataError, match="all 2 groups have support rows only"):
        _ = data.episode


def test_sets_by_hand():
    tasks = Tasks([[[1.0], [2.0], [3.0]]], [[1.0, 2.0, 3.0]], ids=["a"])
    part = TaskSet(tasks).split(support=1, seed=0)
    assert (part.schema, part.support_rows) == (None, None)
    assert TaskSet(part.support, part.query).episode.ids == ("a",)
    with pytest.raises(DataError, match="Episode"):
        TaskSet(tasks, Tasks([[[1.0]]], [[1.0]], ids=["b"]))
    with pytest.raises(DataError, match="support_rows with one entry"):
        TaskSet(tasks, support_rows=torch.arange(2))
    with pytest.raises(DataError, match="query_rows with one entry"):
        TaskSet(tasks, query_rows=torch.arange(2))


def test_the_script_of_the_radon_data():
    known, new = load_radon().split(groups=0.8, seed=0)
    assert (known.n_tasks, new.n_tasks) == (68, 17)
    assert max(new.support.counts.tolist()) == 3
    assert known.tasks.n_points + new.tasks.n_points == 919
