"""The task prior as the Gaussian that it is, or is next to, in units of its own spread.

With m the location of p(φ | θ), Λ its curvature there and s_j = Λ_jj^(−½), both read from the
program and differentiable in θ, the prior is taken as N(m, Λ⁻¹): exact for a Gaussian one. For
q = N(m + s u, diag(s e^ρ)²) and R = s Λ s, which has ones on its diagonal,

    KL(q ‖ N(m, Λ⁻¹)) = ½ Σ_j (e^2ρ_j − 1 − 2ρ_j) + ½ uᵀ R u − ½ log det R,

R = I for independent coordinates: no scale is left in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian
from hbmeta.errors import UnsupportedModelError
from hbmeta.normals import normal_kl
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.triangular import cholesky

_DENSE_AT_MOST = 64

__all__ = ["PriorExpansion", "check_expansion", "expanded_prior"]


class PriorExpansion(NamedTuple):
    """N(m, Λ⁻¹) per task.

    Attributes:
        loc: m (tasks, size).
        scale: s (tasks, size).
        correlation: R (tasks, size, size); None for I.
    """

    loc: Tensor
    scale: Tensor
    correlation: Tensor | None

    def kl(self, u: Tensor, rho: Tensor) -> Tensor:
        """(tasks,) KL(N(m + s u, diag(s e^ρ)²) ‖ N(m, Λ⁻¹)) in nats, exact."""
        found = normal_kl(u, rho, torch.zeros_like(rho))
        if self.correlation is None:
            return found
        # uᵀ R u = uᵀ u + uᵀ (R − I) u, of which the first is in `found`.
        product = (self.correlation @ u.unsqueeze(-1)).squeeze(-1)
        log_det = 2.0 * cholesky(self.correlation).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return found + 0.5 * (u * (product - u)).sum(-1) - 0.5 * log_det


def expanded_prior(problem: Problem, theta: Theta, batch: Batch) -> PriorExpansion:
    """N(m, Λ⁻¹) of each task, differentiable in θ."""
    loc = problem.location(theta, batch)
    precision = _precision(problem, theta, batch, loc)
    scale = _diagonal(precision, problem).rsqrt()
    correlation = None
    if not problem.diagonal_prior:
        correlation = scale.unsqueeze(-1) * precision * scale.unsqueeze(-2)
    return PriorExpansion(loc, scale, correlation)


def check_expansion(problem: Problem, where: str, *, do: str) -> None:
    """A prior with a Gaussian expansion: curved in every coordinate, dense only if small.

    Raises:
        UnsupportedModelError: it has none.
    """
    size = problem.sites.phi_size
    if not problem.diagonal_prior and size > _DENSE_AT_MOST:
        raise UnsupportedModelError(
            where,
            needed=f"at most {_DENSE_AT_MOST} parameters per task where they depend on each "
            "other given θ",
            found=str(size),
            do=do,
        )
    batch = problem.one_row()
    theta = problem.theta(batch)
    precision = _precision(problem, theta, batch, problem.location(theta, batch)).detach()
    flat = ~(_diagonal(precision, problem) > 0.0)
    bad = problem.sites.from_vector(flat.to(problem.dtype))
    for name, value in bad.items():
        if bool(value.any()):
            raise UnsupportedModelError(
                where,
                needed="a task prior that curves downwards at its location",
                found=f"site {name!r}, whose prior is flat or has a kink there",
                do=f"Give it a Normal or another smooth prior. {do}",
            )


def _precision(problem: Problem, theta: Theta, batch: Batch, loc: Tensor) -> Tensor:
    """Λ of the task prior at its location, (tasks, size, size), or its diagonal (tasks, size).

    Differentiable in θ. Of independent coordinates the diagonal is the sum over each row, which one
    more backward pass gives.
    """

    def log_prior(phi: Tensor) -> Tensor:
        return problem.log_task_prior(theta, phi, batch)

    if not problem.diagonal_prior:
        return -gradient_and_hessian(log_prior, loc, create_graph=True)[2]
    phi = loc if loc.requires_grad else loc.detach().requires_grad_()
    with torch.enable_grad():
        # 0 φ: a flat prior is no function of φ, and a linear one has no second gradient.
        value = log_prior(phi).sum() + 0.0 * phi.square().sum()
        (gradient,) = torch.autograd.grad(value, phi, create_graph=True)
        (row,) = torch.autograd.grad(gradient.sum(), phi, create_graph=True)
    return -row


def _diagonal(precision: Tensor, problem: Problem) -> Tensor:
    return precision if problem.diagonal_prior else precision.diagonal(dim1=-2, dim2=-1)
