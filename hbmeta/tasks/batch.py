"""Batches of tasks: the data D_i = S_i ∪ Q_i of level 3, ragged inside, padded on demand.

The rows of all tasks lie one after another (`flat_x`, `flat_y`) with a group index (`task`), sorted
by task. Programs of the nested layout read `x`, `y` and `mask`, padded to the longest task.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.checks import (
    TaskId,
    check_features,
    check_finite,
    check_ids,
    check_labels,
    flatten_padded,
    generator,
    sort_flat,
)
from hbmeta.tasks.layout import RaggedLayout
from hbmeta.tasks.selection import Selection, positions_of, shown, support_counts

__all__ = ["Episode", "TaskSource", "Tasks"]


class Tasks(RaggedLayout):
    """Rows of several tasks, which may differ in their number of rows (0 is allowed).

    Nothing here changes after construction; every method returns new tasks.

    Args:
        x: (tasks, points, features), floating point; tensor, array or nested lists (float64).
        y: (tasks, points) numbers, (tasks, points) int64 class labels 0..k-1,
            (tasks, points, k) vectors, or None where only inputs are known.
        mask: (tasks, points) bool, True where a row is real; None where all rows are.
            What stands in the other rows is ignored.
        ids: a different str or int per task; 0..tasks-1 by default.
        features: names of the columns of x; "x0", "x1", ... by default.
    Raises:
        DataError: NaN or infinite values, a wrong shape or dtype, repeated ids or names, no tasks.
    Example:
        >>> tasks = Tasks(
        ...     [[[1.0], [2.0]], [[3.0], [0.0]]],
        ...     [[0.1, 0.2], [0.3, 0.0]],
        ...     mask=[[True, True], [True, False]],
        ...     ids=["a", "b"],
        ... )
        >>> tasks.counts.tolist(), tasks.flat_y.tolist()
        ([2, 1], [0.1, 0.2, 0.3])
    """

    flat_x: Tensor
    """(n, features), the real rows, task after task."""
    flat_y: Tensor | None
    """(n,) or (n, k), or None."""
    ids: tuple[TaskId, ...]
    """One label per task."""
    features: tuple[str, ...]
    """One name per column of x."""

    def __init__(
        self,
        x: Any,
        y: Any = None,
        mask: Any = None,
        ids: Iterable[Any] | None = None,
        features: Sequence[str] | None = None,
    ) -> None:
        rows_x, rows_y, task, n_tasks = flatten_padded(x, y, mask, where="Tasks")
        self._check_and_set(rows_x, rows_y, task, n_tasks, ids, features, where="Tasks")

    @classmethod
    def from_flat(
        cls,
        x: Any,
        y: Any,
        task: Any,
        n_tasks: int,
        *,
        ids: Iterable[Any] | None = None,
        features: Sequence[str] | None = None,
    ) -> Tasks:
        """Tasks from rows and a group index, in any order; the order inside a task is kept.

        Args:
            x: (n, features), floating point.
            y: (n,) numbers, (n,) int64 class labels, (n, k) vectors, or None.
            task: (n,) whole numbers from 0 to n_tasks - 1, the task of each row.
            n_tasks: number of tasks; one without a row is empty.
            ids: a different str or int per task; 0..n_tasks-1 by default.
            features: names of the columns of x.
        Raises:
            DataError: as for `Tasks`, and where an index lies outside 0..n_tasks-1.
        """
        where = "Tasks.from_flat"
        tasks = cls.__new__(cls)
        rows_x, rows_y, index = sort_flat(x, y, task, n_tasks, where=where)
        tasks._check_and_set(rows_x, rows_y, index, n_tasks, ids, features, where=where)
        return tasks

    def _check_and_set(
        self,
        x: Tensor,
        y: Tensor | None,
        task: Tensor,
        n_tasks: int,
        ids: Iterable[Any] | None,
        features: Sequence[str] | None,
        *,
        where: str,
    ) -> None:
        if n_tasks < 1:
            raise DataError(
                where, needed="at least one task", found="none", do="Pass the data of a task."
            )
        labels = check_ids(ids, n_tasks, where=where)
        names = check_features(features, int(x.shape[1]), where=where)
        check_finite(x, "x", task, labels, names, where=where)
        if y is not None:
            check_finite(y, "y", task, labels, None, where=where)
            check_labels(y, where=where)
        y = None if y is None else y.detach()
        self._set(x.detach(), y, task, labels, names)

    def _set(
        self,
        x: Tensor,
        y: Tensor | None,
        task: Tensor,
        ids: tuple[TaskId, ...],
        features: tuple[str, ...],
    ) -> None:
        super().__init__(task, len(ids))
        # Past __setattr__, which refuses: what is cached below must never become stale.
        self.__dict__.update(flat_x=x, flat_y=y, ids=ids, features=features)

    def _derive(
        self, x: Tensor, y: Tensor | None, task: Tensor, ids: tuple[TaskId, ...] | None = None
    ) -> Tasks:
        """Tasks from parts that were checked before; subsets are taken at every training step."""
        tasks = Tasks.__new__(Tasks)
        tasks._set(x, y, task, self.ids if ids is None else ids, self.features)
        return tasks

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of x."""
        return self.flat_x.dtype

    @cached_property
    def x(self) -> Tensor:
        """(tasks, max_points, features), padded with real rows."""
        return self.pad(self.flat_x)

    @cached_property
    def y(self) -> Tensor | None:
        """(tasks, max_points) or (tasks, max_points, k), padded with real rows, or None."""
        return None if self.flat_y is None else self.pad(self.flat_y)

    def __len__(self) -> int:
        return self.n_tasks

    def __getitem__(self, selection: Selection) -> Tasks:
        """The tasks at the given positions, in the given order: a slice, a list, an int tensor."""
        positions = positions_of(selection, self.n_tasks)
        index = torch.tensor(positions, dtype=torch.int64, device=self.device)
        counts = self.counts[index]
        task = torch.repeat_interleave(torch.arange(len(index), device=self.device), counts)
        # The k-th row of the i-th chosen task is row offsets[index[i]] + k of the flat layout.
        starts = self.offsets[index] - (counts.cumsum(0) - counts)
        rows = starts[task] + torch.arange(len(task), device=self.device)
        y = None if self.flat_y is None else self.flat_y[rows]
        return self._derive(self.flat_x[rows], y, task, tuple(self.ids[i] for i in positions))

    def select(self, ids: Iterable[TaskId]) -> Tasks:
        """The tasks of the given ids, in the given order."""
        return self[[self.position(label) for label in ids]]

    @cached_property
    def _position(self) -> dict[TaskId, int]:
        return {label: position for position, label in enumerate(self.ids)}

    def position(self, id: TaskId) -> int:
        """Position of the task of that id."""
        if id not in self._position:
            raise DataError(
                "Tasks",
                needed=f"an id among these {self.n_tasks}: {shown(self.ids)}",
                found=f"{id!r}",
                do="Look the labels up in tasks.ids.",
            )
        return self._position[id]

    def keep(self, rows: Tensor) -> Tasks:
        """The rows that are True; all tasks stay, possibly empty.

        Args:
            rows: (n,) bool over the flat rows.
        """
        rows = torch.as_tensor(rows)
        if rows.dtype != torch.bool or tuple(rows.shape) != (self.n_points,):
            raise DataError(
                "Tasks.keep",
                needed=f"a bool tensor of shape ({self.n_points},), one entry per flat row",
                found=f"dtype {str(rows.dtype).removeprefix('torch.')}, shape {tuple(rows.shape)}",
                do="Compare a column of flat_x or flat_y, or call tasks.unpad on a padded mask.",
            )
        rows = rows.to(self.device)
        y = None if self.flat_y is None else self.flat_y[rows]
        return self._derive(self.flat_x[rows], y, self.task[rows])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tasks:
        """The same tasks on a device, their numbers in a floating dtype (class labels stay)."""
        if dtype is not None and not dtype.is_floating_point:
            raise DataError(
                "Tasks.to", needed="a floating dtype", found=f"{dtype}", do="Pass torch.float64."
            )
        y = self.flat_y
        if y is not None:
            y = y.to(device=device, dtype=dtype if y.is_floating_point() else None)
        x = self.flat_x.to(device=device, dtype=dtype)
        return self._derive(x, y, self.task.to(device=device))

    def split(self, support: int | float, *, seed: int) -> Episode:
        """Split every task at random into support and query rows (both keep the rows' order).

        A task of two or more rows keeps at least one row for the query. A task of a single row
        keeps it as support and has no query, unless `support=0`.

        Args:
            support: number of support rows (int), or their fraction between 0 and 1 (float),
                rounded to the nearest number that leaves a support row and a query row.
            seed: the split is a function of the seed and the numbers of rows.
        """
        wanted = support_counts(self.counts, support, where="Tasks.split")
        draw = generator(seed, where="Tasks.split")
        keys = torch.rand(self.n_points, generator=draw, dtype=torch.float64)
        chosen = self.leading(keys.to(self.device), wanted)
        return Episode(self.keep(chosen), self.keep(~chosen))

    @staticmethod
    def concatenate(parts: Sequence[Tasks]) -> Tasks:
        """Put the rows of each task together, part after part, such as support ∪ query.

        Args:
            parts: tasks of the same ids in the same order, with the same features.
        """
        if not parts:
            raise DataError(
                "Tasks.concatenate", needed="at least one part", found="none", do="Pass a list."
            )
        for part in parts[1:]:
            _check_alike(parts[0], part, where="Tasks.concatenate")
        task = torch.cat([part.task for part in parts])
        order = torch.argsort(task, stable=True)
        ys = [part.flat_y for part in parts if part.flat_y is not None]
        if ys and (len(ys) < len(parts) or len({(y.dtype, y.shape[1:]) for y in ys}) > 1):
            raise DataError(
                "Tasks.concatenate",
                needed="parts that all have the same kind of y, or none",
                found="; ".join(map(repr, parts)),
                do="Put inputs together with inputs, and complete data with complete data.",
            )
        x = torch.cat([part.flat_x for part in parts])[order]
        return parts[0]._derive(x, torch.cat(ys)[order] if ys else None, task[order])

    def same_data(self, other: Tasks) -> bool:
        """Whether ids, x, y and the group index are equal."""
        if (self.ids, self.dtype) != (other.ids, other.dtype):
            return False
        if self.flat_y is None or other.flat_y is None:
            same_y = self.flat_y is other.flat_y
        else:
            same_y = self.flat_y.dtype == other.flat_y.dtype and torch.equal(
                self.flat_y, other.flat_y
            )
        same_rows = torch.equal(self.task, other.task) and torch.equal(self.flat_x, other.flat_x)
        return same_y and same_rows

    def __repr__(self) -> str:
        y = self.flat_y
        if y is None:
            kind = "no y"
        elif not y.is_floating_point():
            kind = "y class labels"
        else:
            kind = "y numbers" if y.dim() == 1 else f"y vectors of {y.shape[1]}"
        low, high = int(self.counts.min()), int(self.counts.max())
        each = f"{low} each" if low == high else f"{low} to {high} each"
        return (
            f"Tasks({self.n_tasks} tasks, {self.n_points} points ({each}), "
            f"features [{', '.join(self.features)}], {kind}, "
            f"{str(self.dtype).removeprefix('torch.')})"
        )


