"""Fits of `JointGuide`: a Gaussian over θ and all φ_i, handed out as paired draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbmeta.densities import Empirical, Gaussian
from hbmeta.families import Family, Frame
from hbmeta.movement import Moving
from hbmeta.problem import Problem
from hbmeta.program import Batch
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, prior_scales, standard_normal
from hbmeta.variational.frames import prior_frame
from hbmeta.variational.joint_guide import FULL_AT_MOST, GLOBAL, JointGuide, linear_entries
from hbmeta.variational.local import LocalSearch
from hbmeta.variational.objectives import Bound
from hbmeta.variational.search import settle
from hbmeta.variational.training import train_guide

# Draws of (θ, φ) that a fit keeps.
_KEPT = 1000
# Estimates of the bound that are averaged where its noise is not matched.
_ESTIMATES = 16
_FIRST = 20
# q(θ) starts this much narrower than p(θ), on the log scale: under a wide p(θ) programs overflow.
_NARROW = -2.0

__all__ = ["JointDensity", "learn_distribution"]


class JointDensity(nn.Module):
    """The numbers of q(θ) Π_i q(φ_i | θ), as a module, so that a fit saves them.

    Attributes:
        theta_loc: (theta_size,) m of the unconstrained global sites.
        theta_scale: L (theta_size, theta_size), or standard deviations (theta_size,).
        loc: (tasks, phi_size) a.
        scale: (tasks, phi_size, phi_size) R, or standard deviations (tasks, phi_size).
        slope: (tasks, phi_size, entries) B: E[φ | θ] = a + B [L⁻¹ (θ − m)] over the entries of θ
            that `linear_entries` names, all of them up to 64.
    """

    theta_loc: Tensor
    theta_scale: Tensor
    loc: Tensor
    scale: Tensor
    slope: Tensor

    def __init__(self, outer: Gaussian, inner: Gaussian, slope: Tensor) -> None:
        super().__init__()
        self.register_buffer("theta_loc", outer.loc[0].detach().clone())
        self.register_buffer("theta_scale", outer.scale[0].detach().clone())
        self.register_buffer("loc", inner.loc.detach().clone())
        self.register_buffer("scale", inner.scale.detach().clone())
        self.register_buffer("slope", slope.detach().clone())

    @staticmethod
    def empty(problem: Problem, n_tasks: int, family: Family) -> JointDensity:
        """Zeros in the shapes of a fit, to be filled from a file."""
        size, inner = problem.sites.theta_size, problem.sites.phi_size
        zeros = torch.zeros(n_tasks, inner, dtype=problem.dtype, device=problem.device)
        full = size <= FULL_AT_MOST
        outer = Gaussian(
            zeros.new_zeros(1, size), zeros.new_zeros((1, size, size) if full else (1, size))
        )
        scale = zeros.new_zeros(n_tasks, inner, inner) if family.full_frame else zeros
        entries = len(linear_entries(problem.sites))
        return JointDensity(outer, Gaussian(zeros, scale), zeros.new_zeros(n_tasks, inner, entries))


def learn_distribution(
    name: str,
    problem: Problem,
    tasks: Tasks,
    options: Options,
    family: Family,
    *,
    draws: int,
    fixed_draws: int,
    step_size: float,
    tolerance: float,
) -> Learned:
    """q(θ) and all q(φ_i | θ) by Adam on minibatches, ended by Newton where all tasks are seen.

    Args:
        name: of the strategy, for messages.
        problem: the program.
        tasks: of the fit.
        options: of the fit; `tasks_per_step` is None where every step sees all tasks.
        family: of q(φ_i | θ), Diagonal or FullRank.
        draws: per step.
        fixed_draws: of the noise of the search.
        step_size: Adam's for q; module parameters have the learning rate of the fit.
        tolerance: of the search.
    Returns:
        draws of θ with draws of φ, and in `own` the numbers of q.
    """
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    size = problem.sites.theta_size
    centre = Gaussian(
        problem.sites.theta_to_vector(theta).unsqueeze(0),
        problem.sites.theta_to_vector(prior_scales(problem, theta, batch)).unsqueeze(0),
    )
    local = LocalSearch(
        name, problem, family, family, Bound(1.0, 1), fixed_draws, tolerance, None, step_size
    )
    # q(φ_i) at the θ that a fit starts from, and its units from here on.
    frame = prior_frame(problem, theta, batch, full=family.full_frame)
    rows, frame, _ = local.newton(theta, None, frame, batch, options.seed, _FIRST, options.tier)
    frame = family.reframed(rows, frame)[1]
    moving = Moving(theta, {}, None)
    moving.fix(f"theta/{site.name}" for site in problem.sites.globals)
    guide = JointGuide(
        problem, family, centre, full=size <= FULL_AT_MOST, draws=draws, moving=moving
    )
    outer = torch.zeros(guide.outer.parameters, dtype=problem.dtype, device=problem.device)
    outer[size : 2 * size] = _NARROW
    shared = {GLOBAL: outer, **moving.free}
    rates = {GLOBAL: step_size} | dict.fromkeys(moving.free, options.learning_rate)
    trained = train_guide(
        name, guide, shared, guide.start(frame, options.seed), frame, batch, options,
        rates=rates, row_rate=step_size, row_floor=step_size, watched={},
    )  # fmt: skip
    shared, rows = trained.shared, trained.rows
    info: dict[str, Any] = {"still_moving": trained.still_moving, "tier": trained.tier}
    # Matched noise has two draws per entry: of a long θ more than pays, and than memory holds.
    if size <= FULL_AT_MOST:
        noise = guide.fixed_noise(fixed_draws, options.seed, frame.loc)
        if options.tasks_per_step is None and not moving.free:
            rows, info["residual"] = settle(
                name, guide, shared, rows, frame, batch, noise,
                tolerance=tolerance, tier=options.tier,
            )  # fmt: skip
        info["bound"] = _bound(guide, shared, rows, frame, batch, noise, fixed=True)
    else:
        generator = torch.Generator().manual_seed(options.seed + 2)
        shapes = guide.noise_shapes(tasks.n_tasks)
        info["bound"] = sum(
            _bound(
                guide, shared, rows, frame, batch,
                standard_normal(shapes, generator, frame.loc), fixed=False,
            )
            for _ in range(_ESTIMATES)
        ) / _ESTIMATES  # fmt: skip
    with torch.no_grad():
        drawn, phi = guide.sample(shared, rows, frame, _KEPT, options.seed)
        inner, slope = guide.local_parts(rows, frame)
        own = JointDensity(guide.global_density(shared), inner, slope)
    return Learned(
        theta=drawn,
        own=own,
        drawn=True,
        density=Empirical(phi),
        history=trained.losses,
        info=info,
        seconds_staging=trained.seconds_staging,
    )


def _bound(
    guide: JointGuide,
    shared: Mapping[str, Tensor],
    rows: Tensor,
    frame: Frame,
    batch: Batch,
    noise: Mapping[str, Tensor],
    *,
    fixed: bool,
) -> float:
    """The ELBO of all tasks at some noise."""
    with torch.no_grad():
        losses, prior = guide.terms(shared, rows, frame, batch, noise, fixed=fixed)
    return -float(losses.sum() + prior)
