"""Where q starts: the Gaussian expansion of the task prior at its location."""

from __future__ import annotations

import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian
from hbmeta.derivatives import hessian_vector
from hbmeta.families import Frame
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.triangular import covariance_factor

# Beyond so many parameters per task no Hessian is formed.
_DENSE_AT_MOST = 64

__all__ = ["as_frame", "prior_frame"]


def prior_frame(problem: Problem, theta: Theta, batch: Batch, *, full: bool) -> Frame:
    """N(m, (−∂² log p(φ | θ))⁻¹) at the location m of the task prior, without history.

    Exact where the task prior is Gaussian and the frame may be its shape. A coordinate along which
    the prior does not curve downwards at its location gets a scale of 1.

    Args:
        problem: the program.
        theta: θ.
        batch: the tasks.
        full: a triangular A; sds otherwise, those of each entry given the others.
    """
    theta = {name: value.detach() for name, value in theta.items()}
    with torch.no_grad():
        loc = problem.location(theta, batch)

    def log_prior(phi: Tensor) -> Tensor:
        return problem.log_task_prior(theta, phi, batch)

    if 1 < loc.shape[-1] <= _DENSE_AT_MOST and not problem.diagonal_prior:
        precision = -gradient_and_hessian(log_prior, loc)[2]
        root = covariance_factor(precision)
        if full and bool(torch.isfinite(root).all()):
            return Frame(loc, root)
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
    else:
        # Entries are independent, or too many to ask: row sums of the Hessian are its diagonal.
        diagonal = -hessian_vector(log_prior, loc, torch.ones_like(loc))
    sd = torch.where(diagonal > 1e-12, diagonal.clamp_min(1e-12), torch.ones_like(loc)).rsqrt()
    return Frame(loc, torch.diag_embed(sd) if full else sd)


def as_frame(density: Frame, *, full: bool) -> Frame:
    """A Gaussian as a frame of the wanted kind, with its location and sds."""
    if density.diagonal == (not full):
        return density
    return Frame(density.loc, torch.diag_embed(density.scale) if full else density.sd)
