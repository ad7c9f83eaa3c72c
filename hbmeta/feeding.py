"""What a training step sees: support and query batches of constant shape, drawn from any tasks.

Of plain tasks every step takes all of them, or `tasks_per_step` at random, and cuts each task anew:
with a rate p_i ~ U(0, 1) per task every row goes to the support with probability p_i, so the size
of the support is uniform on 0..n_i. An episode keeps its own cut.

A source draws new tasks at every step. Its tasks are independent of each other, so those of many
steps are drawn and laid out at once and then cut step by step: one call of `sample` costs about as
much as one compiled step of a small model. Which tasks a step sees is a function of the seed and
the number of the step, wherever training starts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.program import Batch, Layout
from hbmeta.tasks import Episode, Tasks, TaskSet

Needs = Literal["split", "subset"]

# Steps whose tasks a source draws at once, fewer where these would take more than so many bytes.
_STEPS_PER_DRAW = 32
_BYTES_PER_DRAW = 16_000_000
_TASKS_OF_A_SOURCE = 25
_FIRST_SAMPLE = 64

__all__ = ["Feed", "Needs", "taken", "training_tasks"]


def training_tasks(data: Any, seed: int) -> Tasks:
    """The tasks that a program is read from and that keep the posterior of the fit.

    A TaskSet gives what it knows (its support), an episode all its rows, a source a first sample.
    """
    if isinstance(data, TaskSet):
        return data.support
    if isinstance(data, Episode):
        return data.all
    if isinstance(data, Tasks):
        return data
    if hasattr(data, "sample") and not isinstance(data, pd.DataFrame):
        return _sampled(data, _FIRST_SAMPLE, seed).all
    raise _no_tasks(type(data).__name__)


def _no_tasks(found: str) -> DataError:
    return DataError(
        "fit",
        needed="Tasks, an Episode, a TaskSet (tasks.from_frame) or a source of episodes with "
        "sample(n_tasks, seed=)",
        found=found,
        do="Wrap a data frame in tasks.from_frame, arrays in Tasks(x, y).",
    )


def _sampled(source: Any, n_tasks: int, seed: int) -> Episode:
    episode = source.sample(n_tasks, seed=seed)
    if not isinstance(episode, Episode):
        found = f"{type(source).__name__}, whose sample returns {type(episode).__name__}"
        raise _no_tasks(found)
    return episode


class Feed:
    """Support and query of training steps.

    Args:
        data: what `fit` was given.
        layout: the layout of the problem.
        needs: "split" for losses on a query that the support does not hold; "subset" for losses
            on all rows of a task, with a support inside them.
        tasks_per_step: tasks in a step; None for all, and 25 for a source.
        seed: of all draws.
        device, dtype: where the steps are, and of what precision.
    """

    def __init__(
        self,
        data: Any,
        layout: Layout,
        needs: Needs,
        tasks_per_step: int | None,
        seed: int,
        device: Any,
        dtype: Any,
    ) -> None:
        self.data, self.layout, self.needs = data, layout, needs
        self.tasks_per_step, self.seed = tasks_per_step, seed
        self.device, self.dtype = device, dtype
        self.is_source = not isinstance(data, (TaskSet, Episode, Tasks))
        if self.is_source:
            self.n_tasks: int | None = None
            self.n_contributing: int | None = None
            self._prepare_source()
            return
        tasks = training_tasks(data, seed).to(device=device, dtype=dtype)
        self.n_tasks = tasks.n_tasks
        # Tasks that a loss is averaged over in some step; an episode says which rows are queries.
        rows = data.query.counts if isinstance(data, Episode) and needs == "split" else tasks.counts
        self.n_contributing = max(int((rows > 0).sum()), 1)
        self.all = Batch.of(tasks, layout)
        self.index = self.all.task if self.all.task is not None else None
        self.given: Tensor | None = None
        if isinstance(data, Episode):
            # Rows of the union come support first in each task: the cut is a comparison of ranks.
            rank = (
                torch.arange(tasks.n_points, device=device) - tasks.offsets.to(device)[tasks.task]
            )
            is_support = rank < data.support.counts.to(device)[tasks.task]
            self.given = is_support if layout == "flat" else tasks.pad(is_support) & tasks.mask
        if needs == "split" and self.given is None and int(tasks.counts.max()) < 2:
            raise DataError(
                "fit",
                needed="tasks with two rows or more, to split into support and query",
                found="one row per task",
                do="Use a strategy without a query loss (AmortizedGuide, NUTS), or pass an "
                "Episode.",
            )
        if tasks_per_step is not None and not 1 <= tasks_per_step <= tasks.n_tasks:
            raise DataError(
                "fit",
                needed=f"tasks_per_step between 1 and {tasks.n_tasks}",
                found=str(tasks_per_step),
                do="Leave it out to use all tasks at every step.",
            )

    def step(self, number: int) -> tuple[Batch, Batch]:
        """Support and query of step `number`; the same for the same seed and number."""
        if self.is_source:
            return self._from_source(number)
        batch, given = self.all, self.given
        generator = self._generator(number)
        if self.tasks_per_step is not None and self.tasks_per_step < batch.n_tasks:
            chosen = torch.randperm(batch.n_tasks, generator=generator)[: self.tasks_per_step]
            batch, given = _take(batch, given, chosen.to(batch.x.device))
        return self._cut(batch, given, generator)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % (2**63))

    def _cut(
        self, batch: Batch, given: Tensor | None, generator: torch.Generator
    ) -> tuple[Batch, Batch]:
        if given is not None and self.needs == "split":
            return batch.where(given & batch.mask), batch.where(batch.mask & ~given)
        rate = torch.rand(batch.n_tasks, generator=generator)
        key = torch.rand(batch.mask.shape, generator=generator)
        per_cell = rate.unsqueeze(1) if batch.task is None else rate[batch.task.cpu()]
        inside = (key < per_cell).to(batch.mask.device) & batch.mask
        if self.needs == "split":
            return batch.where(inside), batch.where(batch.mask & ~inside)
        return batch.where(inside), batch

    # -- sources --------------------------------------------------------------------------------

    def _prepare_source(self) -> None:
        """How many steps to draw at once, from a first sample."""
        n_tasks = _TASKS_OF_A_SOURCE if self.tasks_per_step is None else self.tasks_per_step
        if not isinstance(n_tasks, int) or n_tasks < 1:
            raise DataError(
                "fit",
                needed="tasks_per_step of at least 1",
                found=f"tasks_per_step={n_tasks}",
                do=f"Leave it out to draw {_TASKS_OF_A_SOURCE} tasks at every step.",
            )
        self.tasks_per_step = n_tasks
        first = _sampled(self.data, _FIRST_SAMPLE, self.seed)
        first = first.to(device=self.device, dtype=self.dtype)
        whole = first.all
        self._sizes = {
            role: part.counts
            for role, part in (("support", first.support), ("query", first.query), ("all", whole))
        }
        self._row = whole.flat_x[:1], None if whole.flat_y is None else whole.flat_y[:1]
        numbers = whole.max_points * (whole.flat_x.shape[1] + 2)
        bytes_per_step = n_tasks * numbers * whole.flat_x.element_size()
        self._steps_per_draw = 1
        # A source that gives another number than was asked for does so at every step.
        countable = first.n_tasks == _FIRST_SAMPLE
        if countable and getattr(self.data, "independent_tasks", True):
            fitting = _BYTES_PER_DRAW // max(bytes_per_step, 1)
            self._steps_per_draw = min(max(fitting, 1), _STEPS_PER_DRAW)
        self._draw: tuple[int, list[tuple[Batch, ...]]] = (-1, [])

    def _from_source(self, number: int) -> tuple[Batch, Batch]:
        draw, position = divmod(number, self._steps_per_draw)
        if self._draw[0] != draw:
            self._draw = (draw, self._drawn(draw))
        batches = self._draw[1][position]
        if self.needs == "split":
            return batches[0], batches[1]
        return self._cut(batches[0], None, self._generator(number))

    def _drawn(self, draw: int) -> list[tuple[Batch, ...]]:
        """The batches of all steps of a draw: support and query, or all rows."""
        assert self.tasks_per_step is not None
        # Hashed, so that no draw is the sample that a person judges the fit on, seed=1 or so.
        state = np.random.SeedSequence([self.seed, draw]).generate_state(1, np.uint32)
        n_tasks = self.tasks_per_step * self._steps_per_draw
        episode = _sampled(self.data, n_tasks, int(state[0] >> 1))
        if self._steps_per_draw == 1:
            n_tasks = episode.n_tasks
        if episode.n_tasks != n_tasks:
            raise DataError(
                f"{type(self.data).__name__}.sample",
                needed=f"as many tasks as are asked for, {n_tasks}",
                found=f"{episode.n_tasks} tasks",
                do="Draw n_tasks tasks, or set independent_tasks = False on the source.",
            )
        each = n_tasks // self._steps_per_draw
        episode = episode.to(device=self.device, dtype=self.dtype)
        parts = {"support": episode.support, "query": episode.query}
        if self.needs != "split":
            parts = {"all": episode.all}
        batches = [
            _steps_of(tasks, each, self.layout, self._sizes[role], self._row)
            for role, tasks in parts.items()
        ]
        return list(zip(*batches, strict=True))


def _steps_of(
    tasks: Tasks, each: int, layout: Layout, sizes: Tensor, row: tuple[Tensor, Tensor | None]
) -> list[Batch]:
    """Tasks cut into batches of `each` tasks, all of one shape.

    Where sizes differ, shapes are rounded up, so that few are traced: to the longest task (nested,
    joint) or the step with the most rows (flat), and then by an eighth at most.

    Args:
        tasks: those of all steps, one step after the other.
        each: tasks in a step.
        layout: of the batches.
        sizes: rows per task of a first sample, which tell sizes that are always the same from
            those that differ from draw to draw.
        row: x and y of a row to pad flat batches with, masked.
    """
    differ = len(torch.cat([tasks.counts, sizes]).unique()) > 1
    whole = Batch.of(tasks, layout)
    n_steps = tasks.n_tasks // each
    if layout != "flat":
        width = whole.x.shape[1]
        short = _rounded(width) - width if differ else 0
        if short:
            # Each task's own first row, masked.
            x = torch.cat([whole.x, whole.x[:, :1].expand(-1, short, -1)], 1)
            weight = torch.nn.functional.pad(whole.weight, (0, short))
            y = None
            if whole.y is not None:
                y = torch.cat([whole.y, whole.y[:, :1].expand(-1, short, *whole.y.shape[2:])], 1)
            whole = replace(whole, x=_in_order_of(whole.x, x), y=y, weight=weight)
        ys = [None] * n_steps if whole.y is None else whole.y.split(each)
        return [
            Batch(_in_order_of(whole.x, x), y, weight, None, each, whole.joint)
            for x, y, weight in zip(whole.x.split(each), ys, whole.weight.split(each), strict=True)
        ]
    counts = tasks.counts.reshape(n_steps, each).sum(1)
    longest = max(int(counts.max()), 1)
    length = _rounded(longest) if differ else longest
    found = []
    for k, (count, end) in enumerate(zip(counts.tolist(), counts.cumsum(0).tolist(), strict=True)):
        cut, extra = slice(end - count, end), length - count
        y = None
        if whole.y is not None and row[1] is not None:
            y = torch.cat([whole.y[cut], row[1].expand(extra, *row[1].shape[1:])])
        x = torch.cat([whole.x[cut], row[0].expand(extra, -1)])
        task = torch.nn.functional.pad(tasks.task[cut] - k * each, (0, extra))
        weight = torch.nn.functional.pad(whole.weight[cut], (0, extra))
        found.append(Batch(_in_order_of(whole.x, x), y, weight, task, each))
    return found


def _rounded(size: int) -> int:
    """The size rounded up to one of few: to a multiple of 8, or by an eighth at most."""
    step = max(8, 1 << max(size.bit_length() - 4, 0))
    return max(-(-size // step), 1) * step


def _in_order_of(x: Tensor, values: Tensor) -> Tensor:
    """The values without gaps in memory, their dimensions in the order of those of x."""
    if values.is_contiguous() and x.is_contiguous():
        return values
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    back = [order.index(d) for d in range(x.ndim)]
    return values.permute(order).contiguous().permute(back)


def taken(batch: Batch, chosen: Tensor) -> Batch:
    """Some tasks of a batch, by position, in the same shape at every call; see `_take`."""
    return _take(batch, None, chosen)[0]


def _take(batch: Batch, given: Tensor | None, chosen: Tensor) -> tuple[Batch, Tensor | None]:
    """Some tasks of a batch, in the same shape at every call.

    Flat rows are padded with masked rows of task 0 to a length that random tasks of that number
    seldom reach, and to the largest that they can have where they do: a length that changed from
    step to step would be traced anew each time.
    """
    n = chosen.shape[0]
    if batch.task is None:
        y = None if batch.y is None else batch.y[chosen]
        taken = replace(batch, x=batch.x[chosen], y=y, weight=batch.weight[chosen], n_tasks=n)
        return taken, None if given is None else given[chosen]
    position = torch.full((batch.n_tasks,), -1, dtype=torch.int64, device=batch.x.device)
    position[chosen] = torch.arange(n, device=batch.x.device)
    rows = (position[batch.task] >= 0).nonzero().squeeze(1)
    short = _length(batch, n, rows.shape[0]) - rows.shape[0]
    rows = torch.nn.functional.pad(rows, (0, short))
    real = torch.ones_like(batch.weight[rows])
    real[real.shape[0] - short :] = 0
    part = Batch(
        _in_order_of(batch.x, batch.x[rows]),
        None if batch.y is None else batch.y[rows],
        batch.weight[rows] * real,
        torch.where(real > 0, position[batch.task[rows]], 0),
        n,
    )
    return part, None if given is None else given[rows]


def _length(batch: Batch, n: int, needed: int) -> int:
    """Rows of n tasks: five standard deviations above the mean of random ones, or their most."""
    assert batch.task is not None
    sizes = torch.bincount(batch.task, minlength=batch.n_tasks)
    most = int(sizes.topk(n).values.sum())
    usual = (
        n * float(sizes.double().mean()) + 5 * (n * float(sizes.double().var(correction=0))) ** 0.5
    )
    return max(most if needed > usual else min(most, _rounded(int(usual))), 1)
