"""Checks that y is what a family can have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from hbmeta.errors import DataError
from hbmeta.models.columns import position
from hbmeta.tasks import Tasks

__all__ = ["check_like_fit", "check_response"]


def check_response(tasks: Tasks, family: str, totals: str | None, *, where: str) -> None:
    """Raise where y, or the numbers of trials, lie outside the family.

    Args:
        tasks: the data, with one number y per row.
        family: see `VaryingEffects` and `from_formula`.
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
    elif family in ("poisson", "negative_binomial"):
        _check(tasks, _count(y), y, f"whole y of at least 0 ({family})", where)
    elif family == "binomial":
        assert totals is not None
        n = tasks.flat_x[:, position(totals, tasks.features, where=where)]
        _check(tasks, _count(n), n, f"whole numbers of trials in column {totals!r}", where)
        needed = f"whole y between 0 and the trials in column {totals!r} (binomial)"
        _check(tasks, _count(y) & (y <= n), y, needed, where)


def check_like_fit(tasks: Tasks, known: Tensor, response: Any, *, where: str) -> None:
    """Raise where y is of another kind than in the fit, or outside the support of the response.

    A support whose ends move with φ or θ, such as that of Uniform(0, φ), is not looked at.

    Args:
        tasks: tasks with y and at least one row.
        known: y of the fit.
        response: the distribution of y at the cells of these tasks, batch shape (tasks, points) or
            (rows,); None for the joint normal of all points of a task.
        where: the caller, for the message.
    Raises:
        DataError: names the task and the value.
    """
    y = tasks.flat_y
    assert y is not None
    discrete = response is not None and bool(response.support.is_discrete)
    if known.is_floating_point() and not (y.is_floating_point() or discrete):
        good = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        do = "Convert y to a floating dtype if these are numbers."
        _check(tasks, good, y, "real numbers as y, as in the fit, and no labels", where, do)
    if response is None or not (discrete or _fixed(response.support)):
        return
    cells = tasks.y if len(response.batch_shape) == 2 else y
    assert cells is not None
    inside: Tensor = response.support.check(cells)
    while inside.dim() > len(response.batch_shape):
        inside = inside.all(-1)
    good = tasks.unpad(inside) if len(response.batch_shape) == 2 else inside
    do = "Correct these rows; y means what it meant in the fit."
    _check(tasks, good, y, f"{_described(response)}, as in the fit", where, do)


def _fixed(support: Any) -> bool:
    """Whether the ends of a support are numbers and no tensors."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return not any(isinstance(value, Tensor) for value in vars(support).values())


def _described(response: Any) -> str:
    while hasattr(response, "base_dist"):
        response = response.base_dist
    name = type(response).__name__
    if isinstance(response, Categorical):
        return f"whole labels from 0 to {response.logits.shape[-1] - 1} ({name})"
    if isinstance(response, OneHotCategorical):
        return f"one-hot vectors of {response.logits.shape[-1]} entries ({name})"
    if isinstance(response, Bernoulli):
        return f"y that is 0 or 1 ({name})"
    return f"y in the support of {name} ({response.support})"


def _count(values: Tensor) -> Tensor:
    return (values >= 0) & (values == values.round() if values.is_floating_point() else True)


def _check(
    tasks: Tasks,
    good: Tensor,
    values: Tensor,
    needed: str,
    where: str,
    do: str = "Correct these rows, or choose another family.",
) -> None:
    bad = torch.nonzero(~good)[:, 0]
    if len(bad):
        row = int(bad[0])
        raise DataError(
            where,
            needed=needed,
            found=f"{values[row].tolist()!r} in task {tasks.ids[int(tasks.task[row])]!r} "
            f"({len(bad)} of {len(values)} rows)",
            do=do,
        )
