import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmeta.errors import DataError
from hbmeta.tasks import Episode, Tasks

X = [[[1.0], [2.0]], [[3.0], [9.0]]]
Y = [[0.1, 0.2], [0.3, 9.0]]
MASK = [[True, True], [True, False]]


def ragged(counts, features=2, *, y=True, seed=0):
    """Tasks of the given numbers of rows whose entries are all different."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    task = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    values = torch.randn(n, generator=generator, dtype=torch.float64) if y else None
    return Tasks.from_flat(x, values, task, len(counts), ids=[f"t{i}" for i in range(len(counts))])


def rows_of(tasks):
    """The slow way: for each id the list of its rows (x..., y)."""
    rows = {label: [] for label in tasks.ids}
    for index in range(tasks.n_points):
        y = [] if tasks.flat_y is None else tasks.flat_y[index].reshape(-1).tolist()
        rows[tasks.ids[int(tasks.task[index])]].append((*tasks.flat_x[index].tolist(), *y))
    return rows


counts_lists = st.lists(st.integers(0, 6), min_size=1, max_size=6)


def test_padded_lists_become_flat_float64():
    tasks = Tasks(X, Y, MASK, ids=["a", "b"])
    assert tasks.flat_x.tolist() == [[1.0], [2.0], [3.0]]
    assert tasks.flat_y.tolist() == [0.1, 0.2, 0.3]
    assert tasks.task.tolist() == [0, 0, 1]
    assert tasks.dtype == torch.float64
    assert (tasks.n_tasks, len(tasks), tasks.n_points, tasks.max_points) == (2, 2, 3, 2)
    assert tasks.counts.tolist() == [2, 1]
    assert tasks.offsets.tolist() == [0, 2]
    assert tasks.ids == ("a", "b")
    assert tasks.features == ("x0",)
    assert tasks.device == torch.device("cpu")
    text = repr(tasks)
    assert "2 tasks, 3 points (1 to 2 each)" in text
    assert "[x0]" in text


@given(counts_lists, st.integers(0, 2), st.booleans())
@settings(deadline=None, max_examples=60)
def test_flat_to_padded_and_back(counts, features, with_y):
    tasks = ragged(counts, features, y=with_y)
    assert tasks.max_points == max(1, *counts)
    assert tasks.x.shape == (len(counts), tasks.max_points, features)
    again = Tasks(tasks.x, tasks.y, tasks.mask, ids=tasks.ids, features=tasks.features)
    assert again.same_data(tasks)
    assert torch.equal(tasks.unpad(tasks.pad(tasks.flat_x)), tasks.flat_x)
    stacked = torch.stack([tasks.flat_x, -tasks.flat_x])  # a leading dimension of draws
    assert torch.equal(tasks.unpad(tasks.pad(stacked, dim=1), dim=1), stacked)


@given(counts_lists)
@settings(deadline=None, max_examples=60)
def test_padding_repeats_a_real_row(counts):
    tasks = ragged(counts)
    real = {tuple(row) for row in tasks.flat_x.tolist()}
    for index, count in enumerate(counts):
        for cell in range(tasks.max_points):
            row, y = tasks.x[index, cell], tasks.y[index, cell]
            assert bool(tasks.mask[index, cell]) == (cell < count)
            if not real:
                assert row.eq(0).all()
            elif count:
                expected = int(tasks.offsets[index]) + (cell if cell < count else 0)
                assert torch.equal(row, tasks.flat_x[expected])
                assert torch.equal(y, tasks.flat_y[expected])
            else:
                assert tuple(row.tolist()) in real


def test_from_flat_sorts_and_keeps_the_order_within_a_task():
    tasks = Tasks.from_flat(
        np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([1.0, 2.0, 3.0, 4.0]), [2, 0, 2, 0], 3
    )
    assert tasks.flat_x[:, 0].tolist() == [2.0, 4.0, 1.0, 3.0]
    assert tasks.task.tolist() == [0, 0, 2, 2]
    assert tasks.counts.tolist() == [2, 0, 2]


def test_dtypes_are_kept_and_lists_follow():
    x = torch.zeros(1, 2, 1, dtype=torch.float32)
    assert Tasks(x, [[1, 2]]).flat_y.dtype == torch.float32
    assert Tasks(X, np.zeros((2, 2), dtype=np.float32)).dtype == torch.float32
    labels = Tasks(x, torch.tensor([[0, 3]]))
    assert labels.flat_y.dtype == torch.int64
    assert "class labels" in repr(labels)
    vectors = Tasks(x, torch.zeros(1, 2, 3))
    assert vectors.y.shape == (1, 2, 3)
    assert "vectors of 3" in repr(vectors)
    moved = labels.to(dtype=torch.float64)
    assert (moved.dtype, moved.flat_y.dtype) == (torch.float64, torch.int64)
    assert Tasks(x, torch.zeros(1, 2)).to("cpu", torch.float64).flat_y.dtype == torch.float64
    assert "no y" in repr(Tasks(x))


def test_tasks_do_not_share_memory_with_the_callers_arrays():
    x, y = np.ones((2, 1)), torch.ones(2, dtype=torch.float64)
    tasks = Tasks.from_flat(x, y, [0, 0], 1)
    x[:], y[:] = 7.0, 7.0
    assert tasks.flat_x.eq(1).all()
    assert tasks.flat_y.eq(1).all()


def test_tasks_refuse_assignment_and_survive_pickle_and_copy():
    tasks = Tasks(X, Y, MASK)
    with pytest.raises(AttributeError, match="never changes"):
        tasks.flat_x = torch.zeros(3, 1)
    assert pickle.loads(pickle.dumps(tasks)).same_data(tasks)
    assert copy.deepcopy(tasks).same_data(tasks)


@pytest.mark.parametrize(
    "selection", [slice(1, 3), [2, 0], [-1], torch.tensor([3, 1]), range(2), np.array([1])]
)
def test_subsets_by_position(selection):
    tasks = ragged([2, 0, 3, 1])
    chosen = tasks[selection]
    rows = rows_of(tasks)
    assert rows_of(chosen) == {label: rows[label] for label in chosen.ids}
    expected = np.array(tasks.ids)[selection].tolist()
    assert list(chosen.ids) == expected
    assert chosen.task.tolist() == sorted(chosen.task.tolist())


def test_subsets_by_id():
    tasks = ragged([2, 0, 3, 1])
    assert tasks.position("t2") == 2
    chosen = tasks.select(["t3", "t0"])
    assert chosen.ids == ("t3", "t0")
    assert rows_of(chosen)["t0"] == rows_of(tasks)["t0"]
    with pytest.raises(DataError, match="found 'nowhere'"):
        tasks.select(["t0", "nowhere"])


@pytest.mark.parametrize("selection", [3, [4], [-5], [True], torch.tensor([0.0]), "t0"])
def test_positions_that_do_not_exist(selection):
    with pytest.raises(DataError, match="select"):
        ragged([2, 0, 3, 1])[selection]


def test_no_task_and_the_same_task_twice_are_refused():
    with pytest.raises(DataError, match="empty"):
        ragged([2, 1])[[]]
    with pytest.raises(DataError, match="twice"):
        ragged([2, 1])[[0, -2]]


def test_keep_keeps_empty_tasks():
    tasks = ragged([2, 1])
    kept = tasks.keep(torch.tensor([False, True, False]))
    assert kept.counts.tolist() == [1, 0]
    assert kept.ids == tasks.ids
    nothing = tasks.keep(torch.zeros(3, dtype=torch.bool))
    assert nothing.x.shape == (2, 1, 2)
    assert not nothing.mask.any()
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        tasks.keep(torch.tensor([1, 0, 0]))


@given(counts_lists, st.one_of(st.integers(0, 7), st.floats(0.01, 0.99)), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=80)
def test_split_is_disjoint_covers_and_keeps_its_numbers(counts, support, seed):
    tasks = ragged(counts)
    episode = tasks.split(support, seed=seed)
    whole, given_rows, held = rows_of(tasks), rows_of(episode.support), rows_of(episode.query)
    for label, count in zip(tasks.ids, counts, strict=True):
        assert sorted(given_rows[label] + held[label]) == sorted(whole[label])
        # Rows keep their order.
        assert given_rows[label] == [row for row in whole[label] if row in given_rows[label]]
        most = max(count - 1, min(count, 1))
        if isinstance(support, int):
            assert len(given_rows[label]) == min(support, most)
        elif count:
            assert len(given_rows[label]) == min(max(int(support * count + 0.5), 1), most)


def test_split_is_a_function_of_its_seed(untouched):
    tasks = ragged([10, 10])
    with untouched():
        first, again = tasks.split(0.5, seed=1), tasks.split(0.5, seed=1)
        other = tasks.split(0.5, seed=2)
    assert first.support.same_data(again.support)
    assert first.query.same_data(again.query)
    assert not first.support.same_data(other.support)


def test_split_chooses_each_row_equally_often():
    # 2 of 5 rows in 400 seeds: the count of each row is Binomial(400, 0.4), sd 9.8. Five counts
    # within 4 sd: a false alarm once in 3,000 tries.
    tasks = ragged([5])
    counts = torch.zeros(5)
    for seed in range(400):
        support = tasks.split(2, seed=seed).support
        counts += (tasks.flat_x[:, None, 0] == support.flat_x[None, :, 0]).any(1)
    assert ((counts - 160).abs() < 4 * 9.8).all()


@pytest.mark.parametrize("support", [-1, 0.0, 1.0, 1.5, True, "half", float("nan")])
def test_split_refuses_other_supports(support):
    with pytest.raises(DataError, match="fraction between 0 and 1"):
        ragged([3]).split(support, seed=0)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(DataError, match="seed as a whole number"):
        ragged([3]).split(1, seed=seed)


def test_union_of_support_and_query():
    tasks = ragged([4, 1, 3])
    episode = tasks.split(2, seed=0)
    union = episode.all
    for label, rows in rows_of(union).items():
        assert rows == rows_of(episode.support)[label] + rows_of(episode.query)[label]
    assert episode.without_query == ("t1",)
    assert Tasks.concatenate([tasks]).same_data(tasks)
    with pytest.raises(DataError, match="same kind of y"):
        Tasks.concatenate([tasks, ragged([1, 1, 1], y=False)])
    with pytest.raises(DataError, match="at least one part"):
        Tasks.concatenate([])


def test_episode_wants_the_same_tasks():
    tasks = ragged([2, 2])
    with pytest.raises(DataError, match="another order"):
        Episode(tasks, tasks[[1, 0]])
    with pytest.raises(DataError, match="in one part only: 't1'"):
        Episode(tasks, tasks[[0]])
    with pytest.raises(DataError, match=r"same features.*'x1'"):
        Episode(tasks, ragged([2, 2], features=1))


def test_episode_subsets():
    episode = ragged([4, 2, 3]).split(1, seed=0)
    assert (len(episode), episode.n_tasks, episode.ids) == (3, 3, ("t0", "t1", "t2"))
    for part in (episode[[2, 0]], episode.select(["t2", "t0"])):
        assert part.ids == ("t2", "t0")
        assert rows_of(part.query)["t2"] == rows_of(episode.query)["t2"]
    assert episode.to(dtype=torch.float32).query.dtype == torch.float32


def test_same_data():
    tasks = ragged([2, 1])
    assert tasks.same_data(ragged([2, 1]))
    assert not tasks.same_data(ragged([1, 2]))
    assert not tasks.same_data(ragged([2, 1], seed=1))
    assert not tasks.same_data(ragged([2, 1], y=False))
    assert not tasks.same_data(tasks.to(dtype=torch.float32))
    assert not tasks.same_data(tasks[[1, 0]])
    assert not tasks.same_data(ragged([2, 1], features=1))


def with_nan(at):
    y = torch.tensor(Y, dtype=torch.float64)
    y[at] = float("nan")
    return y


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": with_nan((0, 1))}, r"found nan in y, task 'a', row 1 of that task"),
        (
            {"x": [[[1.0], [2.0]], [[float("-inf")], [0.0]]], "features": ["age"]},
            r"-inf in column 'age' of x, task 'b', row 0",
        ),
        ({"x": [[1.0, 2.0], [3.0, 4.0]]}, r"x\[\.\.\., None\].*Tasks.from_flat"),
        ({"x": [[[1.0], [2.0]], [[3.0]]]}, "Tasks.from_flat"),
        ({"x": torch.ones(2, 2, 1, dtype=torch.int64)}, r"dtype int64\. Pass x\.double\(\)"),
        ({"x": np.array([["a"]])}, "numbers in x"),
        ({"y": torch.ones(2, 2, dtype=torch.bool)}, r"dtype bool.*y\.long\(\) for class labels"),
        ({"y": torch.ones(2, 2, dtype=torch.int32)}, r"dtype int32.*y\.double\(\) for numbers"),
        ({"y": torch.full((2, 2), -1)}, "found the label -1"),
        ({"y": [[1.0, 2.0]]}, r"y of shape \(2, 2\).*found shape \(1, 2\)"),
        ({"y": torch.ones(2)}, r"found shape \(2,\)"),
        ({"mask": [[1, 1], [1, 0]]}, r"bool mask.*int64"),
        ({"mask": [[True], [True]]}, r"\(2, 2\).*found shape \(2, 1\)"),
        ({"ids": ["a", "a"]}, "the id 'a' more than once"),
        ({"ids": ["a"]}, "one id per task, 2 in all; found 1"),
        ({"ids": ["a", 0.5]}, "found 0.5 of type float"),
        ({"ids": ["a", True]}, "found True of type bool"),
        ({"features": ["a", "b"]}, "1 different feature names"),
        ({"features": "a"}, "list of names"),
    ],
)
def test_errors_of_the_padded_form(arguments, message):
    with pytest.raises(DataError, match=message):
        Tasks(**{"x": X, "y": Y, "mask": None, "ids": ["a", "b"], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": [0, -1]}, "found the position -1"),
        ({"task": [0, 2]}, r"n_tasks - 1 = 1; found the position 2"),
        ({"task": [0.0, 1.0]}, r"found dtype float64\. Pass task\.long\(\)"),
        ({"task": [0]}, "same length n"),
        ({"y": [1.0]}, "same length n"),
        ({"x": [1.0, 2.0]}, r"x\[:, None\]"),
        ({"y": torch.ones(2, 1, 1)}, r"\(n,\) or \(n, k\)"),
        ({"x": np.zeros((0, 1)), "y": [], "task": [], "n_tasks": 0}, "at least one task"),
        ({"x": torch.ones(2, 2), "features": ["a", "a"]}, "a repeated"),
        ({"x": torch.ones(2, 1), "y": torch.ones(2).double()}, "x float32, y float64"),
    ],
)
def test_errors_of_the_flat_form(arguments, message):
    with pytest.raises(DataError, match=message):
        Tasks.from_flat(
            **{"x": [[1.0], [2.0]], "y": [1.0, 2.0], "task": [0, 1], "n_tasks": 2} | arguments
        )


def test_masked_values_may_be_anything():
    tasks = Tasks([[[1.0], [float("nan")]]], [[1.0, float("inf")]], [[True, False]])
    assert torch.isfinite(tasks.x).all()


def test_pad_and_unpad_name_the_wrong_dimension():
    tasks = ragged([2, 1])
    with pytest.raises(DataError, match=r"Tasks\.pad.*\(3,\).*found \(4,\)"):
        tasks.pad(torch.zeros(4))
    with pytest.raises(DataError, match=r"Tasks\.unpad.*\(2, 2\).*found \(3, 2\)"):
        tasks.unpad(torch.zeros(3, 2))


def test_to_wants_a_floating_dtype():
    with pytest.raises(DataError, match="floating dtype"):
        ragged([1]).to(dtype=torch.int64)


def test_gradients_of_the_callers_tensors_are_not_kept():
    x = torch.ones(1, 2, 1, requires_grad=True)
    assert not Tasks(x).flat_x.requires_grad
