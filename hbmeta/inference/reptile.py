"""Reptile: θ moves to where gradient descent on all points of a task goes.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: φ_i = φ_N, N steps on the loss of the union of support and query from φ_0, the location
of p(φ | θ); φ_0 moves along φ_N − φ_0. On a loss L and with full batches

    (φ_0 − φ_N)/(αN) = ∇[L − (α(N−1)/4) ‖∇L‖²] + O(α²)

(exact for N = 2 on quadratics). The coefficient α(N−1)/2 that is also in print is twice too large;
the sign rewards a *large* gradient, and with k minibatches the alignment is between batches of the
same task: per k steps, k · AvgGrad − ½k(k−1)α · AvgGradInner + O(α²).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.feeding import Needs
from hbmeta.inference.gradient_strategy import GradientStrategy
from hbmeta.inference.work import Work
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta

__all__ = ["Reptile"]


@dataclass(frozen=True)
class Reptile(GradientStrategy):
    """Direction of travel: the gradient of φ_0 is (φ_0 − φ_N)/(αN), whatever the outer optimizer.

    Keeps and replaces what MAML does, at N gradients per step, without a Hessian-vector product and
    without a split into support and query. A θ that the likelihood holds besides φ (a noise, a
    slope that tasks share) and sites that stay follow the gradient of the loss at φ_N, φ_N held.
    The fixed point is where the travels of tasks add up to nothing: for curvatures 1 and 4 with
    minima 0 and 1, α = 0.1 and N = 5 it is 0.6925.

    Args: those of `GradientStrategy`, but for `learned_step` (the direction of travel says nothing
        of the step size). `batches` is the number of minibatches that a task's points are dealt
        into.

    References:
        Nichol, Achiam, Schulman (2018), arXiv:1803.02999, algorithm 2 and §5.1.
    """

    needs: ClassVar[Needs] = "subset"
    first_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learned_step is not None or self.steps < 1 or self.step_size == 0:
            raise DataError(
                self.name,
                needed="steps of 1 or more, step_size above 0, and no learned step size",
                found=f"steps={self.steps}, step_size={self.step_size}, "
                f"learned_step={self.learned_step!r}",
                do="Use FOMAML or MetaSGD to learn step sizes.",
            )

    def inner_batch(self, support: Batch, query: Batch) -> Batch:
        """All points of the task, which the second batch holds."""
        return query

    def work(self) -> Work:
        """N gradients: none is taken at φ_N."""
        return Work(self.steps, 0)

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) −log p(D | φ_N, θ) per point, with the gradient of Reptile."""
        with torch.no_grad():
            found = self.adapted(problem, theta, own, query)
        start = problem.location_by_site(theta, query)
        return self.end(problem, theta, start, found, support, query)

    def end(
        self,
        problem: Problem,
        theta: Theta,
        start: Phi,
        found: Phi,
        support: Batch,
        query: Batch,
    ) -> Tensor:
        """(tasks,) the loss at φ_N; φ_0 gets (φ_0 − φ_N)/(αN) as its gradient.

        Sites that stay do not travel: they get the gradient of the loss, as θ of the likelihood.
        """
        names = self.moving(problem)
        found = {k: v.detach() if k in names else start[k] for k, v in found.items()}
        points = query.counts.clamp_min(1.0)
        scale = 1.0 / (self.step_size * self.steps)
        travel = torch.zeros_like(points)
        for name in names:
            value = start[name]
            direction = scale * (value.detach() - found[name])
            travel = travel + (direction * value).reshape(len(points), -1).sum(-1)
        if self.reduction == "sum":
            travel = travel / points
        loss = -problem.log_likelihood(theta, found, query) / points
        return loss + travel - travel.detach()
