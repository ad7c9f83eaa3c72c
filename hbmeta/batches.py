"""What a program is called with: a batch of tasks in one of the three layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hbmeta.tasks import Tasks

Program = Callable[..., Any]
Layout = Literal["nested", "flat", "joint"]
Context = tuple[Tensor, Tensor]
"""x (tasks, rows, features) and weight (tasks, rows) of the rows that predictions condition on."""

__all__ = ["Batch", "Context", "Layout", "Program"]


@dataclass(frozen=True)
class Batch:
    """The data of a batch of tasks as a program sees them; a tree of tensors.

    Attributes:
        x: (tasks, points, features) nested and joint, (rows, features) flat.
        y: (tasks, points, ...) or (rows, ...); None where only inputs are known.
        weight: 1 where a cell counts and 0 where it does not (padding, rows of the query); (tasks,
            points) or (rows,), in the dtype of x: a compiled graph reads it twice as fast as a
            bool.
        task: (rows,) the group index of the flat layout, None in the others.
        n_tasks: number of tasks, those without rows counted.
        joint: whether the program takes the points of a task as one observation.
        context: x and weight of the rows that the cells are conditioned on, for a nested program
            that asks for them (`hbmeta.program.takes_context`); None leaves the keyword out.
    """

    x: Tensor
    y: Tensor | None
    weight: Tensor
    task: Tensor | None
    n_tasks: int
    joint: bool = False
    context: Context | None = None

    @staticmethod
    def of(tasks: Tasks, layout: Layout) -> Batch:
        """The batch of all rows of `tasks` in the given layout."""
        if layout != "flat":
            x, weight = _by_column(tasks.x), tasks.mask.to(tasks.dtype)
            return Batch(x, tasks.y, weight, None, tasks.n_tasks, layout == "joint")
        weight = torch.ones(tasks.n_points, dtype=tasks.dtype, device=tasks.device)
        return Batch(_by_column(tasks.flat_x), tasks.flat_y, weight, tasks.task, tasks.n_tasks)

    @property
    def layout(self) -> Layout:
        """Which of the three layouts this is."""
        if self.task is not None:
            return "flat"
        return "joint" if self.joint else "nested"

    @property
    def counts(self) -> Tensor:
        """(tasks,) number of real rows per task, in the dtype of x."""
        return self.per_task(self.weight)

    @property
    def mask(self) -> Tensor:
        """True where a cell counts."""
        return self.weight > 0

    def per_task(self, rows: Tensor) -> Tensor:
        """Sums (tasks, points) or (rows,) values over the rows of each task, whatever the mask."""
        if self.task is None:
            return rows.sum(-1)
        # In float32 at least: a running sum of ones in bfloat16 stops at 256.
        total = torch.promote_types(rows.dtype, torch.float32)
        start = rows.new_zeros(self.n_tasks, dtype=total)
        return start.index_add(0, self.task, rows.to(total)).to(rows.dtype)

    def where(self, mask: Tensor) -> Batch:
        """The same cells with another mask: how a support or a query is cut from a task."""
        return replace(self, weight=mask.to(self.x.dtype))

    def beside(self, other: Batch) -> Batch:
        """The cells of both, those of each task side by side; not for the flat layout."""
        x, weight = torch.cat([self.x, other.x], 1), torch.cat([self.weight, other.weight], 1)
        known = self.y is not None and other.y is not None
        y = torch.cat([self.y, other.y], 1) if known else None  # type: ignore[list-item]
        return replace(self, x=x, y=y, weight=weight)

    def run(self, program: Program, *, with_y: bool) -> None:
        """Calls the program on this batch, in its own layout."""
        y = self.y if with_y else None
        if self.joint:
            program(self.x, y, mask=self.mask)
        elif self.task is not None:
            program(self.x, y, task=self.task, n_tasks=self.n_tasks)
        elif self.context is not None:
            program(self.x, y, context=self.context)
        else:
            program(self.x, y)


def _by_column(x: Tensor) -> Tensor:
    """The same values with each column contiguous in memory.

    A program reads x column by column; with rows in memory a compiled graph gathers with a stride
    (radon, nested: 50 against 32 microseconds for a gradient). Wide x is for matrix products.
    """
    if not 2 <= x.shape[-1] <= 16:
        return x
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _flatten(batch: Batch) -> tuple[list[Any], tuple[int, bool]]:
    leaves = [batch.x, batch.y, batch.weight, batch.task, batch.context]
    return leaves, (batch.n_tasks, batch.joint)


def _unflatten(leaves: Iterable[Any], known: tuple[int, bool]) -> Batch:
    x, y, weight, task, context = leaves
    return Batch(x, y, weight, task, *known, context)


torch.utils._pytree.register_pytree_node(Batch, _flatten, _unflatten)
