"""What a theorem says about a risk: a number, and the terms that it is the sum of.

With R̂ the empirical risk, a bound reads R ≤ R̂ + within-task term + across-task term. Where a
theorem is a composition of inverses of kl, each term is what its inverse adds to what it is given.
A right-hand side of 1 or more says nothing about a loss in [0, 1]: it is vacuous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbmeta.bounds.checks import Array

__all__ = ["Bound", "bound_of_terms"]


@dataclass(frozen=True, eq=False)
class Bound:
    """An upper bound on a risk in [0, 1]; arrays of the shape to which the arguments broadcast.

    No entry is ever infinite or NaN. Where a KL is infinite the theorem is empty, and the trivial
    R ≤ 1 stands in for it: `value` and `raw` are 1, and all that is above the empirical risk is
    booked on the across-task term if that one is infinite, else on the within-task term.

    Attributes:
        theorem: name of the theorem, with its source.
        value: min(1, raw).
        raw: the right-hand side of the theorem, which may exceed 1.
        empirical: the empirical risk.
        within_task: what is paid for finitely many samples in a task; 0 where nothing is.
        across_task: what is paid for finitely many tasks; 0 for a bound about one task.
        vacuous: whether raw ≥ 1.
    """

    theorem: str
    value: Array
    raw: Array
    empirical: Array
    within_task: Array
    across_task: Array
    vacuous: NDArray[np.bool_]

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.value, dtype=dtype, copy=copy)


def bound_of_terms(
    theorem: str,
    *,
    empirical: Array,
    within_task: Array | float = 0.0,
    across_task: Array | float = 0.0,
    raw: Array | None = None,
) -> Bound:
    """A Bound from its terms, with an infinite KL turned into the trivial bound.

    Args:
        theorem: its name and source.
        empirical: the empirical risk, in [0, 1].
        within_task: may be infinite or NaN where a KL is infinite.
        across_task: the same.
        raw: the right-hand side where it is rounded outward and its terms are differences; None
            for the sum of the terms.
    """
    if raw is None:
        raw = empirical + within_task + across_task
    raw, empirical, within, across = (
        np.array(part) for part in np.broadcast_arrays(raw, empirical, within_task, across_task)
    )
    trivial = ~np.isfinite(raw)
    tasks_are_to_blame = trivial & ~np.isfinite(across)
    left = 1.0 - empirical
    within = np.where(trivial, np.where(tasks_are_to_blame, 0.0, left), within)
    across = np.where(trivial, np.where(tasks_are_to_blame, left, 0.0), across)
    raw = np.where(trivial, 1.0, raw)
    return Bound(
        theorem=theorem,
        value=np.asarray(np.minimum(raw, 1.0)),
        raw=raw,
        empirical=empirical,
        within_task=within,
        across_task=across,
        vacuous=np.asarray(raw >= 1.0),
    )
