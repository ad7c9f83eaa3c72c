"""The ragged layout (rows and a group index) and its padded form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hbmeta.errors import DataError

__all__ = ["RaggedLayout"]


class RaggedLayout:
    """Where each row of a ragged batch lies; values of any kind move between the two layouts.

    Args:
        task: (n,) int64, the position of each row's task, ascending.
        n_tasks: number of tasks, empty ones included.
    """

    task: Tensor
    """(n,) int64, the position of each row's task, ascending."""
    n_tasks: int
    """Number of tasks, empty ones included."""

    def __init__(self, task: Tensor, n_tasks: int) -> None:
        self.__dict__.update(task=task, n_tasks=n_tasks)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} never changes; build a new one ({name})")

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.task.device

    @property
    def n_points(self) -> int:
        """Number of rows n of all tasks together."""
        return int(self.task.shape[0])

    @cached_property
    def counts(self) -> Tensor:
        """(tasks,) int64, the number of rows of each task."""
        return torch.bincount(self.task, minlength=self.n_tasks)

    @cached_property
    def offsets(self) -> Tensor:
        """(tasks,) int64, the position of each task's first row in the flat layout."""
        return self.counts.cumsum(0) - self.counts

    @cached_property
    def max_points(self) -> int:
        """Width of the padded layout: the rows of the longest task, at least 1."""
        return max(1, int(self.counts.max()))

    @cached_property
    def mask(self) -> Tensor:
        """(tasks, max_points) bool, True where the padded layout holds a real row."""
        return torch.arange(self.max_points, device=self.device) < self.counts[:, None]

    @cached_property
    def _cells(self) -> Tensor:
        # (tasks, max_points): the flat row in each cell. A padding cell repeats the task's own
        # first row: zeros would be no valid point of a model (a scale of 0 gives NaN gradients).
        # An empty task has no row of its own and takes the first row of all.
        first = torch.where(self.counts > 0, self.offsets, 0)[:, None]
        within = torch.arange(self.max_points, device=self.device)
        return torch.where(self.mask, first + within, first)

    def pad(self, values: Tensor, *, dim: int = 0) -> Tensor:
        """Values per row (..., n, ...) in the padded layout (..., tasks, max_points, ...).

        Args:
            values: one entry per flat row along `dim`.
            dim: the dimension of the rows.
        """
        dim = dim % values.dim()
        _check_dimension("pad", values.shape[dim : dim + 1], (self.n_points,))
        before, after = values.shape[:dim], values.shape[dim + 1 :]
        if self.n_points == 0:
            return values.new_zeros((*before, *self._cells.shape, *after))
        rows = values.index_select(dim, self._cells.reshape(-1))
        return rows.reshape(*before, *self._cells.shape, *after)

    def unpad(self, padded: Tensor, *, dim: int = 0) -> Tensor:
        """Values of the padded layout (..., tasks, max_points, ...) per real row (..., n, ...).

        Args:
            padded: one entry per cell along `dim` (tasks) and `dim + 1` (points).
            dim: the dimension of the tasks.
        """
        dim = dim % padded.dim()
        cells = (self.n_tasks, self.max_points)
        _check_dimension("unpad", padded.shape[dim : dim + 2], cells)
        flat = padded.flatten(dim, dim + 1)
        return flat.index_select(dim, self.mask.reshape(-1).nonzero()[:, 0])

    def leading(self, keys: Tensor, wanted: Tensor) -> Tensor:
        """Mark the rows with the smallest keys of each task (n,) bool; ties go by row order.

        Args:
            keys: (n,) what to order the rows of a task by.
            wanted: (tasks,) how many rows of each task to mark.
        """
        order = torch.argsort(keys, stable=True)
        order = order[torch.argsort(self.task[order], stable=True)]  # by task, then by key
        within = torch.arange(self.n_points, device=self.device) - self.offsets[self.task]
        marked = torch.empty(self.n_points, dtype=torch.bool, device=self.device)
        marked[order] = within < wanted[self.task]
        return marked


def _check_dimension(method: str, found: Sequence[int], needed: tuple[int, ...]) -> None:
    if tuple(found) != needed:
        raise DataError(
            f"Tasks.{method}",
            needed=f"dimensions {needed} at dim",
            found=f"{tuple(found)}",
            do="Pass the dim of the rows (pad) or of the tasks (unpad).",
        )
