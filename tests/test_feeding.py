"""Supports and queries of training steps: disjoint, covering, of constant shape, repeatable."""

import pytest
import torch

from hbmeta import feeding
from hbmeta.errors import DataError
from hbmeta.feeding import Feed, taken, training_tasks
from hbmeta.program import Batch
from hbmeta.tasks import Episode, LinearTasks, Tasks, TaskSet
from tests.cases import case

LAYOUTS = ("nested", "flat")
FAMILY = LinearTasks([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]], noise=0.2, shots=(2, 5), queries=(1, 4))


def ragged() -> Tasks:
    """Every row has an x of its own, so that rows can be told apart wherever they end up."""
    tasks = case("ragged_one_row").tasks
    x = torch.arange(tasks.n_points, dtype=torch.float64).unsqueeze(1)
    return Tasks.from_flat(x, tasks.flat_y, tasks.task, tasks.n_tasks, ids=tasks.ids)


def feed(data, layout="nested", needs="split", tasks_per_step=None, seed=0):
    return Feed(data, layout, needs, tasks_per_step, seed, torch.device("cpu"), torch.float64)


def rows(batch):
    """(task, row) of every real row of a batch, sorted."""
    kept = batch.mask.nonzero()
    if batch.task is None:
        return sorted((int(t), float(batch.x[t, j, 0])) for t, j in kept)
    return sorted((int(batch.task[r]), float(batch.x[r, 0])) for (r,) in kept)


def all_rows(tasks):
    return sorted((int(t), float(x)) for t, x in zip(tasks.task, tasks.flat_x[:, 0], strict=True))


