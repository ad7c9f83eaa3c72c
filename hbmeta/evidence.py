"""Type-II maximum likelihood: θ at the maximum of Σ_i log p(y_i | θ), plus log p(θ) on request.

The evidence comes as a function of θ (in closed form, by quadrature, …); L-BFGS moves θ in units of
its prior's scale. A variance between tasks whose estimate is zero (a real case: Gelman et al.,
BDA3, §5.4) is named in a warning. That is asked of every level-1 site whose support starts at zero,
whatever its prior.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform

from hbmeta.optimisation import Minimum, minimise
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.training import Learned, Options, prior_scales

# A scale is reported as zero where it fell below this share of where it started, its prior's, and a
# tenth of it would have no lower evidence (to rounding), nor one higher by so many nats: under a
# wide prior a small scale is no zero.
_AT_ZERO = 1e-2
_FLAT = 0.05

# A slope of this many nats per row is no rounding.
_STEEP = 1e-3

# Of a difference of gradients, in units of the parameter's scale.
_STEP = 1e-3

__all__ = ["maximise_evidence", "observed_information", "warn_of_search"]


def maximise_evidence(
    problem: Problem,
    batch: Batch,
    evidence: Callable[..., Tensor],
    *,
    prior: bool,
    options: Options,
    where: str,
    beside: Callable[[Theta], Sequence[Tensor]] | None = None,
) -> Learned:
    """θ at the maximum of the evidence; warns where the estimate of a scale is zero.

    Args:
        problem: the program on its data.
        batch: the rows of all tasks.
        evidence: θ, and what `beside` gives, to (tasks,) log p(y_i | θ), differentiable.
        prior: whether log p(θ) is added.
        options: of the fit.
        where: the strategy's name, for errors and the warning.
        beside: what the evidence takes besides θ, such as the modes of the tasks; found anew at
            every θ and held constant in the gradient.
    Returns:
        θ; in info "log_evidence" there, summed over tasks, "at_zero", the names of positive level-1
        sites whose estimate is zero, and "converged", whether the search did.
    """
    start = problem.theta(batch)
    others = beside if beside is not None else _nothing

    def total(at: Theta) -> float:
        with torch.no_grad():
            return float(evidence(at, *others(at)).sum())

    if not start:
        return _learned(start, total(start), [], True, 0.0)
    scales = prior_scales(problem, start, batch)
    names, sizes = list(start), [v.numel() for v in start.values()]

    def unpack(vector: Tensor) -> Theta:
        return {
            n: start[n] + scales.get(n, torch.ones_like(start[n])) * part.reshape(start[n].shape)
            for n, part in zip(names, vector.split(sizes), strict=True)
        }

    rows = max(int(batch.mask.sum()), 1)

    def objective(vector: Tensor, *given: Tensor) -> Tensor:
        theta = unpack(vector)
        total = evidence(theta, *given).sum()
        if prior:
            total = total + problem.log_prior(theta, batch)
        return -total / rows

    first = torch.zeros(sum(sizes), dtype=problem.dtype, device=problem.device)
    found = minimise(
        objective,
        first,
        where=f"{where}.fit",
        tier=options.tier,
        beside=None if beside is None else lambda vector: others(unpack(vector)),
    )
    theta = {name: value.detach() for name, value in unpack(found.point).items()}
    warn_of_search(found, where)
    value = total(theta)
    at_zero = _at_zero(problem, batch, theta, start, value, total)
    if at_zero:
        warnings.warn(
            f"{where}: the estimate of {', '.join(at_zero)} is zero: the data show no variation "
            f"there. NUTS{'' if prior else ', or prior=True,'} weighs how large it could still be.",
            stacklevel=4,
        )
    return _learned(theta, value, at_zero, found.converged, found.seconds_staging)


def observed_information(gradient: Callable[[Tensor], Tensor], at: Tensor, scale: Tensor) -> Tensor:
    """−∇²ℓ (size, size) from differences of ∇ℓ.

        ∇²ℓ e_j ≈ [8 (∇ℓ(u + h e_j) − ∇ℓ(u − h e_j)) − (∇ℓ(u + 2h e_j) − ∇ℓ(u − 2h e_j))] / 12h,

    with an error of order h⁴.

    Args:
        gradient: u (size,) to ∇ℓ (size,).
        at: where.
        scale: (size,) of each entry of u; h is a thousandth of it.
    """
    columns = []
    for j in range(len(at)):
        step = torch.zeros_like(at)
        step[j] = _STEP * scale[j]
        near, far = (gradient(at + k * step) - gradient(at - k * step) for k in (1, 2))
        columns.append((8 * near - far) / (12 * step[j]))
    hessian = torch.stack(columns, -1)
    return -0.5 * (hessian + hessian.T)


def _nothing(theta: Theta) -> Sequence[Tensor]:
    return ()


def _learned(
    theta: Theta, log_evidence: float, at_zero: list[str], converged: bool, seconds: float
) -> Learned:
    info = {"log_evidence": log_evidence, "at_zero": at_zero, "converged": converged}
    return Learned(theta, info=info, seconds_staging=seconds)


def warn_of_search(found: Minimum, where: str) -> None:
    """Says so where a search for θ stopped before the maximum."""
    if not found.converged and found.steepest > _STEEP:
        warnings.warn(
            f"{where}: the search for θ stopped where the evidence still rises "
            f"({found.steepest:.2g} nats per row and unit of a prior's scale). Standardise x "
            "and y, or use float64.",
            stacklevel=5,
        )


def _at_zero(
    problem: Problem,
    batch: Batch,
    theta: Theta,
    start: Theta,
    value: float,
    total: Callable[[Theta], float],
) -> list[str]:
    """Positive level-1 sites that fell so far that the evidence does not feel them any more."""
    found = []
    with torch.no_grad():
        transforms = problem.run(theta, {}, batch, with_y=False).transforms
    for site in problem.sites.globals:
        transform, here = transforms[site.name], theta[site.name]
        if site.real or not _starts_at_zero(transform, here):
            continue
        size = transform(here)
        fallen = size < _AT_ZERO * transform(start[site.name])
        if not bool(fallen.any()):
            continue
        lower = {**theta, site.name: torch.where(fallen, transform.inv(0.1 * size), here)}
        gain = total(lower) - value
        rounding = 1e-6 + torch.finfo(here.dtype).eps ** 0.5 * abs(value)
        # NaN, at a scale that rounding swallows, is no difference either.
        if not (gain < -rounding or gain > _FLAT):
            found.append(site.name)
    return found


def _starts_at_zero(transform: Any, unconstrained: Tensor) -> bool:
    """Whether every entry of a site goes to zero, and by itself, with its unconstrained one.

    So does exp, and the sigmoid of an interval (0, b); the simplex and matrices do not.
    """
    entry = transform
    while isinstance(entry, IndependentTransform):
        entry = entry.base_transform
    if entry.domain.event_dim:
        return False
    lowest = transform(torch.full_like(unconstrained, -math.inf))
    middle = transform(torch.zeros_like(unconstrained))
    # A sigmoid stops at the smallest normal number.
    return bool((lowest.abs() <= torch.finfo(lowest.dtype).eps ** 2 * middle).all())
