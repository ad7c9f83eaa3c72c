"""Modes of the log joints of tasks, to a tolerance: φ̂_i = argmax log p(S_i | φ, θ) + log p(φ | θ).

Up to 64 parameters per task by Newton's method with the dense Hessian of every task
(`curvature.maximise`), above by truncated Newton in a trust region, on products alone
(`newton.minimise_tasks`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbmeta.curvature import log_joint, maximise
from hbmeta.derivatives import hessian_vector, task_gradient
from hbmeta.newton import minimise_tasks
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["DENSE_AT_MOST", "Modes", "find_modes", "warn_of_missed"]

DENSE_AT_MOST = 64
_PRODUCTS = 100

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class Modes(NamedTuple):
    """Where the searches of the tasks ended.

    Attributes:
        point: φ̂ (tasks, phi_size).
        met: (tasks,) whether the search met its tolerance.
        slope: (tasks,) ‖∇f‖ there, Euclidean, in nats per unit of φ.
    """

    point: Tensor
    met: Tensor
    slope: Tensor


def find_modes(
    problem: Problem,
    theta: Theta,
    batch: Batch,
    start: Tensor,
    *,
    tolerance: float = 1e-9,
    iterations: int = 100,
    seed: int = 0,
    derivatives: Derivatives | None = None,
) -> Modes:
    """The modes near a start; nothing has a history.

    Args:
        problem: the program.
        theta: θ.
        batch: the rows of the tasks.
        start: (tasks, phi_size).
        tolerance: in nats: the search ends where one more Newton step would gain less. Above 64
            parameters, where no Newton step is at hand, ½‖∇f‖² takes the place of that gain
            (relative to ½‖∇f(start)‖² where that is above ½).
        iterations: at most so many Newton steps.
        seed: of the side to which a saddle is left.
        derivatives: φ to f, gradient and Hessian, staged; see `curvature.maximise`.
    """
    theta = {name: value.detach() for name, value in theta.items()}

    def f(phi: Tensor) -> Tensor:
        return log_joint(problem, theta, phi, batch)

    if start.shape[-1] <= DENSE_AT_MOST:
        point, met = maximise(
            f, start, iterations=iterations, tolerance=tolerance, seed=seed, derivatives=derivatives
        )
        slope = torch.linalg.vector_norm(task_gradient(f, point)[1], dim=-1)
        return Modes(point, met, slope)

    def value_and_gradient(phi: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = task_gradient(f, phi)
        return -value, -gradient

    found = minimise_tasks(
        value_and_gradient,
        lambda phi, vector: -hessian_vector(f, phi, vector),
        start,
        tolerance=math.sqrt(2 * tolerance),
        steps=iterations,
        products=_PRODUCTS,
    )
    return Modes(found.point, found.met, found.residual)


def warn_of_missed(found: Modes, ids: tuple[Any, ...], where: str, stacklevel: int) -> None:
    """Names tasks whose search for a mode ended above its tolerance."""
    if bool(found.met.all()):
        return
    missed = (~found.met).nonzero().flatten().tolist()
    few = ", ".join(repr(ids[i]) for i in missed[:3]) + (", …" if len(missed) > 3 else "")
    warnings.warn(
        f"{where}: the search for the mode ended above its tolerance for {len(missed)} of "
        f"{len(ids)} tasks ({few}; gradient norm up to {float(found.slope[missed].max()):.3g}): "
        "raise iterations or tolerance. At the kinks of a ReLU network no gradient vanishes (tanh "
        "has none).",
        stacklevel=stacklevel,
    )
