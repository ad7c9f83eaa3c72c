"""Fits of Laplace with effects of level 1 integrated out; see `hbmeta.crossed_evidence`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbmeta.crossed_evidence import CrossedEvidence
from hbmeta.densities import Empirical
from hbmeta.errors import CurvatureError, DataError, UnsupportedModelError
from hbmeta.evidence import warn_of_search
from hbmeta.optimisation import minimise
from hbmeta.problem import Problem
from hbmeta.program import Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, prior_scales

# The curvature between effects is dense.
_MOST = 5000
# Draws of (u, φ) that a fit keeps.
_KEPT = 1000
# On the gradient, in nats per row and unit of a prior's scale.
_TOLERANCE = 1e-6

__all__ = ["check_integrated", "learn_crossed"]


def check_integrated(problem: Problem, names: tuple[str, ...], where: str) -> None:
    """Sites of level 1 that can be integrated out.

    Raises:
        DataError: a name that is no level-1 site.
        UnsupportedModelError: too many entries.
    """
    known = {site.name: site.size for site in problem.sites.globals}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            where,
            needed=f"integrated among the level-1 sites {', '.join(map(repr, known))}",
            found=repr(unknown[0]),
            do="Correct the name; φ is integrated out always.",
        )
    size = sum(known[name] for name in names)
    if size > _MOST:
        raise UnsupportedModelError(
            where,
            needed=f"at most {_MOST} numbers in integrated (their curvature is dense)",
            found=str(size),
            do="Use Variational(theta='distribution') or NUTS.",
        )


def learn_crossed(
    name: str,
    problem: Problem,
    tasks: Tasks,
    options: Options,
    integrated: tuple[str, ...],
    tolerance: float,
) -> Learned:
    """ψ at the maximum of the evidence, and draws of (u, φ) from its Gaussian there.

    Args:
        name: of the strategy, for messages.
        problem: the program.
        tasks: of the fit.
        options: of the fit.
        integrated: the level-1 sites u.
        tolerance: of the search for the mode, in nats.
    """
    where = f"{name}.fit"
    batch = problem.batch(tasks)
    start = problem.theta(batch)
    search = CrossedEvidence(problem, batch, integrated, start, options.tier, where)
    units = prior_scales(problem, start, batch)
    names = list(search.psi)
    sizes = [search.psi[key].numel() for key in names]

    def unpack(vector: Tensor) -> Theta:
        return {
            key: start[key] + units.get(key, torch.ones(())) * part.reshape(start[key].shape)
            for key, part in zip(names, vector.split(sizes), strict=True)
        }

    # The search asks twice for its first vector, which takes as long as any other.
    latest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def beside(vector: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal latest
        if latest is None or not torch.equal(latest[0], vector):
            latest = vector.clone(), evaluated(vector)
        return latest[1]

    def evaluated(vector: Tensor) -> tuple[Tensor, Tensor]:
        try:
            value, slope, _ = search(unpack(vector), tolerance)
        except CurvatureError:
            return vector.new_full((), torch.nan), torch.zeros_like(vector)
        parts = [(units.get(key, torch.ones(())) * slope[key]).reshape(-1) for key in names]
        return value, torch.cat(parts)

    def objective(vector: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return -(value + (vector - vector.detach()) @ slope) / max(tasks.n_points, 1)

    psi, info = dict(search.psi), dict[str, Any]()
    if names:
        first = torch.zeros(sum(sizes), dtype=problem.dtype, device=problem.device)
        found = minimise(
            objective, first, where=where, tier="eager", tolerance=_TOLERANCE, beside=beside
        )
        psi = {key: value.detach() for key, value in unpack(found.point).items()}
        warn_of_search(found, name)
        info = {
            "converged": found.converged,
            "evaluations": found.evaluations,
            "slope": found.steepest * tasks.n_points,
        }
    evidence, _, met = search(psi, tolerance)
    factor = search.factor(psi)
    generator = torch.Generator().manual_seed(options.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(search.u)

    u, phi = factor.draw(normal(_KEPT, len(search.u)), normal(_KEPT, *search.phi.shape))
    # Sites have draws, parameters of the module one value.
    sites = {site.name for site in problem.sites.globals}
    held = {k: v.expand(_KEPT, *v.shape) if k in sites else v for k, v in psi.items()}
    parts = zip(integrated, (search.u + u).split(search.sizes, -1), strict=True)
    theta = {**held, **{key: part.reshape(_KEPT, *search.shapes[key]) for key, part in parts}}
    return Learned(
        theta={key: value.contiguous() for key, value in theta.items()},
        drawn=True,
        density=Empirical(search.phi + phi),
        info={
            "log_evidence": float(evidence),
            "mode_found": met,
            "integrated": list(integrated),
            **info,
        },
        seconds_staging=search.seconds_staging,
    )
