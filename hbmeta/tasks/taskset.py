"""Tasks to fit on and to be judged on, with the schema of the table that they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.batch import Episode, Tasks
from hbmeta.tasks.checks import TaskId, child_seeds, generator, is_whole
from hbmeta.tasks.schema import Schema
from hbmeta.tasks.selection import shown, support_counts

__all__ = ["TaskSet"]


@dataclass(frozen=True, eq=False, repr=False)
class TaskSet:
    """A fixed set of tasks, such as the groups of a table; before a split all rows are support.

    Args:
        support: the rows to fit on or adapt to.
        query: the rows held out, of the same tasks; None before a split.
        schema: how the table was encoded; None where there was no table.
        dropped: how many rows of the table were left out for a missing value.
        support_rows: (n,) position in the table of each flat row of `support`.
        query_rows: (n,) position in the table of each flat row of `query`.
        order: name and ranks (n,) of a column to split by, for each flat row of `support`.
    """

    support: Tasks
    query: Tasks | None = None
    schema: Schema | None = None
    dropped: int = 0
    support_rows: Tensor | None = None
    query_rows: Tensor | None = None
    order: tuple[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.query is not None:
            Episode(self.support, self.query)  # same ids, same features
        for name, rows, tasks in (
            ("support_rows", self.support_rows, self.support),
            ("query_rows", self.query_rows, self.query),
            ("order", self.order[1] if self.order else None, self.support),
        ):
            if rows is not None and (tasks is None or tuple(rows.shape) != (tasks.n_points,)):
                raise DataError(
                    "TaskSet",
                    needed=f"{name} with one entry per flat row",
                    found=f"shape {tuple(rows.shape)}",
                    do="Let from_frame and split build them.",
                )

    @property
    def tasks(self) -> Tasks:
        """All rows: of each task the support, then the query."""
        return self.support if self.query is None else self.episode_of_all.all

    @property
    def episode_of_all(self) -> Episode:
        """Support and query of every group, also of those without a query row."""
        if self.query is None:
            raise DataError(
                "TaskSet",
                needed="rows held out as a query",
                found="a set that was not split",
                do="Call .split(seed=...) first.",
            )
        return Episode(self.support, self.query)

    @property
    def episode(self) -> Episode:
        """Support and query of the groups that have a query row."""
        episode = self.episode_of_all
        positions = episode.query.counts.nonzero()[:, 0]
        if not len(positions):
            raise DataError(
                "TaskSet",
                needed="a group with a row held out",
                found=f"none: all {self.n_tasks} groups have support rows only",
                do="Split groups of two or more rows.",
            )
        return episode[positions]

    @property
    def ids(self) -> tuple[TaskId, ...]:
        """The groups' labels."""
        return self.support.ids

    @property
    def n_tasks(self) -> int:
        """Number of groups."""
        return self.support.n_tasks

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of x."""
        return self.support.features

    @property
    def without_query(self) -> tuple[TaskId, ...]:
        """The groups that have no query row; all of them before a split."""
        return self.ids if self.query is None else self.episode_of_all.without_query

    def __len__(self) -> int:
        return self.n_tasks

    def __repr__(self) -> str:
        parts = [f"{self.n_tasks} groups"]
        if self.query is None:
            parts.append(f"{self.support.n_points} rows, not split")
        else:
            parts.append(f"{self.support.n_points} support rows, {self.query.n_points} query rows")
            if self.without_query:
                parts.append(f"{len(self.without_query)} groups without query")
        if self.dropped:
            parts.append(f"{self.dropped} rows dropped")
        return f"TaskSet({', '.join(parts)}, features [{', '.join(self.features)}])"

    def summary(self) -> str:
        """Say in a few lines what is in the set, what was left out and how it is coded."""
        counts = self.tasks.counts
        lines = [
            f"{self.n_tasks} groups with {int(counts.sum())} rows: {int(counts.min())} to "
            f"{int(counts.max())} each, median {float(np.median(counts.cpu().numpy())):g}",
            f"inputs: {', '.join(self.features) or 'none'}",
        ]
        if self.query is None:
            lines.append("not split: every row is support")
        else:
            lines.append(f"{self.support.n_points} support rows, {self.query.n_points} query rows")
            if self.without_query:
                lines.append(
                    f"{len(self.without_query)} groups without a query row: "
                    f"{shown(self.without_query)}"
                )
        if self.dropped:
            lines.append(f"{self.dropped} rows of the table dropped for a missing value")
        if self.schema is not None:
            lines += [
                f"{column.name}: reference level {column.levels[0]!r}"
                for column in self.schema.x
                if column.levels
            ]
            y = self.schema.y
            coded = f" ({y.levels[0]!r} is 0, {y.levels[1]!r} is 1)" if y.levels else ""
            scaled = f", standardised by {y.location:.6g} and {y.scale:.6g}"
            lines.append(
                f"output: {y.name}{coded}{'' if y.location == 0 == y.scale - 1 else scaled}"
            )
        return "\n".join(lines)

    @overload
    def split(
        self,
        groups: None = None,
        *,
        support: float | int = 0.8,
        new_support: float | int = 3,
        order: str | None = None,
        seed: int,
    ) -> TaskSet: ...

    @overload
    def split(
        self,
        groups: float | int,
        *,
        support: float | int = 0.8,
        new_support: float | int = 3,
        order: str | None = None,
        seed: int,
    ) -> tuple[TaskSet, TaskSet]: ...

    def split(
        self,
        groups: float | int | None = None,
        *,
        support: float | int = 0.8,
        new_support: float | int = 3,
        order: str | None = None,
        seed: int,
    ) -> TaskSet | tuple[TaskSet, TaskSet]:
        """Hold rows out as the query, and (with `groups`) whole groups out as new tasks.

        A group of two or more rows keeps at least one for the query. A group of a single row keeps
        it as support and has no query: `without_query` and `summary()` name it.

        Args:
            groups: how many groups are known: a fraction between 0 and 1 or a number; the others
                are new. None splits within the groups only.
            support: fraction or number of rows of each known group to fit on.
            new_support: fraction or (largest) number of rows of each new group to adapt to.
            order: a column to split by, the rows with the smallest values becoming support (ties
                by their place in the table), such as a date: the one named as `order` in
                from_frame, or one of x. None splits at random.
            seed: the split is a function of the seed, the numbers of rows and these settings.
        Returns:
            The set split within its groups, or with `groups` the pair (known, new).
        Raises:
            DataError: the set was split before, or a number or column that it does not have.
        """
        where = "TaskSet.split"
        if self.query is not None:
            raise DataError(
                where,
                needed="a set that was not split",
                found=f"{self!r}",
                do="Split the set that from_frame or load_radon returned.",
            )
        choose, within_known, within_new = child_seeds(seed, 3, where=where)
        keys = None if order is None else self._order_keys(order, where=where)
        if groups is None:
            return self._split_within(support, keys, within_known, where=where)
        n_known = _known(groups, self.n_tasks, where=where)
        known = torch.zeros(self.n_tasks, dtype=torch.bool)
        known[torch.randperm(self.n_tasks, generator=generator(choose, where=where))[:n_known]] = (
            True
        )
        return (
            self._subset(known)._split_within(
                support, _rows_of(keys, known, self.support), within_known, where=where
            ),
            self._subset(~known)._split_within(
                new_support, _rows_of(keys, ~known, self.support), within_new, where=where
            ),
        )

    def _subset(self, chosen: Tensor) -> TaskSet:
        """The chosen groups (tasks,) of an unsplit set."""
        return TaskSet(
            self.support[chosen.nonzero()[:, 0]],
            schema=self.schema,
            dropped=self.dropped,
            support_rows=_rows_of(self.support_rows, chosen, self.support),
        )

    def _split_within(
        self, support: float | int, keys: Tensor | None, seed: int, *, where: str
    ) -> TaskSet:
        tasks = self.support
        if keys is None:
            draw = generator(seed, where=where)
            keys = torch.rand(tasks.n_points, generator=draw, dtype=torch.float64)
        wanted = support_counts(tasks.counts, support, where=where)
        chosen = tasks.leading(keys.to(tasks.device), wanted)
        rows = self.support_rows
        return TaskSet(
            tasks.keep(chosen),
            tasks.keep(~chosen),
            schema=self.schema,
            dropped=self.dropped,
            support_rows=None if rows is None else rows[chosen.to(rows.device)],
            query_rows=None if rows is None else rows[~chosen.to(rows.device)],
        )

    def _order_keys(self, order: str, *, where: str) -> Tensor:
        if self.order is not None and self.order[0] == order:
            return self.order[1]
        if order in self.features:
            return self.support.flat_x[:, self.features.index(order)]
        kept = [repr(name) for name in self.features]
        kept += [repr(self.order[0])] if self.order is not None else []
        raise DataError(
            where,
            needed=f"order as one of the columns that were kept: {', '.join(kept)}",
            found=f"{order!r}",
            do=f"Pass order={order!r} to from_frame too, which keeps that column.",
        )


def _known(groups: float | int, n_tasks: int, *, where: str) -> int:
    """How many groups are known: at least one, and at least one is new."""
    if n_tasks >= 2:
        if is_whole(groups) and 1 <= groups < n_tasks:
            return int(groups)
        if isinstance(groups, float) and 0 < groups < 1:
            return min(max(int(groups * n_tasks + 0.5), 1), n_tasks - 1)
    raise DataError(
        where,
        needed="groups as a fraction between 0 and 1, or a number that leaves a new group",
        found=f"groups={groups!r} of {n_tasks}",
        do="Pass groups=None to split within the groups only.",
    )


def _rows_of(values: Tensor | None, chosen: Tensor, tasks: Tasks) -> Tensor | None:
    """The entries (n,) of the rows of the chosen groups (tasks,)."""
    return (
        None if values is None else values[chosen.to(values.device)[tasks.task.to(values.device)]]
    )
