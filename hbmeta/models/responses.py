"""Checks that y is what a family can have."""

from __future__ import annotations

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.models.columns import position
from hbmeta.models.effect_priors import Family
from hbmeta.tasks import Tasks

__all__ = ["check_response"]


def check_response(tasks: Tasks, family: Family, totals: str | None, *, where: str) -> None:
    """Raise where y, or the numbers of trials, lie outside the family.

    Args:
        tasks: the data, with one number y per row.
        family: see `VaryingEffects`.
        totals: the column of the numbers of trials of "binomial".
        where: the caller, for the message.
    Raises:
        DataError: names the task and the value.
    """
    y = tasks.flat_y
    if y is None or y.dim() != 1 or not len(y):
        raise DataError(
            where,
            needed="tasks with one number y per row, and at least one row",
            found="no y" if y is None else f"y of shape {tuple(y.shape)}",
            do="Pass the data that will be fitted, with a scalar response.",
        )
    if family == "bernoulli":
        _check(tasks, (y == 0) | (y == 1), y, "y that is 0 or 1 (bernoulli)", where)
    elif family == "poisson":
        _check(tasks, _count(y), y, "whole y of at least 0 (poisson)", where)
    elif family == "binomial":
        assert totals is not None
        n = tasks.flat_x[:, position(totals, tasks.features, where=where)]
        _check(tasks, _count(n), n, f"whole numbers of trials in column {totals!r}", where)
        needed = f"whole y between 0 and the trials in column {totals!r} (binomial)"
        _check(tasks, _count(y) & (y <= n), y, needed, where)


def _count(values: Tensor) -> Tensor:
    return (values >= 0) & (values == values.round() if values.is_floating_point() else True)


def _check(tasks: Tasks, good: Tensor, values: Tensor, needed: str, where: str) -> None:
    bad = torch.nonzero(~good)[:, 0]
    if len(bad):
        row = int(bad[0])
        raise DataError(
            where,
            needed=needed,
            found=f"{values[row].item()!r} in task {tasks.ids[int(tasks.task[row])]!r} "
            f"({len(bad)} of {len(values)} rows)",
            do="Correct these rows, or choose another family.",
        )
