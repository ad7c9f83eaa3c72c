"""The two baselines that every table needs: each task alone, and one φ for all.

Model: y_ij ~ p(y | φ_i, θ); the priors p(φ | θ) and p(θ) are dropped.
Estimator: maximum of Σ_i log p(y_i | φ_i, θ) over θ and either every φ_i (no pooling) or one
φ = φ_i for all i (complete pooling).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian, leave_saddle, maximise
from hbmeta.densities import Delta
from hbmeta.errors import UnsupportedModelError
from hbmeta.feeding import training_tasks
from hbmeta.inference.strategy import Strategy
from hbmeta.optimisation import Minimum, minimise
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, prior_scales

# In units of a prior's scale; a log scale that moved so far is on its way to infinity.
_FAR = 15.0
# A Newton step of this share of φ means that there is no maximum nearby.
_STILL_MOVING = 0.01
_DENSE_LIMIT = 64

__all__ = ["CompletePooling", "NoPooling"]


@dataclass(frozen=True)
class NoPooling(Strategy):
    """q(φ | S) = δ at the maximum of the task's own likelihood.

    Keeps p(y | φ, θ); replaces p(φ | θ) and p(θ) by flat priors. Level-1 parameters that all tasks
    share (a slope, a noise scale) are estimated together, as in Gelman and Hill's no-pooling
    regression; what the likelihood does not identify (the coefficient of a column that is constant
    within groups) is chosen by the joint mode. Exact as maximum likelihood. A task without data
    stays at the location of the prior; a likelihood without a maximum (all answers "yes") stops
    where `iterations` end.

    Args:
        iterations: Newton steps per task when adapting.
    References:
        Gelman, Hill (2007), Data Analysis Using Regression and Multilevel Models, §12.2.
    """

    learns_spread: ClassVar[bool] = False
    joint_loss: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = False

    iterations: int = 60

    def adaptable(self) -> tuple[str, ...]:
        """All settings."""
        return tuple(self.settings())

    def check(self, problem: Problem) -> None:
        """Few enough parameters per task for a dense curvature."""
        if problem.sites.phi_size > _DENSE_LIMIT:
            raise UnsupportedModelError(
                self.name,
                needed=f"at most {_DENSE_LIMIT} parameters per task (the curvature is dense)",
                found=str(problem.sites.phi_size),
                do="To fit each task from scratch, use MAML(steps=200) with "
                "fit(..., learning_rate=0), which leaves the start as it is.",
            )

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ and all φ_i together by L-BFGS."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)

        def spread(theta: Theta, free: Tensor, start: Tensor) -> Tensor:
            return start + free.reshape(start.shape)

        theta, phi, info, seconds = _fit(problem, tasks, options, self.name, spread, tasks.n_tasks)
        return Learned(theta, density=Delta(phi), info=info, seconds_staging=seconds)

    def adapt(self, fitted: Any, support: Tasks, seed: int) -> Any:
        """The maximum of each task's likelihood; warns of tasks whose likelihood has none."""
        found = super().adapt(fitted, support, seed)
        assert isinstance(found.density, Delta)
        problem, batch = fitted.problem, fitted.problem.batch(support)
        _warn_of_unbounded(
            f"{self.name}.adapt",
            _unbounded(problem, fitted.theta, found.density.loc, batch, support.ids),
        )
        return found

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

    Keeps p(y | φ, θ); replaces p(φ | θ) by a point shared by all tasks, and p(θ) by a flat prior.
    Exact as maximum likelihood of the pooled data.

    References:
        Gelman, Hill (2007), Data Analysis Using Regression and Multilevel Models, §12.2.
    """

    learns_spread: ClassVar[bool] = False
    joint_loss: ClassVar[bool] = True
    keeps_prior: ClassVar[bool] = False

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ and the common φ by L-BFGS."""
        tasks: Tasks = training_tasks(data, options.seed).to(
            device=problem.device, dtype=problem.dtype
        )

        def spread(theta: Theta, free: Tensor, start: Tensor) -> Tensor:
            return start[:1].expand(start.shape) + free

        theta, phi, info, seconds = _fit(problem, tasks, options, self.name, spread, 1)
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
    problem: Problem, tasks: Tasks, options: Options, name: str, spread: Any, n_free: int
) -> tuple[Theta, Tensor, dict[str, Any], float]:
    """θ and φ at the maximum of Σ log p(y | φ, θ), reached from the mode of the joint density.

    The likelihood alone does not choose between, say, an intercept of a group and the coefficient
    of a column that is constant within groups: any point of a ridge is a maximum. Coming from the
    mode of p(y, φ, θ), the search keeps the point of the ridge that the priors like, because a
    ridge has no slope along itself.
    """
    batch, ids = problem.batch(tasks), tasks.ids
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

    def lowest(objective: Any, start: Tensor) -> Minimum:
        """Its minimum; a saddle in φ, where a search has no gradient to follow, is left."""
        found = minimise(objective, start, where=where, tier=options.tier)
        fixed, free = found.point.split([sum(sizes), n_free * phi_size])
        if phi_size > _DENSE_LIMIT:
            return found
        moved = leave_saddle(
            lambda p: -n_rows * objective(torch.cat([fixed, p.reshape(-1)])),
            free.reshape(n_free, phi_size),
            seed=options.seed,
        ).reshape(-1)
        if torch.equal(moved, free):
            return found
        start = torch.cat([fixed, moved])
        again = minimise(objective, start, where=where, tier=options.tier)
        return again if again.value < found.value else found

    mode = lowest(minus_joint, first)
    found = lowest(minus_likelihood, mode.point)
    with torch.no_grad():
        theta, phi = unpack(found.point)
    theta, untouched = _reset_untouched(problem, theta, phi, batch, start)
    unbounded = _unbounded(problem, theta, phi, batch, ids) if n_free > 1 else []
    moved = (found.point - mode.point).split([*sizes, n_free * phi_size])
    if any(n in scales and float(m.abs().max()) > _FAR for n, m in zip(names, moved, strict=False)):
        unbounded.append("θ")
    _warn_of_unbounded(name, unbounded)
    info = {
        "converged": found.converged,
        "evaluations": mode.evaluations + found.evaluations,
        "unbounded": [str(i) for i in unbounded],
        "untouched": untouched,
    }
    return theta, phi, info, mode.seconds_staging + found.seconds_staging


