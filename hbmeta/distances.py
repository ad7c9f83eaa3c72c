"""How far one approximation of p(φ_i | S_i) is from another, coordinate by coordinate.

    d = (m_q − m_ref) / sd_ref      r = sd_q / sd_ref

per task and per coordinate of every local site that two programs share. What is deterministic in
one of them (such as "coefficients" of a non-centred program) goes before the latents, because it
means the same under any parametrisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.conditional import conditional
from hbmeta.errors import HbmetaError
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Tasks

__all__ = [
    "Distance",
    "Moments",
    "distance_between",
    "given_theta",
    "moments_of",
    "shared_sites",
]

Moments = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and sd (tasks, *shape) of local sites by name."""

MEAN_LIMIT: float = 0.1
"""Largest mean |d| of a posterior that counts as close."""
TASK_LIMIT: float = 0.3
"""Largest |d| of one coordinate of one task that counts as close."""
SD_LIMITS: tuple[float, float] = (0.75, 1.33)
"""Range of r that counts as close."""
SHARE_LIMIT: float = 0.9
"""Share of coordinates and tasks that must be close."""


@dataclass(frozen=True)
class Distance:
    """A posterior against the reference, over all tasks and coordinates of the sites.

    Attributes:
        sites: names of the sites compared.
        mean_difference: mean of |d|, in standard deviations of the reference.
        largest_difference: largest |d|.
        sd_ratio: median of r; 0 for a point.
        sd_ratio_low: smallest r.
        sd_ratio_high: largest r.
        share_close: share of coordinates and tasks with |d| ≤ 0.3 and r in [0.75, 1.33].
    """

    sites: tuple[str, ...]
    mean_difference: float
    largest_difference: float
    sd_ratio: float
    sd_ratio_low: float
    sd_ratio_high: float
    share_close: float

    @property
    def close(self) -> bool:
        """Mean |d| ≤ 0.1, and |d| ≤ 0.3 and r in [0.75, 1.33] in 90 % of coordinates and tasks."""
        return self.mean_difference <= MEAN_LIMIT and self.share_close >= SHARE_LIMIT

    @property
    def close_in_mean(self) -> bool:
        """Mean |d| ≤ 0.1, whatever the spread."""
        return self.mean_difference <= MEAN_LIMIT


def moments_of(posterior: TaskPosterior, draws: int, seed: int) -> Moments:
    """Posterior mean and sd of every local site, without gradients, in float64."""
    with torch.no_grad():
        found = posterior.moments(draws, seed)
    return {name: (mean.double().cpu(), sd.double().cpu()) for name, (mean, sd) in found.items()}


def shared_sites(first: TaskPosterior, second: TaskPosterior) -> tuple[str, ...]:
    """Local sites that both programs have by name and shape, deterministic ones if there are any.

    A site that one program draws and the other computes (centred and non-centred) counts as
    deterministic.
    """
    sites = [posterior.problem.sites for posterior in (first, second)]
    shapes = [{s.name: s.shape for s in (*x.locals, *x.deterministic_local)} for x in sites]
    computed = {s.name for x in sites for s in x.deterministic_local}
    shared = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
    return tuple([name for name in shared if name in computed] or shared)


def distance_between(
    moments: Moments, reference: Moments, sites: tuple[str, ...]
) -> Distance | None:
    """The distance over these sites; None where no coordinate of the reference varies."""
    differences, ratios = [], []
    for name in sites:
        (mean, sd), (mean_ref, sd_ref) = moments[name], reference[name]
        varies = sd_ref > 0
        differences.append(((mean - mean_ref)[varies] / sd_ref[varies]).abs())
        ratios.append(sd[varies] / sd_ref[varies])
    if not sites or not sum(d.numel() for d in differences):
        return None
    d, r = torch.cat(differences), torch.cat(ratios)
    low, high = SD_LIMITS
    close = (d <= TASK_LIMIT) & (r >= low) & (r <= high)
    return Distance(
        sites,
        mean_difference=float(d.mean()),
        largest_difference=float(d.max()),
        sd_ratio=float(r.median()),
        sd_ratio_low=float(r.min()),
        sd_ratio_high=float(r.max()),
        share_close=float(close.double().mean()),
    )


def given_theta(
    fitted: Fitted, support: Tasks, draws: int, seed: int
) -> tuple[TaskPosterior | None, str]:
    """p(φ | S, θ) of a fit's own program at its own θ, held at a point; or None and why not.

    The text is a remark on the posterior where there is one (no mode found, a curvature that is no
    maximum's, few effective draws), else empty.
    """
    problem = fitted.problem
    if not problem.sites.locals:
        return None, "nothing differs between tasks"
    tasks = support.to(device=problem.device, dtype=problem.dtype)
    try:
        density, info = conditional(
            problem, fitted.theta, problem.batch(tasks), draws=draws, seed=seed
        )
    except HbmetaError as error:
        return None, f"needed {error.needed}; found {error.found}"
    posterior = TaskPosterior(problem, fitted.theta, density, tasks, units=fitted.units)
    return posterior, _remark(info)


def _remark(info: Mapping[str, Tensor]) -> str:
    """What is bad about draws of `conditional`, in words; empty where nothing is."""
    parts = [
        f"{what} for {int((~info[key]).sum())} of {len(info[key])} tasks"
        for key, what in (
            ("converged", "no mode was found"),
            ("positive", "the curvature is not that of a maximum"),
        )
        if not bool(info[key].all())
    ]
    fewest = float(info["effective_draws"].min())
    # NaN too.
    if not fewest >= 100:
        parts.append(f"{fewest:.0f} effective draws")
    return "; ".join(parts)
