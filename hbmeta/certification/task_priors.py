"""KL(Q_i ‖ P_θ) of a task in closed form, where both are Gaussian in unconstrained φ.

That p(φ | θ) is Gaussian is seen, not declared: −∇² log p(φ | θ) is the same positive definite
matrix Λ at the location and at two random points. Then P_θ = N(location, Λ⁻¹). An estimate of a KL
from draws certifies nothing, because log dQ/dP has no bound: other cases are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbmeta import bounds
from hbmeta.bounds.checks import Array
from hbmeta.curvatures.prior import prior_diagonal, prior_matrix
from hbmeta.densities import Delta, Gaussian
from hbmeta.errors import UnsupportedModelError
from hbmeta.posterior import TaskPosterior

__all__ = ["task_kls"]


def task_kls(posterior: TaskPosterior, where: str) -> Array:
    """(T,) KL(Q_i ‖ P_θ) in nats.

    Raises:
        UnsupportedModelError: q or the task prior is not Gaussian; a point mass has an infinite KL.
    """
    density = posterior.density
    if not isinstance(density, Gaussian):
        point = isinstance(density, Delta)
        raise UnsupportedModelError(
            where,
            needed="a Gaussian posterior of each task",
            found="a point mass, whose KL from any task prior with a density is infinite"
            if point
            else type(density).__name__,
            do='Soften it (Laplace.soften), or use bound="query_split" or "meta_test", which take '
            "point masses.",
        )
    location, precision = _gaussian_prior(posterior, where)
    loc, scale = density.loc.double(), density.scale.double()
    found: Array
    if density.diagonal and precision.dim() == location.dim():
        found = bounds.diagonal_gaussian_kl(loc, scale, location, precision.rsqrt())
        return found
    prior = torch.linalg.inv(_as_matrix(precision, location))
    found = bounds.gaussian_kl(loc, Gaussian(loc, scale).covariance, location, prior)
    return found


def _as_matrix(precision: Tensor, location: Tensor) -> Tensor:
    return precision if precision.dim() > location.dim() else torch.diag_embed(precision)


def _positive_definite(matrix: Tensor, *, diagonal: bool) -> bool:
    if diagonal:
        return bool((matrix > 0.0).all())
    return bool((torch.linalg.cholesky_ex(matrix)[1] == 0).all())


def _gaussian_prior(posterior: TaskPosterior, where: str) -> tuple[Tensor, Tensor]:
    """Location (tasks, size) and Λ, of independent coordinates its diagonal."""
    problem = posterior.problem
    curvature = prior_diagonal if problem.diagonal_prior else prior_matrix
    batch = problem.batch(posterior.support)
    with torch.no_grad():
        location = problem.location(posterior.theta, batch)
    generator = torch.Generator().manual_seed(0)
    matrix = curvature(problem, posterior.theta, location, batch).detach()
    tolerance = (1e-8 if location.dtype == torch.float64 else 1e-3) * float(matrix.abs().max())
    for _ in range(2):
        noise = torch.randn(location.shape, generator=generator, dtype=torch.float64)
        moved = curvature(problem, posterior.theta, location + noise.to(location), batch)
        if float((moved - matrix).abs().max()) > tolerance:
            raise UnsupportedModelError(
                where,
                needed="a task prior p(φ | θ) that is Gaussian in unconstrained φ",
                found=f"another one in {problem.name}",
                do='Use bound="query_split" or bound="meta_test".',
            )
    spread = float((location - location[:1]).abs().max())
    if spread > tolerance or float((matrix - matrix[:1]).abs().max()) > tolerance:
        raise UnsupportedModelError(
            where,
            needed="one task prior for all tasks, as the theorem has it",
            found=f"one in {problem.name} that differs between tasks (it depends on their x)",
            do='Use bound="query_split" or bound="meta_test".',
        )
    if not _positive_definite(matrix, diagonal=matrix.dim() == location.dim()):
        raise UnsupportedModelError(
            where,
            needed="a proper task prior p(φ | θ)",
            found=f"one of {problem.name} that is flat in some direction: its KL is infinite",
            do='Use bound="query_split" or bound="meta_test".',
        )
    return location.double(), matrix.double()
