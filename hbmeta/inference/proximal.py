"""A task's support loss with a quadratic pull to where φ starts, as functions of tensors.

    f_i(φ) = L^S_i(φ, θ) + (λ/2) ‖φ − φ_0(θ)‖²,   L^S_i = −log p(S_i | φ, θ), per point or in sum

φ is the vector of the sites that move, (tasks, size), in unconstrained space; the other sites stay
at φ_0(θ). At a minimum φ* the implicit function theorem gives, with A = ∇²f(φ*) and v = A⁻¹ ∇L^Q,

    d/dθ L^Q(φ*(θ), θ) = ∂L^Q/∂θ − vᵀ d/dθ [∇_φ L^S(φ*, θ) + λ (φ* − φ_0(θ))]

with φ* and v held constant on the right: θ may enter the likelihood, the location of the task prior
and, through sites that do not move, both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hbmeta.derivatives import hessian_vector, task_gradient
from hbmeta.movement import at_least_single
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta

__all__ = ["Proximal"]


class Proximal:
    """f of a problem, its derivatives, and the derivative of what its minimum is used for.

    All methods are functions of tensors that can be staged. Vectors of φ and what is computed from
    them are float32 at least; the program runs in the dtype of its data.

    Args:
        problem: the program.
        names: sites that move.
        damping: λ, in units of the loss per φ².
        reduction: "mean" or "sum" over the support points in L^S.
    """

    def __init__(
        self,
        problem: Problem,
        names: tuple[str, ...],
        damping: float,
        reduction: Literal["mean", "sum"],
    ) -> None:
        self.problem, self.names = problem, names
        self.damping, self.reduction = damping, reduction
        sites = {site.name: site for site in problem.sites.locals}
        self._shapes = [sites[name].unconstrained_shape for name in names]
        self._sizes = [sites[name].size for name in names]

    # -- φ as a vector ----------------------------------------------------------------------------

    def vector(self, phi: Mapping[str, Tensor]) -> Tensor:
        """The sites that move as (tasks, size)."""
        sizes = zip(self.names, self._sizes, strict=True)
        return torch.cat([at_least_single(phi[n]).reshape(-1, size) for n, size in sizes], 1)

    def by_site(self, vector: Tensor) -> Phi:
        """The inverse of `vector`, in the dtype of the data."""
        parts = vector.to(self.problem.dtype).split(self._sizes, 1)
        shaped = zip(self.names, parts, self._shapes, strict=True)
        return {name: part.reshape(-1, *shape) for name, part, shape in shaped}

    def start(self, theta: Theta, support: Batch) -> tuple[Tensor, Phi]:
        """φ_0 of the sites that move, and the sites that do not; differentiable in θ."""
        start = self.problem.location_by_site(theta, support)
        return self.vector(start), {n: v for n, v in start.items() if n not in self.names}

    # -- f ----------------------------------------------------------------------------------------

    def support_loss(self, theta: Theta, rest: Phi, support: Batch, phi: Phi) -> Tensor:
        """(tasks,) L^S; 0 for a task without support."""
        points = support.counts.clamp_min(1.0) if self.reduction == "mean" else 1.0
        return -self.problem.log_likelihood(theta, {**rest, **phi}, support) / points

    def value_and_gradient(
        self, theta: Theta, rest: Phi, support: Batch, centre: Tensor, point: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) f and (tasks, size) ∇f."""
        value, gradient = task_gradient(
            lambda phi: self.support_loss(theta, rest, support, phi), self.by_site(point)
        )
        away = point - centre
        pull = 0.5 * self.damping * (away * away).sum(-1)
        return at_least_single(value) + pull, self.vector(gradient) + self.damping * away

    def product(
        self, theta: Theta, rest: Phi, support: Batch, point: Tensor, vector: Tensor
    ) -> Tensor:
        """(tasks, size) ∇²f(φ) v."""
        found = hessian_vector(
            lambda phi: self.support_loss(theta, rest, support, phi),
            self.by_site(point),
            self.by_site(vector),
        )
        return self.vector(found) + self.damping * vector

    # -- what the minimum is for ------------------------------------------------------------------

    def query_loss(self, theta: Theta, rest: Phi, support: Batch, query: Batch, phi: Phi) -> Tensor:
        """(tasks,) L^Q = −log p(Q | φ, S, θ) per query point; 0 for a task without query."""
        found = self.problem.log_predictive(theta, {**rest, **phi}, support, query)
        return -found / query.counts.clamp_min(1.0)

    def query_gradient(
        self, theta: Theta, rest: Phi, support: Batch, query: Batch, point: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) L^Q and (tasks, size) ∂L^Q/∂φ."""
        value, gradient = task_gradient(
            lambda phi: self.query_loss(theta, rest, support, query, phi), self.by_site(point)
        )
        return at_least_single(value), self.vector(gradient)

    def through_minimum(
        self, theta: Theta, support: Batch, query: Batch, point: Tensor, adjoint: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) L^Q(φ*, θ) and (tasks,) −vᵀ∇f(φ*, θ): their gradients in θ add up.

        Args:
            theta: with a history.
            support: S.
            query: Q.
            point: φ*, taken as constant.
            adjoint: v, taken as constant.
        """
        point, adjoint = point.detach(), adjoint.detach()
        centre, rest = self.start(theta, support)
        phi = self.by_site(point)
        losses = self.query_loss(theta, rest, support, query, phi)
        _, gradient = task_gradient(
            lambda values: self.support_loss(theta, rest, support, values), phi, create_graph=True
        )
        stationarity = self.vector(gradient) + self.damping * (point - centre)
        return at_least_single(losses), -(adjoint * stationarity).sum(-1)

    def theta_gradient(
        self,
        theta: Theta,
        support: Batch,
        query: Batch,
        point: Tensor,
        adjoint: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Σ_i w_i d/dθ L^Q_i(φ*_i(θ), θ) by "theta/name"; names without a gradient are missing."""
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        with torch.enable_grad():
            direct, indirect = self.through_minimum(theta, support, query, point, adjoint)
            total = (weights * (direct + indirect)).sum()
        if not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(theta.values()), allow_unused=True)
        return {f"theta/{n}": g for n, g in zip(theta, found, strict=True) if g is not None}