# Plain tasks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_is_disjoint_and_covers_all_rows(layout):
    tasks = ragged()
    source = feed(tasks, layout)
    assert source.n_tasks == 5
    for number in range(20):
        support, query = source.step(number)
        assert support.layout == query.layout == layout
        assert not set(rows(support)) & set(rows(query))
        assert sorted(rows(support) + rows(query)) == all_rows(tasks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subset_lies_inside_all_rows(layout):
    tasks = ragged()
    source = feed(tasks, layout, "subset")
    for number in range(20):
        support, query = source.step(number)
        assert rows(query) == all_rows(tasks)
        assert set(rows(support)) <= set(rows(query))


def test_size_of_the_support_is_uniform():
    """A task of 12 rows: each size 0..12 has probability 1/13.

    Pearson's χ² with 12 degrees of freedom of 2,600 steps; above 39.1 in 1e-4 of all seeds.
    """
    source = feed(ragged(), "flat")
    sizes = torch.stack([source.step(number)[0].counts for number in range(2600)])[:, 1].long()
    found = torch.bincount(sizes, minlength=13).double()
    assert float(((found - 200.0).square() / 200.0).sum()) < 39.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needs", ["split", "subset"])
@pytest.mark.parametrize("tasks_per_step", [None, 2, 5])
def test_shapes_are_constant(layout, needs, tasks_per_step):
    source = feed(ragged(), layout, needs, tasks_per_step)
    shapes = {
        (*((tuple(t.shape), t.stride(), t.dtype) for t in (b.x, b.y, b.mask)), b.n_tasks)
        for number in range(15)
        for b in source.step(number)
    }
    assert len(shapes) == 1
    assert next(iter(shapes))[-1] == (tasks_per_step or 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tasks_per_step_takes_whole_tasks(layout):
    tasks = ragged()
    of_task = {float(x): int(t) for t, x in zip(tasks.task, tasks.flat_x[:, 0], strict=True)}
    source = feed(tasks, layout, tasks_per_step=2)
    seen = set()
    for number in range(30):
        support, query = source.step(number)
        found = rows(support) + rows(query)
        assert not set(rows(support)) & set(rows(query))
        # Positions 0 and 1 of the step are two different tasks, each with all of its rows.
        originals = [{of_task[x] for t, x in found if t == position} for position in (0, 1)]
        assert [len(o) for o in originals] == [1, 1]
        assert originals[0] != originals[1]
        chosen = originals[0] | originals[1]
        assert sorted(x for _, x in found) == sorted(x for x, t in of_task.items() if t in chosen)
        assert torch.equal(
            (support.counts + query.counts).long(),
            torch.stack([tasks.counts[o.pop()] for o in originals]),
        )
        seen |= chosen
    assert seen == set(range(5))


def test_layouts_see_the_same_numbers_of_rows():
    for number in range(5):
        for layout in LAYOUTS:
            support, query = feed(ragged(), layout).step(number)
            assert torch.equal(support.counts + query.counts, ragged().counts.double())


def test_same_seed_same_steps_in_any_order():
    for layout in LAYOUTS:
        one, other = feed(ragged(), layout, seed=3), feed(ragged(), layout, seed=3)
        forward = [rows(one.step(number)[0]) for number in range(6)]
        backward = [rows(other.step(number)[0]) for number in reversed(range(6))]
        assert forward == backward[::-1]
        assert len({str(step) for step in forward}) == 6
        assert forward != [rows(feed(ragged(), layout, seed=4).step(n)[0]) for n in range(6)]


def test_steps_leave_no_trace(untouched):
    source, drawn = feed(ragged()), feed(FAMILY)
    with untouched():
        source.step(0)
        drawn.step(0)


# Episodes, task sets, sources


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tasks_per_step", [None, 3])
def test_an_episode_keeps_its_cut(layout, tasks_per_step):
    tasks = ragged()
    episode = tasks.split(0.5, seed=1)
    in_support = {float(x) for x in episode.support.flat_x[:, 0]}
    source = feed(episode, layout, tasks_per_step=tasks_per_step)
    for number in range(8):
        support, query = source.step(number)
        assert {x for _, x in rows(support)} <= in_support
        assert not {x for _, x in rows(query)} & in_support
        if tasks_per_step is None:
            assert rows(support) == all_rows(episode.support)
            assert rows(query) == all_rows(episode.query)
        else:
            assert support.n_tasks == tasks_per_step


def test_an_episode_may_repeat_its_rows():
    """Support = query, as for one row per task: both steps see every row once."""
    tasks = case("eight_schools").tasks
    support, query = feed(Episode(tasks, tasks)).step(0)
    assert rows(support) == rows(query) == all_rows(tasks)


def test_an_episode_is_cut_anew_for_a_subset():
    episode = ragged().split(0.5, seed=1)
    support, query = feed(episode, needs="subset").step(0)
    assert rows(query) == all_rows(ragged())
    assert set(rows(support)) <= set(rows(query))


def test_a_task_set_gives_what_it_knows():
    whole = TaskSet(ragged())
    assert training_tasks(whole, 0) is whole.support
    split = whole.split(support=0.5, seed=0)
    support, query = feed(split).step(0)
    assert sorted(rows(support) + rows(query)) == all_rows(split.support)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_draws_new_tasks(layout):
    source = feed(FAMILY, layout, tasks_per_step=4)
    assert source.n_tasks is None
    support, query = source.step(0)
    assert support.n_tasks == query.n_tasks == 4
    assert not torch.equal(support.y[:1], source.step(1)[0].y[:1])
    again = feed(FAMILY, layout, tasks_per_step=4).step(0)
    assert torch.equal(again[0].y, support.y)
    assert bool((support.counts >= 2).all())
    assert feed(FAMILY, layout).step(0)[0].n_tasks == 25


def test_a_source_has_few_shapes_in_the_nested_layout():
    """Widths are rounded up to 8 points; padding repeats rows and is masked."""
    source = feed(FAMILY, "nested", tasks_per_step=25)
    steps = [source.step(number) for number in range(10)]
    assert {batch.x.shape[1] for step in steps for batch in step} == {8}
    assert all(bool(torch.isfinite(batch.x).all()) for step in steps for batch in step)
    assert all(bool((batch.counts <= 5).all()) for step in steps for batch in step)


class Recorded:
    """A source that remembers what was asked for and what it gave."""

    def __init__(self, family=FAMILY):
        self.family, self.asked, self.given = family, [], []

    def sample(self, n_tasks, *, seed):
        self.asked.append((n_tasks, seed))
        episode = self.family.sample(n_tasks, seed=seed)
        self.given.append(episode)
        return episode


def same_tasks(batch, tasks):
    """Whether a batch holds exactly these tasks, row for row."""
    assert batch.n_tasks == tasks.n_tasks
    assert torch.equal(batch.counts.long(), tasks.counts)
    kept = batch.mask
    index = batch.task[kept] if batch.task is not None else kept.nonzero()[:, 0]
    assert torch.equal(index, tasks.task)
    assert torch.equal(batch.x[kept], tasks.flat_x)
    assert torch.equal(batch.y[kept], tasks.flat_y)
    assert bool(torch.isfinite(batch.x).all())
    return True


@pytest.mark.parametrize("layout", [*LAYOUTS, "joint"])
@pytest.mark.parametrize("needs", ["split", "subset"])
def test_steps_are_cut_from_the_draws_of_a_source(layout, needs):
    """The slow way: tasks k·T to (k+1)·T of one draw of 32 steps, taken from the source itself."""
    source = Recorded()
    fed = feed(source, layout, needs, tasks_per_step=3)
    before = len(source.asked)
    steps = [fed.step(number) for number in range(70)]
    assert [n for n, _ in source.asked[before:]] == [96, 96, 96]
    seeds = [seed for _, seed in source.asked[before:]]
    assert len(set(seeds)) == 3
    assert min(seeds) > 1000  # hashed, no seed that a person would write
    for number, (support, query) in enumerate(steps):
        first = 3 * (number % 32)
        episode = source.given[before + number // 32][first : first + 3]
        assert support.layout == query.layout == layout
        if needs == "split":
            assert same_tasks(support, episode.support)
            assert same_tasks(query, episode.query)
        else:
            assert same_tasks(query, episode.all)
            assert set(rows(support)) <= set(rows(query))


@pytest.mark.parametrize("layout", [*LAYOUTS, "joint"])
def test_steps_of_a_ragged_source_have_few_shapes(layout):
    fed = feed(FAMILY, layout, tasks_per_step=4)
    steps = [fed.step(number) for number in range(150)]
    for role in (0, 1):
        shapes = {
            (*((tuple(t.shape), t.stride()) for t in (b.x, b.y, b.weight)), b.n_tasks)
            for b in (step[role] for step in steps)
        }
        assert len(shapes) <= (2 if layout == "flat" else 1)
        # Columns of x stand together in memory, as in every other batch.
        x = steps[0][role].x
        assert x.movedim(-1, 0).is_contiguous()


@pytest.mark.parametrize("layout", [*LAYOUTS, "joint"])
def test_tasks_of_one_size_are_not_padded(layout):
    source = LinearTasks([1.0], [[1.0]], noise=0.2, shots=5, queries=3)
    support, query = feed(source, layout, tasks_per_step=2).step(40)
    assert (int(support.mask.numel()), int(query.mask.numel())) == (10, 6)
    assert bool(support.mask.all())


def test_a_step_of_a_source_without_rows_has_a_masked_one():
    source = LinearTasks([1.0], [[1.0]], noise=0.2, shots=0, queries=3)
    for layout in LAYOUTS:
        support, query = feed(source, layout, tasks_per_step=2).step(0)
        assert support.counts.tolist() == [0.0, 0.0]
        assert support.mask.numel() >= 1
        assert query.counts.tolist() == [3.0, 3.0]


def test_same_steps_of_a_source_in_any_order():
    one, other = feed(FAMILY, tasks_per_step=2, seed=3), feed(FAMILY, tasks_per_step=2, seed=3)
    forward = [one.step(number)[1].y for number in range(0, 100, 7)]
    backward = [other.step(number)[1].y for number in reversed(range(0, 100, 7))]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward[::-1], strict=True))
    third = feed(FAMILY, tasks_per_step=2, seed=4)
    assert not any(
        torch.equal(third.step(n)[1].y[0, :1], y[0, :1])
        for n, y in zip(range(0, 100, 7), forward, strict=True)
    )


def test_large_tasks_are_drawn_for_fewer_steps_at_once(monkeypatch):
    monkeypatch.setattr(feeding, "_BYTES_PER_DRAW", 5000)
    source = Recorded(LinearTasks([1.0], [[1.0]], noise=0.2, shots=10, queries=10))
    fed = feed(source, tasks_per_step=3)  # 3 tasks × 20 rows × 3 numbers × 8 bytes = 1,440
    fed.step(0)
    assert source.asked[-1][0] == 9
    monkeypatch.setattr(feeding, "_BYTES_PER_DRAW", 1)
    feed(source, tasks_per_step=3).step(0)
    assert source.asked[-1][0] == 3


def test_a_source_whose_tasks_depend_on_each_other_is_asked_at_every_step():
    source = Recorded()
    source.independent_tasks = False
    fed = feed(source, tasks_per_step=3)
    before = len(source.asked)
    for number in range(4):
        fed.step(number)
    assert [n for n, _ in source.asked[before:]] == [3] * 4
    assert len({seed for _, seed in source.asked[before:]}) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_of_a_fixed_number_of_tasks_gives_them_at_every_step(layout):
    class Fixed:
        def sample(self, n_tasks, *, seed):
            return FAMILY.sample(5, seed=seed)

    fed = feed(Fixed(), layout, tasks_per_step=3)
    steps = [fed.step(number) for number in range(3)]
    assert [support.n_tasks for support, _ in steps] == [5, 5, 5]
    assert len({float(query.y.sum()) for _, query in steps}) == 3


def test_training_tasks_of_a_source():
    assert training_tasks(FAMILY, 5).n_tasks == 64
    assert training_tasks(FAMILY, 5).same_data(training_tasks(FAMILY, 5))


# Refusals


def test_one_row_per_task_cannot_be_split():
    with pytest.raises(DataError, match="tasks with two rows or more"):
        feed(case("eight_schools").tasks)
    feed(case("eight_schools").tasks, needs="subset").step(0)


@pytest.mark.parametrize("tasks_per_step", [0, 6, -1])
def test_more_tasks_per_step_than_there_are(tasks_per_step):
    with pytest.raises(DataError, match="tasks_per_step between 1 and 5"):
        feed(ragged(), tasks_per_step=tasks_per_step)


@pytest.mark.parametrize("tasks_per_step", [0, -1, 2.5])
def test_no_tasks_per_step_of_a_source(tasks_per_step):
    with pytest.raises(DataError, match="tasks_per_step of at least 1"):
        feed(FAMILY, tasks_per_step=tasks_per_step)


def test_a_source_that_gives_another_number_of_tasks():
    class Fixed:
        def sample(self, n_tasks, *, seed):
            return FAMILY.sample(min(n_tasks, 64), seed=seed)

    with pytest.raises(DataError, match=r"Fixed\.sample: needed as many .* 96; found 64"):
        feed(Fixed(), tasks_per_step=3).step(0)


def test_no_tasks_at_all():
    with pytest.raises(DataError, match=r"fit: needed Tasks.*found list"):
        training_tasks([[1.0, 2.0]], 0)


def test_a_step_of_a_few_flat_tasks_holds_their_rows_alone():
    """Not those of all tasks, masked: 300 of 3,000 tasks are a tenth of the work."""
    counts = torch.arange(1, 201) % 7 + 1
    task = torch.arange(200).repeat_interleave(counts)
    x = torch.arange(len(task), dtype=torch.float64).unsqueeze(1)
    batch = Batch.of(Tasks.from_flat(x, x[:, 0], task, 200), "flat")
    shapes = set()
    for number in range(50):
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randperm(200, generator=generator)[:20]
        part = taken(batch, chosen)
        shapes.add(part.x.shape[0])
        assert part.n_tasks == 20
        assert torch.equal(part.counts.long(), counts[chosen])
        real = part.mask
        for position, original in enumerate(chosen.tolist()):
            there = part.x[real & (part.task == position), 0]
            assert torch.equal(there, x[task == original, 0])
            assert torch.equal(part.y[real & (part.task == position)], there)
    # Five standard deviations above the mean: the same shape but once in a million steps.
    assert len(shapes) == 1
    assert shapes.pop() < len(task) / 4
    # The largest tasks of all still fit.
    largest = counts.topk(20).indices
    assert torch.equal(taken(batch, largest).counts.long(), counts[largest])