def _reset_untouched(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, start: Theta
) -> tuple[Theta, list[str]]:
    """θ with what the likelihood is no function of back at its start, and the names of that.

    The scale of a centered prior fell to zero at the joint mode and says nothing.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
    if not leaves:
        return theta, []
    with torch.enable_grad():
        total = problem.log_likelihood(leaves, phi, batch).sum()
        if not total.requires_grad:
            return dict(start), list(leaves)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    untouched = [name for name, g in zip(leaves, gradients, strict=True) if g is None]
    return {name: start[name] if name in untouched else v for name, v in theta.items()}, untouched


def _unbounded(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, ids: tuple[Any, ...]
) -> list[Any]:
    """Tasks whose likelihood still rises: a Newton step at a maximum is nothing."""
    if phi.shape[-1] > _DENSE_LIMIT:
        return []
    _, gradient, hessian = gradient_and_hessian(
        lambda p: problem.log_likelihood(theta, p, batch), phi
    )
    size = hessian.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp_min(1e-30)
    identity = torch.eye(phi.shape[-1], dtype=phi.dtype, device=phi.device)
    damped = -hessian + 1e-9 * size[:, None, None] * identity
    step = torch.linalg.solve(damped, gradient.unsqueeze(-1)).squeeze(-1)
    rising = (step.abs() > _STILL_MOVING * (1.0 + phi.abs())).any(-1) & (batch.counts > 0)
    return [ids[int(i)] for i in rising.nonzero()]


def _warn_of_unbounded(where: str, unbounded: list[Any]) -> None:
    if unbounded:
        warnings.warn(
            f"{where}: the likelihood has no maximum for {_some(unbounded)} (as many parameters as "
            "points, or equal answers), so the estimate is where the search stopped. A strategy "
            "with a task prior has no such trouble.",
            stacklevel=5,
        )


def _some(names: list[Any]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
