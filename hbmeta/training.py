"""The one meta-training loop: a staged value and gradient, Adam, history, resume.

Minimises mean_i loss_i − log p(θ) / T over θ and the strategy's own parameters, the mean over the
tasks that can have a query row, of which there are T. Global sites move in units of their prior's
scale, so that one learning rate serves an intercept of 250 and a slope of 0.1; all that moves is
kept in float32 at least (`movement`). A θ that the data's loss does not touch is named in a warning
and stays where it is: its prior alone would pull it to a mode that means nothing.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hbmeta.course import Course
from hbmeta.curvature import gradient_and_hessian
from hbmeta.densities import Density
from hbmeta.feeding import Feed, training_tasks
from hbmeta.movement import Moving
from hbmeta.objective import MetaGradient, Objective, Pieces, Whole, mean_over_queries
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.resuming import Checkpoint, digest
from hbmeta.staging import Tier
from hbmeta.tasks import Tasks
from hbmeta.triangular import positive_definite_at

if TYPE_CHECKING:
    from hbmeta.inference.strategy import Strategy

__all__ = [
    "Learned",
    "MetaGradient",
    "Options",
    "Setup",
    "checkpoint_due",
    "identity",
    "mean_over_queries",
    "prior_scales",
    "shares",
    "show_progress",
    "standard_normal",
    "train",
]

_CHECKPOINT_EVERY = 500
# Where torch's Adam has one kernel for a step; elsewhere a few for all tensors together.
_FUSED = ("cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """How to fit; see `Strategy.fit`."""

    steps: int = 2000
    tasks_per_step: int | None = None
    learning_rate: float = 1e-3
    theta_learning_rate: float = 3e-2
    decay: bool = True
    seed: int = 0
    tier: Tier | Literal["auto"] = "auto"
    checkpoint: Any = None
    progress: bool | None = None


@dataclass
class Learned:
    """What learning found; see `Fitted` for the fields."""

    theta: Theta
    own: nn.Module | None = None
    drawn: bool = False
    density: Density | None = None
    history: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    seconds_staging: float = 0.0
    chains: int = 1


def show_progress(progress: bool | None) -> bool:
    """Whether to draw a progress bar: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def standard_normal(
    shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator, like: Tensor
) -> dict[str, Tensor]:
    """Draws of these shapes, the same numbers in every dtype and on every device."""
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
        for name, shape in shapes.items()
    }


def prior_scales(problem: Problem, theta: Theta, batch: Batch) -> Theta:
    """1/√curvature of log p(θ) at its location, per coordinate; 1 where that is not positive."""
    sites = problem.sites
    if not sites.globals:
        return {}
    start = sites.theta_to_vector(theta).unsqueeze(0)

    def function(vector: Tensor) -> Tensor:
        return problem.log_prior({**theta, **sites.theta_from_vector(vector[0])}, batch).unsqueeze(
            0
        )

    _, _, hessian = gradient_and_hessian(function, start)
    curvature = -hessian[0].diagonal()
    scale = torch.where(
        curvature > 1e-12, curvature.clamp_min(1e-12).rsqrt(), torch.ones_like(curvature)
    )
    return sites.theta_from_vector(scale)


class Setup:
    """Where a fit starts: what moves, what is minimised, and the first step's tasks.

    Args:
        strategy: a strategy that is trained.
        problem: the program on its data.
        data: what `fit` was given.
        options: of the fit.
    Attributes:
        untouched: θ that the loss does not depend on; it does not move.
    """

    def __init__(self, strategy: Strategy, problem: Problem, data: Any, options: Options) -> None:
        self.strategy, self.problem, self.options = strategy, problem, options
        self.tasks = training_tasks(data, options.seed).to(
            device=problem.device, dtype=problem.dtype
        )
        batch = problem.batch(self.tasks)
        own = strategy.parameters(problem, self.tasks, options.seed)
        self.own = own if own is None else own.to(device=problem.device, dtype=problem.dtype)
        self.feed = Feed(
            data,
            problem.layout,
            strategy.needs,
            options.tasks_per_step,
            options.seed,
            problem.device,
            problem.dtype,
        )
        self.theta = problem.theta(batch)
        self.moving = Moving(self.theta, prior_scales(problem, self.theta, batch), self.own)
        self.untouched: list[str] = []
        if not self.moving.free:
            return
        self.first = self.feed.step(0)
        self.generator = torch.Generator()
        self._shapes = strategy.noise(problem, self.first[0].n_tasks)
        n_tasks = self.feed.n_contributing or options.steps * self.first[1].n_tasks
        self.objective = Objective(strategy, problem, self.moving, n_tasks)
        self.rewind()
        found = self.objective.untouched(*self.first, self.noise())
        self.moving.fix(found)
        self.untouched = [name.removeprefix("theta/") for name in found]
        self.rewind()

    def rewind(self) -> None:
        """Lets the noise begin anew."""
        self.generator.manual_seed(self.options.seed + 1)

    def noise(self) -> dict[str, Tensor]:
        """The next random numbers that the loss takes."""
        return standard_normal(self._shapes, self.generator, self.first[0].x)

    def gradient(self, pieces: MetaGradient | None, steps: int) -> Whole | Pieces:
        """Value and gradient of the objective, staged for so many steps."""
        tier = self.options.tier
        if pieces is None:
            return Whole(self.objective, tier=tier, steps=steps)
        return Pieces(self.objective, pieces, self.first[1], tier=tier, steps=steps)