@dataclass(frozen=True)
class Episode:
    """Support sets S_i to adapt to, and query sets Q_i to be judged on, of the same tasks.

    Args:
        support: what a strategy may see of each task.
        query: the rows it is judged on; ids and features as in the support.
    Raises:
        DataError: the two differ in ids, their order, or features.
    """

    support: Tasks
    query: Tasks

    def __post_init__(self) -> None:
        _check_alike(self.support, self.query, where="Episode")

    @property
    def ids(self) -> tuple[TaskId, ...]:
        """One label per task."""
        return self.support.ids

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.support.n_tasks

    @property
    def all(self) -> Tasks:
        """S_i ∪ Q_i: the support rows of each task, then its query rows."""
        return Tasks.concatenate([self.support, self.query])

    @property
    def without_query(self) -> tuple[TaskId, ...]:
        """The ids of tasks that have no query row."""
        counts = self.query.counts.tolist()
        return tuple(label for label, count in zip(self.ids, counts, strict=True) if not count)

    def __len__(self) -> int:
        return self.n_tasks

    def __getitem__(self, selection: Selection) -> Episode:
        """The tasks at the given positions: a slice, a list, an int tensor."""
        return Episode(self.support[selection], self.query[selection])

    def select(self, ids: Iterable[TaskId]) -> Episode:
        """The tasks of the given ids, in the given order."""
        chosen = tuple(ids)
        return Episode(self.support.select(chosen), self.query.select(chosen))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Episode:
        """The same episode on a device, its numbers in a floating dtype."""
        return Episode(self.support.to(device, dtype), self.query.to(device, dtype))


