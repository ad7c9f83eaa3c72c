"""Settings that the synthetic families share: a number or a range of numbers, numbers of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.checks import is_whole

__all__ = [
    "Range",
    "Rows",
    "check_dtype",
    "check_ends",
    "check_n_tasks",
    "number_range",
    "row_groups",
    "row_range",
    "single_number",
    "uniform",
]

Range = float | tuple[float, float]
"""A number, which is fixed, or a range (low, high) to draw from uniformly."""

Rows = int | tuple[int, int]
"""A number of rows per task, or a range (fewest, most), both included."""


def row_range(rows: Any, name: str, *, where: str) -> tuple[int, int]:
    """Read a number of rows as (fewest, most)."""
    pair = rows if isinstance(rows, tuple | list) else (rows, rows)
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
    if len(pair) != 2 or not whole or not 0 <= pair[0] <= pair[1]:
        raise DataError(
            where,
            needed=f"{name} as a number of rows, or a range (fewest, most)",
            found=f"{rows!r}",
            do=f"Pass for example {name}=5 or {name}=(2, 8).",
        )
    return pair[0], pair[1]


def number_range(
    value: Any, name: str, *, where: str, least: float = -math.inf, above: bool = False
) -> tuple[float, float]:
    """Read a number or a range of numbers as (low, high), both finite.

    Args:
        value: a number, or a pair low <= high.
        name: the setting, for the message.
        where: the family, for the message.
        least: the least number that makes sense.
        above: whether `least` itself makes none.
    """
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) == 2 and all(_fits(end, least, above) for end in pair) and pair[0] <= pair[1]:
        return float(pair[0]), float(pair[1])
    raise DataError(
        where,
        needed=f"{name} as a finite number{_limit(least, above)}, or a range (low, high) of such",
        found=f"{value!r}",
        do=f"Pass for example {name}=1.0 or {name}=(0.5, 1.0).",
    )


def single_number(
    value: Any, name: str, *, where: str, least: float = -math.inf, above: bool = False
) -> float:
    """Read one finite number; see `number_range`."""
    if _fits(value, least, above):
        return float(value)
    raise DataError(
        where,
        needed=f"{name} as a finite number{_limit(least, above)}",
        found=f"{value!r}",
        do=f"Pass for example {name}=1.0.",
    )


def check_ends(low: Any, high: Any, *, where: str) -> None:
    """Raise where low < high does not hold for two finite ends of the inputs."""
    if not (_is_finite(low) and _is_finite(high) and low < high):
        raise DataError(
            where,
            needed="low < high, both finite",
            found=f"low={low!r}, high={high!r}",
            do="Pass for example low=-2.0, high=2.0.",
        )


def check_dtype(dtype: Any, *, where: str) -> None:
    """Raise where the data cannot be of that dtype."""
    if dtype not in (torch.float32, torch.float64):
        raise DataError(
            where,
            needed="dtype as torch.float32 or torch.float64",
            found=f"{dtype!r}",
            do="Pass dtype=torch.float64 where exact references are computed.",
        )


def check_n_tasks(n_tasks: Any, *, where: str) -> None:
    """Raise where no such number of tasks can be drawn."""
    if not is_whole(n_tasks) or n_tasks < 1:
        raise DataError(
            where,
            needed="n_tasks of at least 1",
            found=f"{n_tasks!r}",
            do="Ask for a whole number of tasks, 1 or more.",
        )


def uniform(ends: tuple[float, float], n: int, draw: torch.Generator) -> Tensor:
    """(n,) float64, uniform between the ends; a fixed number takes as many random numbers."""
    low, high = ends
    return low + (high - low) * torch.rand(n, generator=draw, dtype=torch.float64)


def row_groups(rows: tuple[int, int], n_tasks: int, draw: torch.Generator) -> Tensor:
    """(n,) ascending group index of rows whose number per task is uniform on fewest..most."""
    counts = torch.randint(rows[0], rows[1] + 1, (n_tasks,), generator=draw)
    return torch.repeat_interleave(torch.arange(n_tasks), counts)


def _is_finite(value: Any) -> bool:
    plain = isinstance(value, int | float | np.integer | np.floating)
    return plain and not isinstance(value, bool) and math.isfinite(value)


def _fits(value: Any, least: float, above: bool) -> bool:
    return _is_finite(value) and (value > least or (value == least and not above))


def _limit(least: float, above: bool) -> str:
    return "" if least == -math.inf else f" {'above' if above else 'of at least'} {least:g}"
