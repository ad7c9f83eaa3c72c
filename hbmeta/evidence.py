"""Type-II maximum likelihood: θ at the maximum of Σ_i log p(y_i | θ), plus log p(θ) on request.

The evidence comes as a function of θ (in closed form, by quadrature, …); L-BFGS moves θ in units of
its prior's scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hbmeta.optimisation import minimise
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.training import Options, prior_scales

__all__ = ["Maximum", "maximise_evidence"]


class Maximum(NamedTuple):
    """θ at the maximum, where the search started, whether it converged, seconds of staging."""

    theta: Theta
    start: Theta
    converged: bool
    seconds_staging: float


def maximise_evidence(
    problem: Problem,
    batch: Batch,
    evidence: Callable[[Theta], Tensor],
    *,
    prior: bool,
    options: Options,
    where: str,
) -> Maximum:
    """θ at the maximum of the evidence.

    Args:
        problem: the program on its data.
        batch: the rows of all tasks.
        evidence: θ to (tasks,) log p(y_i | θ), differentiable.
        prior: whether log p(θ) is added.
        options: of the fit.
        where: for errors.
    """
    start = problem.theta(batch)
    if not start:
        return Maximum(start, start, True, 0.0)
    scales = prior_scales(problem, start, batch)
    names, sizes = list(start), [v.numel() for v in start.values()]

    def unpack(vector: Tensor) -> Theta:
        return {
            n: start[n] + scales.get(n, torch.ones_like(start[n])) * part.reshape(start[n].shape)
            for n, part in zip(names, vector.split(sizes), strict=True)
        }

    rows = max(int(batch.mask.sum()), 1)

    def objective(vector: Tensor) -> Tensor:
        theta = unpack(vector)
        total = evidence(theta).sum()
        if prior:
            total = total + problem.log_prior(theta, batch)
        return -total / rows

    first = torch.zeros(sum(sizes), dtype=problem.dtype, device=problem.device)
    found = minimise(objective, first, where=where, tier=options.tier)
    theta = {name: value.detach() for name, value in unpack(found.point).items()}
    return Maximum(theta, start, found.converged, found.seconds_staging)