def train(strategy: Strategy, problem: Problem, data: Any, options: Options) -> Learned:
    """Adam on the strategy's loss; see the module's docstring.

    Raises:
        ConvergenceError: the loss became NaN or infinite; names the step.
        FileError: the checkpoint belongs to another fit.
    """
    setup = Setup(strategy, problem, data, options)
    moving, names = setup.moving, setup.untouched
    if names:
        warnings.warn(
            f"{strategy.name}: the loss does not depend on {', '.join(names)}, so it stays at its "
            "prior's location. A non-centered program or another strategy would learn it.",
            stacklevel=4,
        )
    if not moving.free:
        # A program with θ given, or a loss without it, and a strategy that learns nothing else.
        return Learned(theta=setup.theta, own=setup.own, info={"untouched": names})
    optimizer = _adam(moving, options)
    checkpoint = None
    done = torch.zeros(0, dtype=torch.float64)
    if options.checkpoint is not None:
        whose = identity(options, strategy, problem, setup.tasks)
        checkpoint = Checkpoint(options.checkpoint, whose)
        done = checkpoint.resume(moving.free, optimizer, setup.generator)
    pieces = strategy.meta_gradient(problem, setup.own, options)
    gradient = setup.gradient(pieces, options.steps - len(done))
    rates = shares(options)
    course = Course(
        strategy.name, rates, done, moving.scaled, progress=show_progress(options.progress)
    )
    whole_rates = [group["lr"] for group in optimizer.param_groups]
    free = list(moving.free.values())
    for number, share in enumerate(rates.tolist()[len(done) :], start=len(done)):
        with positive_definite_at(f"{strategy.name}.fit", f"at training step {number}"):
            loss, found = gradient(*setup.feed.step(number), setup.noise())
        for value, one in zip(free, found, strict=True):
            # Copied: a compiled graph may return another order in memory than Adam walks along.
            value.grad.copy_(one)  # type: ignore[union-attr]
        for group, rate in zip(optimizer.param_groups, whole_rates, strict=True):
            group["lr"] = rate * share
        optimizer.step()
        course.record(loss)
        if checkpoint is not None and checkpoint_due(number):
            checkpoint.save(moving.free, optimizer, course.so_far(), setup.generator)
    info = {"untouched": names, "still_moving": course.finish(), "tier": gradient.tier}
    return Learned(
        theta=moving.settle(),
        own=setup.own,
        history=course.losses.tolist(),
        info=info | ({} if pieces is None else pieces.finish()),
        seconds_staging=gradient.seconds_staging,
    )


def _adam(moving: Moving, options: Options) -> torch.optim.Adam:
    """Adam on what moves, with gradients that stand in the same order in memory."""
    scaled = moving.scaled
    groups = [
        {"params": list(scaled.values()), "lr": options.theta_learning_rate},
        {
            "params": [v for k, v in moving.free.items() if k not in scaled],
            "lr": options.learning_rate,
        },
    ]
    for value in moving.free.values():
        value.grad = torch.zeros_like(value)
    fused = next(iter(moving.free.values())).device.type in _FUSED
    return torch.optim.Adam([g for g in groups if g["params"]], fused=fused, foreach=not fused)


def shares(options: Options) -> Tensor:
    """(steps,) the share of the learning rates that each step is taken with."""
    number = torch.arange(options.steps, dtype=torch.float64)
    if not options.decay:
        return torch.ones_like(number)
    return 0.5 * (1 + torch.cos(math.pi * number / options.steps))


def checkpoint_due(number: int) -> bool:
    """Whether a checkpoint is written after step `number`."""
    return (number + 1) % _CHECKPOINT_EVERY == 0


def identity(
    options: Options, strategy: Strategy, problem: Problem, tasks: Tasks
) -> dict[str, Any]:
    """What tells one fit from another: strategy, program, data and the settings of the training."""
    return {
        "strategy": strategy.name,
        "settings": strategy.settings(),
        "program": problem.name,
        "steps": options.steps,
        "tasks_per_step": options.tasks_per_step,
        "learning_rate": options.learning_rate,
        "theta_learning_rate": options.theta_learning_rate,
        "decay": options.decay,
        "seed": options.seed,
        "data": digest(tasks),
    }
