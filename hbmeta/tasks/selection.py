"""Which tasks are meant, and how many rows of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.checks import is_whole

__all__ = ["Selection", "positions_of", "shown", "support_counts"]

Selection = slice | Sequence[int] | Tensor
"""Positions of tasks, in the order wanted."""


def positions_of(selection: Selection, n_tasks: int) -> list[int]:
    """The chosen positions 0..n_tasks-1, at least one and none of them twice."""
    if isinstance(selection, slice):
        positions = list(range(n_tasks)[selection])
    else:
        given = selection.tolist() if isinstance(selection, Tensor | np.ndarray) else selection
        whole = isinstance(given, list | tuple | range) and all(map(is_whole, given))
        if not whole or any(not -n_tasks <= i < n_tasks for i in given):
            raise DataError(
                "Tasks[...]",
                needed=f"a slice, a list or an int tensor of positions below {n_tasks}",
                found=f"{selection!r}",
                do="Write tasks[[3]] for one task, and tasks.select(ids) to choose by id.",
            )
        positions = [int(i) % n_tasks for i in given]
    if not positions or len(set(positions)) < len(positions):
        raise DataError(
            "Tasks[...]",
            needed="at least one task, none of them twice",
            found=f"{selection!r}" if positions else f"{selection!r}, which is empty",
            do="Choose different positions between 0 and len(tasks) - 1.",
        )
    return positions


def support_counts(counts: Tensor, support: int | float, *, where: str) -> Tensor:
    """How many of each task's rows (tasks,) become support; see `Tasks.split` for the rule."""
    most = torch.where(counts > 1, counts - 1, counts)
    if isinstance(support, float) and 0 < support < 1:
        rounded = (counts * support + 0.5).floor().long()
        return torch.minimum(rounded.clamp(min=1), most)
    if not is_whole(support) or support < 0:
        raise DataError(
            where,
            needed="support as a number of rows (int, at least 0) or a fraction between 0 and 1",
            found=f"{support!r}",
            do="Pass for example 5 rows or 0.8 of them.",
        )
    return torch.minimum(torch.full_like(counts, int(support)), most)


def shown(labels: Sequence[object], most: int = 8) -> str:
    """The first few labels, for a message."""
    shown = ", ".join(repr(label) for label in labels[:most])
    return shown if len(labels) <= most else f"{shown}, ... ({len(labels)} in all)"
