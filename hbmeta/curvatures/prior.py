"""The curvature of all that is no observation: −∇² of log p(φ | θ), and of factors of the task."""

from __future__ import annotations

import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian
from hbmeta.curvatures.response import log_rest
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["check_diagonal", "prior_diagonal", "prior_matrix"]


def prior_matrix(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, *, create_graph: bool = False
) -> Tensor:
    """(tasks, size, size)."""

    def rest(point: Tensor) -> Tensor:
        # A flat prior is no function of φ, which autograd refuses.
        return log_rest(problem, theta, point, batch) + 0.0 * point.sum(-1)

    return -gradient_and_hessian(rest, phi, create_graph=create_graph)[2]


def prior_diagonal(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, *, create_graph: bool = False
) -> Tensor:
    """(tasks, size) where nothing stands off the diagonal: the row sums of the matrix."""
    phi = phi if phi.requires_grad else phi.detach().requires_grad_()
    with torch.enable_grad():
        total = log_rest(problem, theta, phi, batch).sum() + 0.0 * phi.sum()
        (gradient,) = torch.autograd.grad(total, phi, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(phi)
        (sums,) = torch.autograd.grad(
            gradient.sum(), phi, create_graph=create_graph, allow_unused=True
        )
    if sums is None:
        return torch.zeros_like(phi)
    return -sums if create_graph else -sums.detach()


def check_diagonal(problem: Problem, where: str) -> None:
    """Raises where entries of φ depend on each other given θ.

    With H the Hessian of the log prior and any vector v, H v = diag(H) ∘ v where H is diagonal, and
    diag(H) = H 1: tried at a random v, which a matrix that is not diagonal passes with
    probability 0.

    Raises:
        UnsupportedModelError: they do.
    """
    batch = problem.one_row()
    theta = {name: value.detach() for name, value in problem.theta(batch).items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        start = problem.location(theta, batch)
    noise = torch.randn((2, *start.shape), generator=generator, dtype=torch.float64).to(start)
    phi = (start + 0.1 * noise[0]).requires_grad_()
    diagonal = prior_diagonal(problem, theta, phi, batch)
    with torch.enable_grad():
        total = log_rest(problem, theta, phi, batch).sum() + 0.0 * phi.sum()
        (gradient,) = torch.autograd.grad(total, phi, create_graph=True)
        product = torch.zeros_like(phi)
        if gradient.requires_grad:
            (found,) = torch.autograd.grad(gradient, phi, noise[1], allow_unused=True)
            product = product if found is None else found
    off = (product + diagonal * noise[1]).abs().max()
    tolerance = 1e-9 if phi.dtype == torch.float64 else 1e-4
    if float(off) > tolerance * float(diagonal.abs().max().clamp_min(1e-12)):
        raise UnsupportedModelError(
            where,
            needed="task parameters that are independent of each other given θ",
            found=f"a prior in {problem.name} that ties them",
            do='Use curvature="exact" or "ggn" with at most 64 parameters per task.',
        )
