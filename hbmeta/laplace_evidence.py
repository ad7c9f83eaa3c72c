"""Laplace's evidence of θ, and its total derivative.

With f_i(φ, θ) = log p(S_i | φ, θ) + log p(φ | θ), its maximum φ̂_i(θ) and a curvature Λ_i(φ, θ),

    E_i(φ, θ) = f_i(φ, θ) + (d/2) log 2π − ½ log det Λ_i(φ, θ),   log p(S_i | θ) ≈ E_i(φ̂_i(θ), θ).

The mode moves with θ: ∇f(φ̂(θ), θ) = 0 gives dφ̂/dθ = (−∇²f)⁻¹ ∂∇f/∂θ, so that

    d/dθ E(φ̂(θ), θ) = ∂E/∂θ + vᵀ ∂∇f/∂θ,   (−∇²f) v = ∂E/∂φ,

the gradient in θ of E(φ, θ) + vᵀ∇f(φ, θ) with φ and v held constant. Without v the log determinant
is differentiated as if the mode stood still. Near the mode the vᵀ∇f in the value is the first-order
change of E from φ to the mode.

References:
    MacKay (1992), Neural Computation 4(3). Grant et al. (2018), ICLR, "LLAMA". Kristensen et al.
    (2016), J. Stat. Softw. 70(5), §2, for the derivative through the mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.curvatures import Kind, precision_of
from hbmeta.curvatures.precision import Dense, Precision
from hbmeta.derivatives import jacobian_of, task_gradient
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["evidence_at", "kind_for_evidence", "total_evidence"]


def kind_for_evidence(kind: Kind) -> Kind:
    """The curvature by which the evidence is taken: "diagonal" for "last_layer".

    A point has no volume: with the other sites at one, the scale of their prior would fall to zero
    as it does at the joint mode.
    """
    return "diagonal" if kind == "last_layer" else kind


def evidence_at(
    problem: Problem,
    theta: Theta,
    phi: Tensor,
    batch: Batch,
    damping: Tensor,
    kind: Kind,
    *,
    create_graph: bool = True,
) -> Tensor:
    """(tasks,) E(φ, θ), φ as given; NaN where Λ + δI is not positive definite.

    Args:
        problem: the program.
        theta: θ.
        phi: (tasks, phi_size), near the modes.
        batch: the rows.
        damping: δ (tasks,).
        kind: the curvature Λ.
        create_graph: keep the history of Λ.
    """
    kind = kind_for_evidence(kind)
    precision = precision_of(kind, problem, theta, phi, batch, create_graph=create_graph)
    return _evidence(log_joint(problem, theta, phi, batch), precision, phi.shape[-1], damping)


def _evidence(value: Tensor, precision: Precision, size: int, damping: Tensor) -> Tensor:
    return value + 0.5 * size * math.log(2 * math.pi) - 0.5 * precision.log_det(damping)


def total_evidence(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, damping: Tensor, kind: Kind
) -> Tensor:
    """(tasks,) E at the modes, its gradient in θ the total derivative of E(φ̂(θ), θ).

    By dense Hessians: for up to 64 parameters per task. Can be traced.

    Args:
        problem: the program.
        theta: θ, with a history.
        phi: φ̂ (tasks, phi_size) at this θ, taken as constant.
        batch: the rows.
        damping: δ (tasks,), taken as constant.
        kind: the curvature Λ.
    """
    kind = kind_for_evidence(kind)
    phi = phi.detach().requires_grad_()
    with torch.enable_grad():
        value, gradient = task_gradient(
            lambda point: log_joint(problem, theta, point, batch), phi, create_graph=True
        )
        hessian = jacobian_of(gradient, phi, create_graph=kind == "exact")
        precision = (
            Dense(-0.5 * (hessian + hessian.mT))
            if kind == "exact"
            else precision_of(kind, problem, theta, phi, batch, create_graph=True)
        )
        found = _evidence(value, precision, phi.shape[-1], damping)
        (slope,) = torch.autograd.grad(found.sum(), phi, retain_graph=True)
        true = Dense(-hessian.detach()).damped(damping)
        adjoint = torch.linalg.solve(true, slope.unsqueeze(-1)).squeeze(-1).detach()
        total: Tensor = found + (adjoint * gradient).sum(-1)
        return total
