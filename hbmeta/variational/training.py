"""Adam on minibatches of tasks that have numbers of their own.

Minimises mean_i ℓ_i(λ_i, θ) − log p(θ) / T, of which a minibatch is an unbiased estimate. A step
moves θ and the λ of its own tasks alone, whose moments and number of steps stand in tables beside
λ: a task that is not in a step is as if the step had not been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbmeta.course import Course
from hbmeta.families import Frame
from hbmeta.feeding import taken
from hbmeta.movement import Moving
from hbmeta.program import Batch
from hbmeta.resuming import Checkpoint
from hbmeta.staging import Staged, Tier
from hbmeta.training import (
    Options,
    checkpoint_due,
    shares,
    show_progress,
    standard_normal,
)
from hbmeta.variational.search import Guide

_MEAN, _SQUARE, TINY = 0.9, 0.999, 1e-8

__all__ = [
    "TINY",
    "Adam",
    "Trained",
    "learning_rates",
    "tasks_of_step",
    "train_guide",
    "untouched_by",
]


@dataclass(frozen=True)
class Trained:
    """Where training ended.

    Attributes:
        shared: what tasks share.
        rows: (tasks, row_size) λ.
        losses: (steps,).
        still_moving: names of what had far to go; see `hbmeta.course`.
        seconds_staging: of tracing and compiling.
    """

    shared: dict[str, Tensor]
    rows: Tensor
    losses: list[float]
    still_moving: list[str]
    seconds_staging: float
    tier: Tier


class Adam:
    """Adam of one tensor; with `rows`, of those of its rows that are in a step."""

    def __init__(self, value: Tensor, rate: float, floor: float, *, rows: bool) -> None:
        self.value, self.rate, self.floor = value, rate, floor
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)
        self.count = torch.zeros(value.shape[0] if rows else 1, device=value.device)

    @property
    def state(self) -> dict[str, Tensor]:
        """What moves with every step, by name; the tensors themselves."""
        names = ("value", "mean", "square", "count")
        return {name: getattr(self, name) for name in names}

    def step(self, gradient: Tensor, share: float, chosen: Tensor | None) -> None:
        """One step down the gradient, of the rows that are chosen."""
        at: Any = ... if chosen is None else chosen
        self.count[at] += 1
        mean = self.mean[at] + (1 - _MEAN) * (gradient - self.mean[at])
        square = self.square[at] + (1 - _SQUARE) * (gradient.square() - self.square[at])
        self.mean[at], self.square[at] = mean, square
        count = self.count[at].to(gradient.dtype)
        count = count.reshape(-1, *(1,) * (gradient.ndim - 1)) if gradient.ndim else count.squeeze()
        upright = mean / (1 - _MEAN**count)
        size = (square / (1 - _SQUARE**count)).sqrt() + self.floor
        self.value[at] = self.value[at] - share * self.rate * upright / size


def train_guide(
    name: str,
    guide: Guide,
    shared: Mapping[str, Tensor],
    rows: Tensor,
    frame: Frame,
    batch: Batch,
    options: Options,
    *,
    rates: Mapping[str, float],
    row_rate: float,
    row_floor: float,
    watched: Mapping[str, Tensor],
) -> Trained:
    """Adam on the guide's bound, with fresh noise at every step.

    Args:
        name: of the strategy, for messages.
        guide: the bound.
        shared: what tasks share. Those that `rates` names move, in place.
        rows: (tasks, row_size) where λ starts.
        frame: of each task.
        batch: rows of all tasks.
        options: of the fit: steps, tasks_per_step, seed, decay, tier, progress; its checkpoint is
            a `hbmeta.resuming.Checkpoint`, or None.
        rates: learning rates of what moves of `shared`.
        row_rate: that of λ.
        row_floor: added to the root of the mean square of a gradient in λ, in nats per unit. With
            `row_rate` itself steps become those of gradient descent with rate 1 once gradients are
            smaller than that: where λ is in units of q, and its curvature near 1, they end at an
            optimum without noise, where Adam's own would go on in steps of the rate.
        watched: tensors whose path says whether they were still moving at the end.
    Raises:
        ConvergenceError: the bound became infinite or NaN; names the step.
        FileError: the checkpoint belongs to another fit.
    """
    shared = {k: v if k in rates else v.detach() for k, v in shared.items()}
    rows = rows.detach().clone()
    names = list(rates)
    n_tasks = rows.shape[0]
    each = options.tasks_per_step or n_tasks

    def value_and_gradient(
        shared: dict[str, Tensor],
        rows: Tensor,
        loc: Tensor,
        scale: Tensor,
        batch: Batch,
        noise: dict[str, Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        leaves = {k: v.detach().requires_grad_(k in rates) for k, v in shared.items()}
        rows = rows.detach().requires_grad_()
        losses, prior = guide.terms(leaves, rows, Frame(loc, scale), batch, noise, fixed=False)
        loss = losses.mean() + prior / n_tasks
        wanted = [*(leaves[k] for k in names), rows]
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        gradients = [
            torch.zeros_like(v) if g is None else g for v, g in zip(wanted, found, strict=True)
        ]
        return loss.detach(), gradients

    staged = Staged(
        value_and_gradient,
        tier=options.tier,
        expected_calls=options.steps,
        check_every=max(options.steps // 4, 1),
    )
    optimisers = [Adam(shared[k], rates[k], TINY, rows=False) for k in names]
    own = Adam(rows, row_rate, row_floor, rows=True)
    rates_of_steps = shares(options)
    shapes = guide.noise_shapes(each)
    generator = torch.Generator().manual_seed(options.seed + 1)
    state = {
        f"{label}/{key}": value
        for label, adam in zip([*names, "rows"], [*optimisers, own], strict=True)
        for key, value in adam.state.items()
    }
    checkpoint: Checkpoint | None = options.checkpoint
    done = torch.zeros(0)
    if checkpoint is not None:
        kept, done = checkpoint.take_up(state, generator)
        for label, value in kept.items():
            state[label].copy_(value)
    course = Course(name, rates_of_steps, done, watched, progress=show_progress(options.progress))
    for number, share in enumerate(rates_of_steps.tolist()[len(done) :], start=len(done)):
        chosen = tasks_of_step(number, options, n_tasks, each)
        part, some, at = batch, frame, chosen
        if chosen is not None:
            at = chosen.to(batch.x.device)
            part, some = taken(batch, at), frame.select(at)
        loss, gradients = staged(
            shared,
            rows if at is None else rows[at],
            some.loc,
            some.scale,
            part,
            standard_normal(shapes, generator, batch.x),
        )
        for optimiser, gradient in zip(optimisers, gradients[:-1], strict=True):
            optimiser.step(gradient, share, None)
        # Of each task's own loss, not of the mean.
        own.step(each * gradients[-1], share, at)
        course.record(loss)
        if checkpoint is not None and checkpoint_due(number):
            checkpoint.keep(state, course.so_far(), generator)
    moving = course.finish()
    return Trained(
        dict(shared), rows, course.losses.tolist(), moving, staged.seconds_staging, staged.tier
    )


def learning_rates(moving: Moving, options: Options) -> dict[str, float]:
    """Of what moves: theta_learning_rate for global sites, learning_rate for module parameters."""
    return {
        name: options.theta_learning_rate if name in moving.scaled else options.learning_rate
        for name in moving.free
    }


def untouched_by(
    guide: Guide, moving: Moving, rows: Tensor, frame: Frame, batch: Batch
) -> list[str]:
    """θ that the bound is no function of, found from one eager gradient; it is fixed in `moving`.

    Its prior alone would pull it to a mode that means nothing.
    """
    leaves = {k: v.detach().clone().requires_grad_() for k, v in moving.free.items()}
    if not leaves:
        return []
    noise = guide.fixed_noise(2, 0, rows)
    losses, _ = guide.terms(leaves, rows, frame, batch, noise, fixed=True)
    found: list[Any] = [None] * len(leaves)
    if losses.requires_grad:
        found = list(torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True))
    names = [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]
    moving.fix(names)
    return [name.removeprefix("theta/") for name in names]


def tasks_of_step(number: int, options: Options, n_tasks: int, each: int) -> Tensor | None:
    """The tasks of a step: a shuffled pass over all of them after the other; None for all."""
    if each >= n_tasks:
        return None
    in_a_pass = n_tasks // each
    turn, position = divmod(number, in_a_pass)
    generator = torch.Generator().manual_seed((options.seed * 1_000_003 + turn) % (2**63))
    order = torch.randperm(n_tasks, generator=generator)
    return order[position * each : (position + 1) * each]
