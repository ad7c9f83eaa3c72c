"""How far a point lies from the mode of its task's log joint, in posterior standard deviations.

Model: f(φ) = log p(S | φ, θ) + log p(φ | θ), one for each task.
Estimator: with g = ∇f and Λ = −∇²f at φ, a Newton step Λ⁻¹g leads to the mode of the expansion of
f, whose standard deviations are those of N(·, Λ⁻¹). In these units, over the d entries of φ,

    distance² = gᵀ Λ⁻¹ g / d,

the square of Newton's decrement per entry: the root mean square shift in posterior sds where f is
quadratic, to first order elsewhere, and the same in all units of φ. It needs no reference, and one
Hessian. Where Λ is not positive definite no mode is near; its eigenvalues (of s Λ s with
s_j = |Λ_jj|^(−½), so that units drop out) are then taken by their size, which gives a distance that
is large for a slope that is.

What it cannot see is a θ that is wrong: it is measured given θ.

Reference: Boyd, Vandenberghe (2004), Convex Optimization, §9.5.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbmeta.compilation import HALVES
from hbmeta.curvature import gradient_and_hessian, log_joint
from hbmeta.densities import Delta, Density, Empirical
from hbmeta.modes import DENSE_AT_MOST
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["FAR", "centre_of", "complaint", "distance_to_mode", "measurable"]

FAR = 1.0
"""Posterior standard deviations, in root mean square over tasks, above which a fit says so."""


def measurable(problem: Problem) -> bool:
    """Whether φ is small enough for a Hessian, and held with digits enough for its inverse.

    The weights of a network are neither: their posterior has many modes, and none is looked for.
    """
    return 0 < problem.sites.phi_size <= DENSE_AT_MOST and problem.dtype not in HALVES


def distance_to_mode(problem: Problem, theta: Theta, phi: Tensor, batch: Batch) -> Tensor:
    """(tasks,) the distance of φ (tasks, phi_size) from the mode; see the module's docstring.

    An entry without curvature is left out. NaN where f has no finite derivatives.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    _, gradient, hessian = gradient_and_hessian(
        lambda p: log_joint(problem, theta, p, batch), phi.detach()
    )
    gradient, precision = gradient.double(), -hessian.double()
    finite = torch.isfinite(gradient).all(-1) & torch.isfinite(precision).all(-1).all(-1)
    gradient = torch.where(finite.unsqueeze(-1), gradient, 0.0)
    precision = torch.where(finite[:, None, None], precision, 0.0)
    diagonal = precision.diagonal(dim1=-2, dim2=-1).abs()
    unit = torch.where(diagonal > 0.0, diagonal.rsqrt(), torch.zeros_like(diagonal))
    values, vectors = torch.linalg.eigh(unit.unsqueeze(-1) * precision * unit.unsqueeze(-2))
    slope = (vectors.mT @ (unit * gradient).unsqueeze(-1)).squeeze(-1)
    # Below this an eigenvalue is the rounding of a Hessian in the dtype of the data.
    least = phi.shape[-1] * torch.finfo(phi.dtype).eps
    found = (slope.square() / values.abs().clamp_min(least)).mean(-1).sqrt()
    return torch.where(finite, found, torch.nan)


def centre_of(density: Density) -> Tensor:
    """(tasks, phi_size) the point that stands for a density: its mean, or the point itself."""
    if isinstance(density, Empirical):
        return density.mean
    return density.loc if isinstance(density, Delta) else density.centre


def complaint(distance: Tensor, ids: tuple[Any, ...]) -> str:
    """What to say of these distances (tasks,); nothing where they are small in root mean square."""
    known = distance[torch.isfinite(distance)]
    if not len(known) or float(known.square().mean().sqrt()) <= FAR:
        return ""
    worst = int(torch.nan_to_num(distance, -1.0).argmax())
    return (
        "needed task parameters near the mode of log p(S, φ | θ), for a posterior; found "
        f"{int((known > FAR).sum())} of {len(distance)} tasks more than a posterior standard "
        f"deviation from it, in root mean square {float(known.square().mean().sqrt()):.3g} of them "
        f"(task {ids[worst]!r}: {float(distance[worst]):.3g}). Change steps or step_size if you "
        "want posteriors, or use Laplace, Variational or NUTS; predictions are judged by compare."
    )
