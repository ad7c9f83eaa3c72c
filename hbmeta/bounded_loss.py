"""Losses in [0, 1] to learn by: smooth ones next to those that are certified.

    classes    log(p_min + (1 − p_min) p(y | x, φ)) / log p_min
    numbers    1 − exp(−‖y − E[y | x, φ]‖² / scale²)

The first is the cross-entropy of a prediction that is mixed with a little of everything: 0 at
probability 1, 1 at probability 0, and with a gradient everywhere, where a clipped one has none. The
second is next to min(e²/scale², 1), and below it. A cross-entropy or a squared error as it is has
no bound, and what is learned by it with a PAC-Bayes penalty minimises no bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Bernoulli, Categorical
from torch import Tensor

from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["BoundedLoss", "has_classes"]


def has_classes(problem: Problem) -> bool:
    """Whether the response of a program is a class."""
    return isinstance(_response(problem), Bernoulli | Categorical)


def _response(problem: Problem) -> Any:
    batch = problem.one_row()
    with torch.no_grad():
        response: Any = problem.response(problem.theta(batch), {}, batch)
    while hasattr(response, "base_dist"):
        response = response.base_dist
    return response


@dataclass(frozen=True)
class BoundedLoss:
    """The mean loss of p(y | x, φ) on the rows of each task.

    Attributes:
        classes: whether y is a class.
        constant: p_min, or the scale in the units of y that the model sees.
    """

    classes: bool
    constant: float

    @staticmethod
    def of(problem: Problem, p_min: float, scale: float | None, where: str) -> BoundedLoss:
        """The loss that suits the response of a program.

        Raises:
            UnsupportedModelError: points that depend on each other given φ, a regression without a
                scale, or a response without a mean.
        """
        if problem.layout == "joint":
            raise UnsupportedModelError(
                where,
                needed="points that are independent given φ: the theorem is about their losses",
                found=f"the joint layout of {problem.name}",
                do="Use a program with a plate `point`.",
            )
        if has_classes(problem):
            return BoundedLoss(True, p_min)
        if scale is None:
            raise UnsupportedModelError(
                where,
                needed="a loss in [0, 1], which for numbers takes a scale fixed before the data",
                found=f"scale=None for {problem.name}",
                do=f"Pass for example {where}(scale=2.0), the error from which all are alike.",
            )
        try:
            known = bool(torch.isfinite(_response(problem).mean).all())
        except NotImplementedError:
            known = False
        if not known:
            raise UnsupportedModelError(
                where,
                needed="a response whose mean is known",
                found=f"{type(_response(problem)).__name__} in {problem.name}",
                do="Use a response with a mean.",
            )
        return BoundedLoss(False, scale)

    def per_task(self, problem: Problem, theta: Theta, phi: Tensor, batch: Batch) -> Tensor:
        """(tasks,) at φ (tasks, phi_size), differentiable; 0 for a task without rows."""
        cells = self._cells(problem, theta, phi, batch)
        total = batch.per_task(torch.where(batch.mask, cells, torch.zeros_like(cells)))
        return total / batch.counts.clamp_min(1.0)

    def _cells(self, problem: Problem, theta: Theta, phi: Tensor, batch: Batch) -> Tensor:
        if self.classes:
            log_p = problem.log_cells(theta, phi, batch)
            # Bounded away from 0 before the logarithm: p itself may underflow.
            p = self.constant + (1.0 - self.constant) * log_p.exp()
            return p.log() / math.log(self.constant)
        assert batch.y is not None
        mean = problem.response(theta, phi, batch).mean
        squared = ((batch.y - mean) / self.constant).square()
        return -torch.expm1(-squared.reshape(*batch.weight.shape, -1).sum(-1))
