"""What a training step sees: support and query batches of constant shape, drawn from any tasks.

Of plain tasks every step takes all of them, or `tasks_per_step` at random, and cuts each task anew:
with a rate p_i ~ U(0, 1) per task every row goes to the support with probability p_i, so the size
of the support is uniform on 0..n_i. An episode keeps its own cut; a source draws new tasks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.program import Batch, Layout
from hbmeta.tasks import Episode, Tasks, TaskSet

Needs = Literal["split", "subset"]

__all__ = ["Feed", "Needs", "training_tasks"]


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
    found = type(data).__name__
    if hasattr(data, "sample") and not isinstance(data, pd.DataFrame):
        first = data.sample(64, seed=seed)
        if isinstance(first, Episode):
            return first.all
        found += f", whose sample returns {type(first).__name__}"
    raise DataError(
        "fit",
        needed="Tasks, an Episode, a TaskSet (tasks.from_frame) or a source of episodes with "
        "sample(n_tasks, seed=)",
        found=found,
        do="Wrap a data frame in tasks.from_frame, arrays in Tasks(x, y).",
    )


class Feed:
    """Support and query of training steps.

    Args:
        data: what `fit` was given.
        layout: the layout of the problem.
        needs: "split" for losses on a query that the support does not hold; "subset" for losses
            on all rows of a task, with a support inside them.
        tasks_per_step: tasks in a step; None for all, and 25 for a source.
        seed: of all draws.
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
        self._widths: dict[str, set[int]] = {}
        self.is_source = not isinstance(data, (TaskSet, Episode, Tasks))
        if self.is_source:
            self.n_tasks: int | None = None
            self.n_contributing: int | None = None
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
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % (2**63))
        if self.is_source:
            return self._from_source(number, generator)
        batch, given = self.all, self.given
        if self.tasks_per_step is not None and self.tasks_per_step < batch.n_tasks:
            chosen = torch.randperm(batch.n_tasks, generator=generator)[: self.tasks_per_step]
            batch, given = _take(batch, given, chosen.to(batch.x.device))
        return self._cut(batch, given, generator)

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

    def _from_source(self, number: int, generator: torch.Generator) -> tuple[Batch, Batch]:
        seed = (self.seed * 1_000_003 + number) % (2**31)
        episode = self.data.sample(self.tasks_per_step or 25, seed=seed)
        episode = Episode(
            episode.support.to(device=self.device, dtype=self.dtype),
            episode.query.to(device=self.device, dtype=self.dtype),
        )
        if self.needs == "split":
            return self._shaped(episode.support, "support"), self._shaped(episode.query, "query")
        batch = self._shaped(episode.all, "all")
        return self._cut(batch, None, generator)

    def _shaped(self, tasks: Tasks, role: str) -> Batch:
        """Nested batches, padded to a multiple of 8 where sizes differ, so that few are traced."""
        batch = Batch.of(tasks, self.layout)
        if batch.task is not None:
            return batch
        width = batch.x.shape[1]
        widths = self._widths.setdefault(role, set())
        widths.add(width)
        ragged = len(widths) > 1 or int(tasks.counts.min()) != int(tasks.counts.max())
        short = -width % 8 if ragged else 0
        if not short:
            return batch
        first = torch.zeros(short, dtype=torch.int64, device=batch.x.device)
        cells = torch.cat([torch.arange(width, device=batch.x.device), first])
        weight = torch.cat([batch.weight, batch.weight.new_zeros(batch.n_tasks, short)], 1)
        y = None if batch.y is None else batch.y[:, cells]
        return replace(batch, x=batch.x[:, cells], y=y, weight=weight)


def _take(batch: Batch, given: Tensor | None, chosen: Tensor) -> tuple[Batch, Tensor | None]:
    """Some tasks of a batch, in the same shape at every call.

    Flat rows keep the whole length: rows of other tasks stay as masked rows of task 0, because a
    length that changed from step to step would be traced anew each time.
    """
    n = chosen.shape[0]
    if batch.task is None:
        y = None if batch.y is None else batch.y[chosen]
        taken = replace(batch, x=batch.x[chosen], y=y, weight=batch.weight[chosen], n_tasks=n)
        return taken, None if given is None else given[chosen]
    position = torch.full((batch.n_tasks,), -1, dtype=torch.int64, device=batch.x.device)
    position[chosen] = torch.arange(n, device=batch.x.device)
    task = position[batch.task]
    weight = batch.weight * (task >= 0)
    return Batch(batch.x, batch.y, weight, task.clamp_min(0), n), given
