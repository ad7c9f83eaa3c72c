"""What is added to a curvature that is not positive definite, so that it can be a precision.

Λ + δI with the smallest eigenvalue κ of the prior's own precision where there is one: δ = κ − λ_min
gives the direction in which Λ bends the wrong way the prior's largest variance and no more. Only
tasks that need it are damped, unless a damping is given, which then holds for all.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbmeta.curvatures import DENSE, Precision
from hbmeta.curvatures.prior import prior_diagonal, prior_matrix
from hbmeta.errors import CurvatureError, DataError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

# Where not even the prior has a positive curvature.
_FALLBACK = 1e-3

__all__ = ["Damping", "check_damping", "choose_damping", "warn_of_damping"]


class Damping(NamedTuple):
    """How tasks were damped.

    Attributes:
        value: δ (tasks,), 0 where none was needed.
        positive: (tasks,) whether Λ was positive definite without.
        smallest: (tasks,) the smallest eigenvalue of Λ, or a bound below it; None where δ did not
            have to be chosen.
    """

    value: Tensor
    positive: Tensor
    smallest: Tensor | None


def check_damping(damping: Any, where: str) -> None:
    """Raises unless it is None or a finite number of 0 or more.

    Raises:
        DataError: it is not.
    """
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if damping is not None and not (number and 0 <= damping < math.inf):
        raise DataError(
            where,
            needed="damping as None, or a finite number of 0 or more",
            found=repr(damping),
            do="None damps tasks that need it and says so; 0 raises there.",
        )


def choose_damping(
    precision: Precision,
    given: float | None,
    problem: Problem,
    theta: Theta,
    phi: Tensor,
    batch: Batch,
    *,
    ids: tuple[Any, ...],
    where: str,
) -> Damping:
    """δ of every task.

    Args:
        precision: Λ at φ.
        given: δ for all tasks, or None to choose it where it is needed.
        problem: the program, whose prior's own curvature sets the size of δ.
        theta: θ.
        phi: the point (tasks, phi_size).
        batch: the rows.
        ids: of the tasks, for the error.
        where: for the error.
    Raises:
        CurvatureError: Λ + δI is not positive definite with the δ that was given; names the task
            with the smallest eigenvalue. Or Λ = 0.
    """
    none = torch.zeros_like(phi[:, 0])
    positive = precision.positive(none)
    if given is not None:
        value = torch.full_like(none, given)
        enough = precision.positive(value)
        if not bool(enough.all()):
            smallest = precision.smallest
            worst = int(torch.where(enough, torch.inf, smallest.nan_to_num(-math.inf)).argmin())
            raise CurvatureError(
                where,
                needed="a positive definite curvature of every task",
                found=f"smallest eigenvalue {float(smallest[worst]):.3g} of task {ids[worst]!r}"
                + (f", damping={given:g}" if given else ""),
                do='Raise iterations, use curvature="ggn", or leave damping out to have it chosen.',
            )
        return Damping(value, positive, None)
    if bool(positive.all()):
        return Damping(none, positive, None)
    smallest = precision.smallest
    if phi.shape[-1] <= DENSE:
        own = torch.linalg.eigvalsh(prior_matrix(problem, theta, phi, batch))[..., 0]
    else:
        own = prior_diagonal(problem, theta, phi, batch).amin(-1)
    target = torch.where(own > 0, own, _FALLBACK * precision.magnitude)
    if not bool((target > torch.finfo(own.dtype).tiny).all()):
        raise CurvatureError(
            where,
            needed="a log joint of every task that depends on φ",
            found=f"none in task {ids[int(target.argmin())]!r}: no rows, and a flat prior",
            do="Give every task parameter a proper prior, or leave tasks without rows out.",
        )
    return Damping(torch.where(positive, none, target - smallest), positive, smallest)


def warn_of_damping(
    chosen: Damping, given: float | None, ids: tuple[Any, ...], where: str, stacklevel: int
) -> None:
    """Says which tasks were damped because they had to be, and by how much at most."""
    bad, smallest = ~chosen.positive, chosen.smallest
    if given is not None or smallest is None:
        return
    worst = int(torch.where(bad, smallest, torch.inf).argmin())
    warnings.warn(
        f"{where}: the curvature of {int(bad.sum())} of {len(ids)} tasks is not positive definite "
        f"and was damped (info['damping']), worst of task {ids[worst]!r}: smallest eigenvalue "
        f"{float(smallest[worst]):.3g}, damping {float(chosen.value[worst]):.3g}. "
        'curvature="ggn" needs none where the prior is log-concave.',
        stacklevel=stacklevel,
    )
