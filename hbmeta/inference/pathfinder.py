"""Pathfinder over global and local sites together: a fast Gaussian look at the joint posterior.

Model: θ ~ p(θ), φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: Gaussians along L-BFGS paths on −log p(θ, φ_1, …, φ_T, y) in unconstrained space, every
site that can be non-centered in ε; their mixture's draws, resampled by Pareto-smoothed weights
(`hbmeta.pathfinder`).
New tasks: (θ_s, φ_s) with φ_s ~ p(φ | S_new, θ_s), weighted by p(S_new | θ_s), as under NUTS.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbmeta.conditional import conditional
from hbmeta.densities import Density, Empirical
from hbmeta.errors import DataError
from hbmeta.feeding import training_tasks
from hbmeta.fitted import Fitted
from hbmeta.importance import largest_k
from hbmeta.inference.adapting import adapt_by_importance, adapt_to_draws
from hbmeta.inference.nuts import require_priors
from hbmeta.inference.strategy import Strategy
from hbmeta.joint_density import check_gradient, staged_log_density, unpack
from hbmeta.parametrisation import Coordinates
from hbmeta.pathfinder import HISTORY, ITERATIONS, Paths, find_paths
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.starts import spread_starts
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options

__all__ = ["Pathfinder"]


@dataclass(frozen=True)
class Pathfinder(Strategy):
    """Draws of a mixture of Gaussians with low-rank covariances, weighted to the joint posterior.

    Keeps p(θ), p(φ | θ) and p(y | φ, θ) in the weights; approximates p(θ, φ | y). Exact where the
    joint density is Gaussian, with a history no shorter than it has dimensions. k̂ in
    `info["pareto_k"]` says whether the weights can be relied on; where not, there is a warning, and
    the draws are those of the path with the largest ELBO, unweighted. That is common from some
    dozen dimensions on: use NUTS, which can start from here (`NUTS(initial="pathfinder")`).

    Args:
        paths: searches, each from a start of its own.
        draws: of each path, and as many are kept in all.
        history: pairs of steps and gradients that a covariance is built from.
        iterations: of a search, at most.
    References:
        Zhang, Carpenter, Gelman, Vehtari (2022), JMLR 23(306).
    """

    learns_spread: ClassVar[bool] = False

    paths: int = 4
    draws: int = 1000
    history: int = HISTORY
    iterations: int = ITERATIONS

    def __post_init__(self) -> None:
        least = {"paths": 1, "draws": 100, "history": 1, "iterations": 1}
        for name, number in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < number:
                raise DataError(
                    self.name,
                    needed=f"{name} as a whole number of {number} or more",
                    found=f"{name}={value!r}",
                    do="Leave it out for the default.",
                )

    def suited(self, problem: Problem, known: Tasks) -> Strategy:
        """Itself: θ is drawn."""
        return self

    def check(self, problem: Problem) -> None:
        """Every level-1 parameter needs a prior."""
        require_priors(problem, self.name)

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """Runs the searches on all rows of the tasks."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(tasks)
        theta = problem.theta(batch)
        coordinates = Coordinates.of(problem, batch, "auto", self.name)
        potential, seconds_staging = staged_log_density(
            problem,
            batch,
            theta,
            "graph" if options.tier == "auto" else options.tier,
            self.paths * (self.draws + 1000),
            coordinates,
            falls_back=options.tier == "auto",
        )
        starts = spread_starts(
            problem, batch, theta, potential, coordinates, count=self.paths, seed=options.seed
        )
        if problem.dtype == torch.float64:
            check_gradient(potential, starts[0], problem.name)
        found = find_paths(
            potential,
            starts,
            draws=self.draws,
            seed=options.seed,
            history=self.history,
            iterations=self.iterations,
            where=f"{self.name}.fit",
        )
        info, points = self._kept(found, options.seed)
        drawn, phi = unpack(problem, points.to(batch.x), tasks.n_tasks)
        if coordinates is not None:
            phi, _ = coordinates.many({**theta, **drawn}, bool(drawn), phi, batch)
            info["parametrisation"] = coordinates.describe()
        return Learned(
            theta={**theta, **drawn},
            drawn=bool(problem.sites.globals),
            density=Empirical(phi),
            info=info,
            seconds_staging=seconds_staging,
        )

    def _kept(self, found: Paths, seed: int) -> tuple[dict[str, Any], Tensor]:
        """Info, and draws with equal weights."""
        threshold = largest_k(len(found.draws))
        usable = found.pareto_k <= threshold
        elbos = [float(path.elbos.max()) for path in found.paths]
        info: dict[str, Any] = {
            "pareto_k": found.pareto_k,
            "threshold": threshold,
            "weighted": usable,
            "log_evidence": found.log_evidence,
            "elbos": elbos,
            "gradients": sum(path.evaluations for path in found.paths) + len(found.draws),
            "parametrisation": "as written",
        }
        if usable:
            return info, found.resampled(self.draws, seed, replacement=True)
        warnings.warn(
            f"{self.name}: Pareto k̂ is {found.pareto_k:.2f}, above {threshold:.2f}: the Gaussians "
            "are too far from the joint posterior for weights to correct them, so that these are "
            "the draws of the best of them. Use NUTS(initial='pathfinder').",
            stacklevel=5,
        )
        best = max(range(len(elbos)), key=elbos.__getitem__)
        return info, found.draws[best * self.draws : (best + 1) * self.draws]

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Density:
        """p(φ | S, θ) at a point θ, by importance sampling from its expansion at the mode."""
        return conditional(problem, theta, support)[0]

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """Weighted draws of (θ, φ) for new tasks; tasks of the fit keep its draws."""
        adapt = adapt_to_draws if fitted.drawn else adapt_by_importance
        return adapt(fitted, support, seed)
