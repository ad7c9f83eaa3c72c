"""The base of the Bayesian gradient lens: inner gradient steps on more than one point of φ.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Members take N steps of an inner optimizer from what the task prior gives, as MAML does, but end
with a distribution: a Gaussian (`ABML`), particles that push each other apart (`BMAML`), or where
descent ends from random starts (`PLATIPUS`). Here is what they share: the settings of the steps,
the loop, the program at many φ at once, and random numbers that come in as inputs.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from hbmeta.densities import Density, Gaussian
from hbmeta.errors import DataError
from hbmeta.inference.gradient_descent import one_step
from hbmeta.inference.inner_optimizers import (
    InnerOptimizer,
    InnerOptimizerName,
    Leaves,
    inner_optimizer,
)
from hbmeta.inference.strategy import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta
from hbmeta.tasks import Tasks

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

Noise = Mapping[str, Tensor]

__all__ = ["BayesianGradient", "Noise"]


@dataclass(frozen=True)
class BayesianGradient(Strategy):
    """Settings of the inner steps; see the module's docstring.

    Args:
        steps: N, inner steps.
        step_size: α.
        reduction: "mean" (what is descended on is divided by the number of support points, so that
            α fits any number of them) or "sum". Both have the same minimum.
        optimizer: of the inner steps: "descent", "momentum" or "adam".
        momentum: μ of "momentum".
    """

    steps: int = 5
    step_size: float = 0.01
    reduction: Literal["mean", "sum"] = "mean"
    optimizer: InnerOptimizerName = "descent"
    momentum: float = 0.9

    seeks_mode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_whole("steps", 0)
        self.require_number("step_size", 0.0, math.inf)
        self.require_number("momentum", 0.0, 1.0)
        self.require_among("reduction", ("mean", "sum"))
        self.require_among("optimizer", ("descent", "momentum", "adam"))

    def adaptable(self) -> tuple[str, ...]:
        """Those of the steps."""
        return ("steps", "step_size", "reduction", "optimizer", "momentum")

    # -- checks of settings -----------------------------------------------------------------------

    def require_whole(self, name: str, least: int) -> None:
        """Raises DataError unless the setting is a whole number of at least so many."""
        value = getattr(self, name)
        if type(value) is not int or value < least:
            raise self._bad(name, f"a whole number of {least} or more")

    def require_number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        """Raises DataError unless low ≤ setting < high (low < setting, if `above`)."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value < high or (above and value == low):
            upper = "a finite number" if high == math.inf else f"a number below {high:g}"
            raise self._bad(name, f"{upper}, {'above' if above else 'at least'} {low:g}")

    def require_among(self, name: str, known: tuple[object, ...]) -> None:
        """Raises DataError unless the setting is one of these."""
        # By repr: 1 is no True, and a tensor has no truth.
        if repr(getattr(self, name)) not in map(repr, known):
            raise self._bad(name, f"one of {', '.join(map(repr, known))}")

    def _bad(self, name: str, needed: str) -> DataError:
        return DataError(
            self.name,
            needed=f"{name} as {needed}",
            found=f"{name}={getattr(self, name)!r}",
            do="Leave it out for the default.",
        )

    # -- what a member writes ---------------------------------------------------------------------

    @abc.abstractmethod
    def given(
        self, problem: Problem, theta: Theta, own: Any, support: Batch, noise: Noise
    ) -> Density:
        """q(φ | S) of a new task, with the random numbers of `adapting_noise`."""

    def adapting_noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the standard normal draws that adapting takes; those of the loss by default."""
        return self.noise(problem, n_tasks)

    # -- what members share -----------------------------------------------------------------------

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Density:
        """q(φ | S) with the random numbers of seed 0."""
        return self.given(problem, theta, own, support, self._drawn(problem, support, 0))

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """q(φ | S) of new tasks; `seed` is that of the random numbers, if there are any."""
        problem = fitted.problem
        batch = problem.batch(support)
        noise = self._drawn(problem, batch, seed)
        with torch.no_grad():
            density = self.given(problem, fitted.theta, fitted.own, batch, noise)
        density = density.detach() if isinstance(density, Gaussian) else density
        self._check_finite(density, support)
        return TaskPosterior(problem, fitted.theta, density, support, units=fitted.units)

    def _drawn(self, problem: Problem, batch: Batch, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = self.adapting_noise(problem, batch.n_tasks)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(batch.x)
            for name, shape in shapes.items()
        }

    def points(self, batch: Batch) -> Tensor:
        """(tasks,) what the objective of a task is divided by."""
        counts = batch.counts
        return counts.clamp_min(1.0) if self.reduction == "mean" else torch.ones_like(counts)

    def descended(
        self,
        objective: Callable[[Leaves], Tensor],
        start: Leaves,
        *,
        optimizer: InnerOptimizer | None = None,
        steps: int | None = None,
    ) -> Leaves:
        """N steps down an objective (..., tasks); differentiable where gradients are on."""
        rule = inner_optimizer(self.optimizer, self.momentum) if optimizer is None else optimizer
        history, rates = torch.is_grad_enabled(), [self.step_size] * len(start)
        state = rule.start(start)
        for number in range(self.steps if steps is None else steps):
            state = one_step(objective, state, rates, number, optimizer=rule, history=history)
        return state[0]

    @staticmethod
    def over(function: Callable[[Phi], Tensor], phi: Phi) -> Tensor:
        """(draws, tasks) a function φ ↦ (tasks,) at φ (draws, tasks, *shape) by site."""
        # One draw needs no mapping, and its graph is that of a point estimate.
        if next(iter(phi.values())).shape[0] == 1:
            return function({name: value[0] for name, value in phi.items()}).unsqueeze(0)
        found: Tensor = torch.vmap(function)(phi)
        return found
