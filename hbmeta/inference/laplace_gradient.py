"""The gradient of Laplace's evidence for networks, in pieces, each staged.

The machinery of `ImplicitGradient` with other functions in it: the inner solver minimises
−f = −log p(S, φ | θ) in the place of a damped support loss, and −E(φ̂, θ), the negative evidence of
`hbmeta.laplace_evidence`, stands for the query loss. The adjoint v solves (−∇²f) v = −∂E/∂φ by
conjugate gradients, so that no matrix of φ's size is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.curvatures import Kind
from hbmeta.derivatives import hessian_vector, task_gradient
from hbmeta.inference.implicit_gradient import ImplicitGradient
from hbmeta.inference.proximal import Proximal
from hbmeta.laplace_evidence import evidence_at
from hbmeta.movement import at_least_single
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta

__all__ = ["EvidenceGradient", "MinusEvidence"]


class MinusEvidence(Proximal):
    """−f of a problem, its derivatives, and −E at its minimum.

    Args:
        problem: the program.
        kind: the curvature Λ.
        damping: δ, added to Λ.
    """

    def __init__(self, problem: Problem, kind: Kind, damping: float) -> None:
        names = tuple(site.name for site in problem.sites.locals)
        super().__init__(problem, names, damping, "sum")
        self.kind = kind

    def _minus_joint(self, theta: Theta, support: Batch, phi: Phi) -> Tensor:
        return -log_joint(self.problem, theta, self.problem.sites.to_vector(phi), support)

    def value_and_gradient(
        self, theta: Theta, rest: Phi, support: Batch, centre: Tensor, point: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) −f and (tasks, size) −∇f."""
        value, gradient = task_gradient(
            lambda phi: self._minus_joint(theta, support, phi), self.by_site(point)
        )
        return at_least_single(value), self.vector(gradient)

    def product(
        self, theta: Theta, rest: Phi, support: Batch, point: Tensor, vector: Tensor
    ) -> Tensor:
        """(tasks, size) −∇²f(φ) v."""
        found = hessian_vector(
            lambda phi: self._minus_joint(theta, support, phi),
            self.by_site(point),
            self.by_site(vector),
        )
        return self.vector(found)

    def query_loss(self, theta: Theta, rest: Phi, support: Batch, query: Batch, phi: Phi) -> Tensor:
        """(tasks,) −E."""
        vector = self.problem.sites.to_vector(phi)
        damping = torch.full_like(vector[:, 0], self.damping)
        return -evidence_at(self.problem, theta, vector, support, damping, self.kind)

    def through_minimum(
        self, theta: Theta, support: Batch, query: Batch, point: Tensor, adjoint: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) −E(φ̂, θ) and (tasks,) vᵀ∇f(φ̂, θ): their gradients in θ add up."""
        point, adjoint = point.detach(), adjoint.detach()
        # The curvature is differentiated in φ on its way.
        phi = {name: value.requires_grad_() for name, value in self.by_site(point).items()}
        losses = self.query_loss(theta, {}, support, query, phi)
        _, gradient = task_gradient(
            lambda values: self._minus_joint(theta, support, values), phi, create_graph=True
        )
        return at_least_single(losses), -(adjoint * self.vector(gradient)).sum(-1)


class EvidenceGradient(ImplicitGradient):
    """Mean negative evidence of the tasks, and its gradient; a `MetaGradient`."""

    def __call__(
        self,
        theta: Theta,
        own: Mapping[str, Tensor],
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `ImplicitGradient`; all rows of a task are its support."""
        return super().__call__(theta, own, query, query, noise)

    def finish(self) -> dict[str, Any]:
        """The counts, under "search"."""
        return {"search": super().finish()["implicit"]}