class TaskSource(Protocol):
    """Anything that tasks can be drawn from, without end: a synthetic family, an image set.

    Tasks are independent of each other, so that training draws those of many steps in one call. A
    source whose tasks of one call share something (a number of rows that is drawn once) sets an
    attribute `independent_tasks = False` and is called at every step.
    """

    def sample(self, n_tasks: int, *, seed: int) -> Episode:
        """Draw n_tasks tasks with their support and query rows; a function of the seed alone."""
        ...


def _check_alike(first: Tasks, second: Tasks, *, where: str) -> None:
    for part in (first, second):
        if not isinstance(part, Tasks):
            found = type(part).__name__
            raise DataError(where, needed="Tasks", found=found, do="Wrap arrays in Tasks(x, y).")
    if first.ids != second.ids:
        differing = [id for id in first.ids if id not in set(second.ids)] + [
            id for id in second.ids if id not in set(first.ids)
        ]
        raise DataError(
            where,
            needed="the same ids in the same order in both parts",
            found=f"ids in one part only: {shown(differing)}" if differing else "another order",
            do="Bring them into one order with tasks.select(ids).",
        )
    if first.features != second.features:
        raise DataError(
            where,
            needed="the same features in both parts",
            found=f"{shown(first.features)} and {shown(second.features)}",
            do="Build both parts with the same columns of x.",
        )
