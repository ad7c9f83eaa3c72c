"""The curvature itself: Λ = −∇²f(φ), f the log joint of a task.

Exact where f is quadratic. At a mode it is never negative; anywhere else it may be.
"""

from __future__ import annotations

from torch import Tensor

from hbmeta.curvature import gradient_and_hessian, log_joint
from hbmeta.curvatures.precision import Dense
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["exact"]


def exact(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, *, create_graph: bool = False
) -> Dense:
    """−∇²f of every task, (tasks, size, size), by size + 1 backward passes for all of them."""
    found = gradient_and_hessian(
        lambda point: log_joint(problem, theta, point, batch), phi, create_graph=create_graph
    )
    return Dense(-found[2])
