"""Fits of `PointGuide`: θ at the maximum of Σ_i L(λ_i, θ) + log p(θ), and every λ_i."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from hbmeta.movement import Moving
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, prior_scales
from hbmeta.variational.frames import prior_frame
from hbmeta.variational.local import LocalSearch
from hbmeta.variational.point_guide import PointGuide
from hbmeta.variational.search import settle
from hbmeta.variational.training import learning_rates, train_guide, untouched_by

# Newton steps for λ at the θ that a fit starts from.
_FIRST = 20

__all__ = ["learn_point"]


def learn_point(
    search: LocalSearch, tasks: Tasks, options: Options
) -> tuple[Learned, dict[str, Tensor]]:
    """Adam on minibatches, ended by Newton on all where all can be seen at once.

    That is where every step saw all tasks, θ is global sites (a network's weights would be fitted
    to the fixed noise) and the bound is the ELBO of a Gaussian. Otherwise Newton ends the search
    for λ alone, or nothing does: see `hbmeta.variational.local`.

    Args:
        search: how q is found at a θ.
        tasks: of the fit.
        options: of the fit; `tasks_per_step` is None where every step sees all tasks.
    Returns:
        θ with q of the tasks, and info of the last search for λ (empty where Newton cannot end it).
    """
    problem, family, gaussian = search.problem, search.family, search.gaussian
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    seed, tier = options.seed, options.tier
    frame = prior_frame(problem, theta, batch, full=gaussian.full_frame)
    rows, frame, _ = search.newton(theta, None, frame, batch, seed, _FIRST, tier)
    # From here on λ is in units of q itself.
    rows, frame = gaussian.reframed(rows, frame)
    rows = search.start(rows, frame, seed)
    moving = Moving(theta, prior_scales(problem, theta, batch), None)
    guide = PointGuide(problem, family, search.bound, moving)
    untouched = untouched_by(guide, moving, rows, frame, batch)
    if untouched:
        warnings.warn(
            f"{search.name}: the bound does not depend on {', '.join(untouched)}, so it stays at "
            "its prior's location.",
            stacklevel=4,
        )
    whole = options.tasks_per_step is None and not search.ends_with_adam
    whole = whole and len(moving.scaled) == len(moving.free)
    info: dict[str, Any] = {"untouched": untouched}
    history: list[float] = []
    seconds = 0.0
    if moving.free:
        trained = train_guide(
            search.name,
            guide,
            moving.free,
            rows,
            frame,
            batch,
            options,
            rates=learning_rates(moving, options),
            row_rate=search.step_size,
            row_floor=search.floor,
            watched={} if whole else moving.scaled,
        )
        rows, history, seconds = trained.rows, trained.losses, trained.seconds_staging
        info |= {"still_moving": trained.still_moving, "tier": trained.tier}
        if not search.ends_with_adam:
            rows, frame = gaussian.reframed(rows, frame)
    if whole and moving.free:
        noise = guide.fixed_noise(search.draws, seed, frame.loc)
        rows, info["residual"] = settle(
            search.name, guide, moving.free, rows, frame, batch, noise,
            tolerance=search.tolerance, tier=tier,
        )  # fmt: skip
    found = moving.settle()
    local: dict[str, Tensor] = {}
    density = None  # of the tasks of the fit, as of any: `adapt` finds it
    if not search.ends_with_adam:
        rows, frame = gaussian.reframed(rows, frame)
        rows, frame, local = search.newton(found, rows, frame, batch, seed, None, tier)
        density, info["bound"] = family.density(rows, frame).detach(), local["bound"]
    learned = Learned(
        theta=found,
        density=density,
        history=history,
        info=info,
        seconds_staging=seconds,
    )
    return learned, local
