"""The base of stochastic-gradient MCMC: draws of φ_i from p(φ | S_i, θ), θ by Fisher's identity.

Model: θ ~ p(θ) or a parameter, φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator of φ: chains of a transition (`SGLD`, `SGHMC`) on gradients of mini-batches, whose
stationary law differs from p(φ | S_i, θ) by a bias of the order of the step size.
Estimator of θ: with chains that go on while θ moves,

    ∇ log p(y | θ) = E_{φ | y, θ} ∇_θ log p(y, φ | θ)        (Fisher's identity)

is estimated by the mean over the chains, log p(θ) is added once, and the learning rate falls to
zero: stochastic approximation by an unadjusted Langevin chain (SOUL). θ is the maximum of
log p(y | θ) + log p(θ), up to the chains' bias, in unconstrained space.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import arviz
import numpy as np
import torch
from torch import Tensor, nn

from hbmeta.densities import Density, Empirical
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.feeding import Needs
from hbmeta.inference.strategy import Strategy
from hbmeta.inference.task_chains import State, TaskChains
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Staged, Tier
from hbmeta.tasks import Episode, Tasks, TaskSet
from hbmeta.training import Learned, MetaGradient, Options, mean_over_queries

# Transitions between two steps of θ, and steps of θ between two looks at the curvature.
_MOVES = 4
_REFRESH = 50
# Parts of the warm-up, each in units of the curvature where the last one ended.
_PARTS = 4
# While the units are being found, gradients in z are cut here: no draw of a posterior with the
# curvature of its mode has one as large (10 standard deviations).
_LIMIT = 10.0
# Split R̂ above this is warned of; chains of correlated draws rarely get below NUTS's 1.01.
_WORST_R_HAT = 1.05

# No posterior of a curvature that is of any use is so many units of it wide.
_FAR = 1e6

__all__ = ["StochasticGradientStrategy"]


@dataclass(frozen=True)
class StochasticGradientStrategy(Strategy):
    """Draws of φ by stochastic-gradient MCMC; see the module's docstring and the members.

    Args:
        step_size: in units in which the largest curvature of a task is 1.
        draws: kept per chain.
        warmup: transitions before them.
        thin: transitions per draw.
        chains: per task.
        rows: rows of a task's mini-batch, drawn without replacement for each transition and chain;
            None for all of them.
    """

    needs: ClassVar[Needs] = "subset"
    joint_loss: ClassVar[bool] = True

    step_size: float = 0.1
    draws: int = 250
    warmup: int = 500
    thin: int = 10
    chains: int = 4
    rows: int | None = None

    def __post_init__(self) -> None:
        counts = {n: getattr(self, n) for n in ("draws", "warmup", "thin", "chains", "rows")}
        whole = all(
            (type(n) is int and n >= 1) or (k == "rows" and n is None) for k, n in counts.items()
        )
        if not whole or not _is_positive(self.step_size):
            raise DataError(
                self.name,
                needed="whole draws, warmup, thin, chains (and rows) of 1 or more, and a finite "
                "step_size above 0",
                found=str(self.settings()),
                do=f"The default step_size is {type(self).step_size}; rows=None takes all rows.",
            )

    # -- what a member writes ---------------------------------------------------------------------

    @abc.abstractmethod
    def move(self, state: State, gradient: Tensor, noise: Tensor, scale: Tensor) -> State:
        """One transition; see `hbmeta.inference.task_chains.Transition`."""

    @abc.abstractmethod
    def start(self, phi: Tensor) -> State:
        """The state of chains at φ (chains, tasks, phi_size)."""

    # -- what nobody overrides --------------------------------------------------------------------

    def adaptable(self) -> tuple[str, ...]:
        """All settings."""
        return tuple(self.settings())

    def check(self, problem: Problem) -> None:
        """Mini-batches need points that are independent given φ."""
        if self.rows is not None and problem.layout == "joint":
            raise UnsupportedModelError(
                self.name,
                needed="points that are independent given φ, for mini-batches of them",
                found=f"the joint layout of {problem.name}",
                do="Leave rows out to use all points of a task.",
            )

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ by stochastic approximation; chains belong to tasks that stay."""
        source = not isinstance(data, Tasks | TaskSet | Episode)
        if source or options.tasks_per_step is not None or options.checkpoint is not None:
            raise DataError(
                f"{self.name}.fit",
                needed="the same tasks at every step, because each has chains that go on",
                found="a source that draws new ones"
                if source
                else "tasks_per_step"
                if options.tasks_per_step is not None
                else "a checkpoint, which holds no chains",
                do="Pass Tasks or a TaskSet, and leave tasks_per_step and checkpoint out.",
            )
        return super().learn(problem, data, options)

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal numbers of the transitions of a step."""
        return {"moves": (_MOVES, self.chains, n_tasks, problem.sites.phi_size)}

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) −log p(y, φ | θ) at chains that start; `meta_gradient` has those that go on."""
        phi = problem.location(theta, query).detach() + noise["moves"][0]
        return _mean_joint(problem, theta, phi, query)

    def meta_gradient(
        self, problem: Problem, own: nn.Module | None, options: Options
    ) -> MetaGradient:
        """Fisher's identity along the chains."""
        return _Fisher(self, problem, options)

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Density:
        """Draws of all chains, one after the other (chains · draws, tasks, phi_size)."""
        return Empirical(self._draws(problem, theta, support, seed=0)[0].flatten(0, 1))

    def adapt(self, fitted: Any, support: Tasks, seed: int) -> TaskPosterior:
        """Draws of φ at the fitted θ; the info holds r_hat and ess_bulk, (tasks, phi_size)."""
        problem: Problem = fitted.problem
        found, scale = self._draws(problem, fitted.theta, problem.batch(support), seed=seed)
        density = Empirical(found.flatten(0, 1))
        self._check_finite(density, support)
        self._check_near(found, scale, support)
        info = _mixing(found)
        self._warn(info, support)
        return TaskPosterior(
            problem,
            fitted.theta,
            density,
            support,
            chains=self.chains,
            info=info,
            units=fitted.units,
        )

    def _draws(
        self, problem: Problem, theta: Theta, batch: Batch, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        """(chains, draws, tasks, phi_size), and the d that they were drawn with."""
        theta = {name: value.detach() for name, value in theta.items()}
        moves = self.warmup + self.draws * self.thin
        chains = TaskChains(
            problem, batch, self, rows=self.rows, tier=problem.tier, moves=moves, seed=seed + 1
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            phi = problem.location(theta, batch)
        scale = chains.scale(theta, phi)
        shape = (self.chains, *phi.shape)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(phi)

        state = self.start(phi + scale * draw())
        part = max(self.warmup // _PARTS, 1)
        for number in range(self.warmup):
            if number and number % part == 0:
                scale = chains.scale(theta, state[0].mean(0))
            state = chains.step(theta, state, scale, draw(), _LIMIT)
        kept = phi.new_empty(self.chains, self.draws, *phi.shape)
        for number in range(self.draws * self.thin):
            state = chains.step(theta, state, scale, draw())
            if (number + 1) % self.thin == 0:
                kept[:, number // self.thin] = state[0]
        return kept, scale

    def _check_near(self, draws: Tensor, scale: Tensor, support: Tasks) -> None:
        """Raises where a step of this size has no stationary law: draws double and double again."""
        reach = ((draws - draws[:, :1].mean(0)) / scale).abs().amax((0, 1, 3))
        if bool((reach > _FAR).any()):
            named = support.ids[int(reach.argmax())]
            raise ConvergenceError(
                self.name,
                needed="chains that stay where the posterior is",
                found=f"draws of task {named!r} up to {float(reach.max()):.2g} units of its "
                "curvature apart",
                do=f"Lower step_size (now {self.step_size:g})"
                + ("." if self.rows is None else ", or raise rows."),
            )

    def _warn(self, info: Mapping[str, Tensor], support: Tasks) -> None:
        r_hat = info.get("r_hat")
        if r_hat is None or self.chains < 2:
            return
        # NaN (chains that never moved) must not pass.
        worst = r_hat.nan_to_num(math.inf).amax(-1)
        if bool((worst > _WORST_R_HAT).any()):
            named = support.ids[int(worst.argmax())]
            warnings.warn(
                f"{self.name}: split R̂ of task {named!r} is {float(worst.max()):.3f} (above "
                f"{_WORST_R_HAT}; {int((worst > _WORST_R_HAT).sum())} of {len(worst)} tasks). "
                "Raise warmup and thin.",
                stacklevel=4,
            )


class _Fisher:
    """The mean over chains of −∇_θ log p(y, φ | θ), the chains going on from call to call."""

    def __init__(
        self, strategy: StochasticGradientStrategy, problem: Problem, options: Options
    ) -> None:
        self.strategy, self.problem, self.options = strategy, problem, options
        self.chains: TaskChains | None = None
        self.state: State = ()
        self.scale = torch.zeros(())
        self.calls = 0

        def value_and_gradient(
            theta: Theta, phi: Tensor, rows: Batch
        ) -> tuple[Tensor, list[Tensor]]:
            leaves = {k: v.detach().requires_grad_() for k, v in theta.items()}
            loss = mean_over_queries(_mean_joint(problem, leaves, phi, rows), rows)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            pairs = zip(found, leaves.values(), strict=True)
            return loss.detach(), [torch.zeros_like(v) if g is None else g for g, v in pairs]

        self.gradient = Staged(
            value_and_gradient,
            tier=options.tier,
            expected_calls=options.steps,
            check_every=max(options.steps // 4, 1),
        )

    @property
    def tier(self) -> Tier:
        """Of the gradient of θ."""
        return self.gradient.tier

    @property
    def seconds_staging(self) -> float:
        """Of the transition and the gradient of θ."""
        moves = 0.0 if self.chains is None else self.chains.staged.seconds_staging
        return self.gradient.seconds_staging + moves

    def __call__(
        self,
        theta: Theta,
        own: Mapping[str, Tensor],
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Moves the chains at this θ, and gives the gradient there; see `MetaGradient`."""
        moves = noise["moves"]
        if self.chains is None:
            self.chains = TaskChains(
                self.problem,
                query,
                self.strategy,
                rows=self.strategy.rows,
                tier=self.options.tier,
                moves=_MOVES * self.options.steps,
                seed=self.options.seed + 1,
            )
            with torch.no_grad():
                phi = self.problem.location(theta, query)
            self.scale = self.chains.scale(theta, phi)
            self.state = self.strategy.start(phi + self.scale * moves[0])
        elif self.calls % _REFRESH == 0:
            self.scale = self.chains.scale(theta, self.state[0].mean(0))
        self.calls += 1
        for each in moves:
            self.state = self.chains.step(theta, self.state, self.scale, each, _LIMIT)
        loss, found = self.gradient(theta, self.state[0], query)
        return loss, {f"theta/{k}": g for k, g in zip(theta, found, strict=True)}

    def finish(self) -> dict[str, Any]:
        """Nothing beside what training records."""
        return {}


def _mean_joint(problem: Problem, theta: Theta, phi: Tensor, rows: Batch) -> Tensor:
    """(tasks,) mean over chains of −log p(y, φ | θ), φ (chains, tasks, phi_size)."""

    def log_joint(one: Tensor) -> Tensor:
        likelihood, local, _ = problem.terms(theta, one, rows)
        return likelihood + local

    values: Tensor = torch.vmap(log_joint)(phi)
    return -values.mean(0)


def _mixing(draws: Tensor) -> dict[str, Tensor]:
    """Rank-normalised split R̂ and bulk effective draws (tasks, phi_size) of (chains, draws, …)."""
    if draws.shape[1] < 4:
        return {}
    found = arviz.convert_to_dataset(draws.double().cpu().numpy())
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = {"ess_bulk": torch.from_numpy(arviz.ess(found)["x"].values.copy())}
        if draws.shape[0] > 1:
            info["r_hat"] = torch.from_numpy(arviz.rhat(found)["x"].values.copy())
    return info


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf
