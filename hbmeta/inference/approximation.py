"""The Gaussian of a curvature around a point, for every task."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.curvatures import Kind, precision_of
from hbmeta.damping import Damping, choose_damping
from hbmeta.densities import Transported
from hbmeta.errors import ConvergenceError
from hbmeta.laplace_evidence import evidence_at, kind_for_evidence
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["approximate"]


def approximate(
    strategy: Any,
    problem: Problem,
    theta: Theta,
    phi: Tensor,
    batch: Batch,
    *,
    ids: tuple[Any, ...],
    where: str,
) -> tuple[Transported, Damping, Tensor]:
    """N(φ, (Λ + δI)⁻¹) at any φ, how it was damped, and the evidence (tasks,).

    Args:
        strategy: with the settings `curvature`, `damping` and `sites`.
        problem: the program.
        theta: θ.
        phi: (tasks, phi_size).
        batch: the rows.
        ids: of the tasks, for errors.
        where: for errors.
    Raises:
        ConvergenceError: a curvature is NaN or infinite.
    """
    kind: Kind = strategy.curvature
    precision = precision_of(kind, problem, theta, phi, batch, sites=strategy.sites)
    if not bool(precision.finite.all()):
        bad = ids[int((~precision.finite).nonzero()[0])]
        raise ConvergenceError(
            where,
            needed="a finite curvature of every task",
            found=f"NaN or infinity for task {bad!r}",
            do="Standardise x and y, or check the program's priors.",
        )
    damping = choose_damping(
        precision, strategy.damping, problem, theta, phi, batch, ids=ids, where=where
    )
    density = precision.density(phi, damping.value).detach()
    with torch.no_grad():
        value = log_joint(problem, theta, phi, batch)
        if kind_for_evidence(kind) == kind:
            log_det = precision.log_det(damping.value)
            evidence = value + 0.5 * phi.shape[-1] * math.log(2 * math.pi) - 0.5 * log_det
        else:
            evidence = evidence_at(
                problem, theta, phi, batch, damping.value, kind, create_graph=False
            )
    return density, damping, evidence.detach()
