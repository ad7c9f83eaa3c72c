"""The two baselines that every table needs: each task alone, and one φ for all.

Model: y_ij ~ p(y | φ_i, θ); the priors p(φ | θ) and p(θ) are dropped.
Estimator: maximum of Σ_i log p(y_i | φ_i, θ) over θ and either every φ_i (no pooling) or one φ = φ_i
for all i (complete pooling).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbmeta.curvature import maximise
from hbmeta.densities import Delta
from hbmeta.feeding import training_tasks
from hbmeta.inference.strategy import Strategy
from hbmeta.optimisation import minimise
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, prior_scales

# In units of a prior's scale; a log scale that moved so far is on its way to infinity.
_FAR = 15.0

__all__ = ["CompletePooling", "NoPooling"]


@dataclass(frozen=True)
class NoPooling(Strategy):
    """q(φ | S) = δ at the maximum of the task's own likelihood.

    Keeps p(y | φ, θ); replaces p(φ | θ) and p(θ) by flat priors. Level-1 parameters that all tasks
    share (a slope, a noise scale) are estimated together, as in Gelman and Hill's no-pooling
    regression; what the likelihood does not identify (the coefficient of a column that is constant
    within groups) is chosen by the joint mode. Exact as maximum likelihood. A task without data stays at the location of the prior;
    a likelihood without a maximum (all answers "yes") stops where `iterations` end.

    Args:
        iterations: Newton steps per task when adapting.
    References:
        Gelman, Hill (2007), Data Analysis Using Regression and Multilevel Models, §12.2.
    """

    learns_spread: ClassVar[bool] = False

    iterations: int = 60

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ and all φ_i together by L-BFGS."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(tasks)

        def spread(theta: Theta, free: Tensor, start: Tensor) -> Tensor:
            return start + free.reshape(start.shape)

        theta, phi, info, seconds = _fit(problem, batch, options, self.name, spread, tasks.n_tasks)
        return Learned(theta, density=Delta(phi), info=info, seconds_staging=seconds)

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Delta:
        """The maximum of log p(S | φ, θ) per task."""

        def function(phi: Tensor) -> Tensor:
            return problem.log_likelihood(theta, phi, support)

        with torch.no_grad():
            start = problem.location(theta, support)
        found, _ = maximise(function, start, iterations=self.iterations)
        empty = (support.counts == 0).unsqueeze(-1)
        return Delta(torch.where(empty, start, found))


@dataclass(frozen=True)
class CompletePooling(Strategy):
    """q(φ | S) = δ at one φ for all tasks, whatever their support.

    Keeps p(y | φ, θ); replaces p(φ | θ) by a point shared by all tasks, and p(θ) by a flat prior. Exact as maximum
    likelihood of the pooled data.

    References:
        Gelman, Hill (2007), Data Analysis Using Regression and Multilevel Models, §12.2.
    """

    learns_spread: ClassVar[bool] = False

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ and the common φ by L-BFGS."""
        tasks: Tasks = training_tasks(data, options.seed).to(
            device=problem.device, dtype=problem.dtype
        )
        batch = problem.batch(tasks)

        def spread(theta: Theta, free: Tensor, start: Tensor) -> Tensor:
            return start[:1].expand(start.shape) + free

        theta, phi, info, seconds = _fit(problem, batch, options, self.name, spread, 1)
        info["phi"] = phi[0]
        return Learned(theta, density=Delta(phi), info=info, seconds_staging=seconds)

    def adapt(self, fitted: Any, support: Tasks, seed: int) -> Any:
        """The common φ for every task."""
        from hbmeta.posterior import TaskPosterior

        loc = fitted.info["phi"].expand(support.n_tasks, -1)
        return TaskPosterior(fitted.problem, fitted.theta, Delta(loc), support, units=fitted.units)

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Delta:
        """The location of the task prior; `adapt` knows the fitted φ and does not come here."""
        return Delta(problem.location(theta, support))


def _fit(
    problem: Problem, batch: Batch, options: Options, name: str, spread: Any, n_free: int
) -> tuple[Theta, Tensor, dict[str, Any], float]:
    """θ and φ at the maximum of Σ log p(y | φ, θ), reached from the mode of the joint density.

    The likelihood alone does not choose between, say, an intercept of a group and the coefficient of
    a column that is constant within groups: any point of a ridge is a maximum. Coming from the mode
    of p(y, φ, θ), the search keeps the point of the ridge that the priors like, because a ridge has
    no slope along itself.
    """
    start = problem.theta(batch)
    scales = prior_scales(problem, start, batch)
    names = list(start)
    sizes = [start[n].numel() for n in names]
    phi_size = problem.sites.phi_size

    def unpack(vector: Tensor) -> tuple[Theta, Tensor]:
        parts = vector.split([*sizes, n_free * phi_size])
        theta = {
            n: start[n] + scales.get(n, torch.ones_like(start[n])) * part.reshape(start[n].shape)
            for n, part in zip(names, parts, strict=False)
        }
        location = problem.location(theta, batch)
        return theta, spread(theta, parts[-1], location)

    n_rows = max(int(batch.mask.sum()), 1)

    def minus_joint(vector: Tensor) -> Tensor:
        theta, phi = unpack(vector)
        likelihood, local, prior = problem.terms(theta, phi, batch)
        return -(likelihood.sum() + local.sum() * (n_free / batch.n_tasks) + prior) / n_rows

    def minus_likelihood(vector: Tensor) -> Tensor:
        theta, phi = unpack(vector)
        return -problem.log_likelihood(theta, phi, batch).sum() / n_rows

    first = torch.zeros(sum(sizes) + n_free * phi_size, dtype=problem.dtype, device=problem.device)
    where = f"{name}.fit"
    mode = minimise(minus_joint, first, where=where, tier=options.tier)
    found = minimise(minus_likelihood, mode.point, where=where, tier=options.tier)
    with torch.no_grad():
        theta, phi = unpack(found.point)
    unbounded = float(found.point.abs().max()) > _FAR
    if unbounded:
        warnings.warn(
            f"{name}: the likelihood has no maximum (a parameter moved {_FAR:g} scales of its prior "
            "and was still moving): some task has as many parameters as points, or equal answers. "
            "A strategy with a task prior has no such trouble.",
            stacklevel=4,
        )
    info = {
        "converged": found.converged,
        "evaluations": mode.evaluations + found.evaluations,
        "unbounded": unbounded,
    }
    return theta, phi, info, mode.seconds_staging + found.seconds_staging
