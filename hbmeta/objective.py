"""What training minimises, and its gradient: as one staged function, or from a strategy's pieces.

    mean_i loss_i − log p(θ) / T

the mean over the tasks that have a query row, of which a fit has T. One staged function holds
program, strategy and gradient; a strategy whose inner solver runs until it has converged, or whose
steps are compiled one by one, hands in the gradient of the mean itself, and −log p(θ) / T is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from hbmeta.movement import Moving, at_least_single
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Staged, Tier

if TYPE_CHECKING:
    from hbmeta.inference.strategy import Strategy

__all__ = ["MetaGradient", "Objective", "Pieces", "Whole", "mean_over_queries"]


class MetaGradient(Protocol):
    """The gradient of a strategy's mean loss, computed in pieces; see `Strategy.meta_gradient`."""

    @property
    def tier(self) -> Tier:
        """The highest tier in use."""
        ...

    @property
    def seconds_staging(self) -> float:
        """Of tracing and compiling."""
        ...

    def __call__(
        self,
        theta: Theta,
        own: Mapping[str, Tensor],
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the tasks that have a query row, and its gradient.

        θ and `own` are in the dtype of the data and hold no graph; they change in place from step
        to step. The gradient is by "theta/name" and "own/name"; names that are missing have none.
        """
        ...

    def finish(self) -> dict[str, Any]:
        """What training records in Fitted.info; warns of what went wrong on the way."""
        ...


def mean_over_queries(losses: Tensor, query: Batch) -> Tensor:
    """() the mean of (tasks,) losses over the tasks that have a query row, in float32 at least."""
    losses = at_least_single(losses)
    used = (query.counts > 0).to(losses.dtype)
    return (losses * used).sum() / used.sum().clamp_min(1.0)


class Objective:
    """What training minimises, as functions of what moves."""

    def __init__(self, strategy: Strategy, problem: Problem, moving: Moving, n_tasks: int) -> None:
        self.strategy, self.problem, self.moving, self.n_tasks = strategy, problem, moving, n_tasks

    def data_loss(
        self,
        theta: Theta,
        own: Mapping[str, Tensor],
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """() the mean of the strategy's losses."""
        bound = self.moving.bound(own)
        losses = self.strategy.loss(self.problem, theta, bound, support, query, noise)
        return mean_over_queries(losses, query)

    def prior_loss(self, theta: Theta, query: Batch) -> Tensor:
        """() −log p(θ) / T."""
        return -at_least_single(self.problem.log_prior(theta, query)) / self.n_tasks

    def untouched(self, support: Batch, query: Batch, noise: Mapping[str, Tensor]) -> list[str]:
        """θ that the data's loss is no function of, found from one eager gradient."""
        leaves = {k: v.detach().clone().requires_grad_() for k, v in self.moving.free.items()}
        loss = self.data_loss(*self.moving.unpack(leaves), support, query, noise)
        theta = [key for key in leaves if key.startswith("theta/")]
        if not theta or not loss.requires_grad:
            return theta
        found = torch.autograd.grad(loss, [leaves[key] for key in theta], allow_unused=True)
        return [key for key, gradient in zip(theta, found, strict=True) if gradient is None]


class Whole:
    """Value and gradient of the objective as one staged function."""

    def __init__(self, objective: Objective, *, tier: Tier | Literal["auto"], steps: int) -> None:
        self.free = objective.moving.free

        def value_and_gradient(
            free: dict[str, Tensor], support: Batch, query: Batch, noise: dict[str, Tensor]
        ) -> tuple[Tensor, list[Tensor]]:
            free = {k: v.detach().requires_grad_() for k, v in free.items()}
            theta, own = objective.moving.unpack(free)
            loss = objective.data_loss(theta, own, support, query, noise)
            loss = loss + objective.prior_loss(theta, query)
            return loss.detach(), _gradients(loss, free)

        self.staged = Staged(
            value_and_gradient,
            tier=tier,
            expected_calls=steps,
            check_every=max(steps // 4, 1),
        )

    def __call__(
        self, support: Batch, query: Batch, noise: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Value and gradient of the objective in what moves, in its order."""
        result: tuple[Tensor, list[Tensor]] = self.staged(self.free, support, query, noise)
        return result

    @property
    def tier(self) -> Tier:
        """The highest tier in use."""
        return self.staged.tier

    @property
    def seconds_staging(self) -> float:
        """Of tracing and compiling."""
        return self.staged.seconds_staging


class Pieces:
    """Value and gradient of the data's loss from a strategy's pieces; the prior's beside them."""

    def __init__(
        self,
        objective: Objective,
        pieces: MetaGradient,
        query: Batch,
        *,
        tier: Tier | Literal["auto"],
        steps: int,
    ) -> None:
        self.moving, self.pieces = objective.moving, pieces

        def prior(theta: Theta, query: Batch) -> tuple[Tensor, list[Tensor]]:
            theta = {k: v.detach().requires_grad_() for k, v in theta.items()}
            loss = objective.prior_loss(theta, query)
            return loss.detach(), _gradients(loss, theta)

        theta, _ = self.moving.unpack(self.moving.free)
        leaves = {k: v.detach().clone().requires_grad_() for k, v in theta.items()}
        self.prior: Staged | None = None
        if objective.prior_loss(leaves, query).requires_grad:
            self.prior = Staged(
                prior,
                tier=tier,
                expected_calls=steps,
                check_every=max(steps // 4, 1),
            )

    def __call__(
        self, support: Batch, query: Batch, noise: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Value and gradient of the objective in what moves, in its order."""
        with torch.no_grad():
            theta, own = self.moving.unpack(self.moving.free)
        loss, given = self.pieces(theta, own, support, query, noise)
        found = dict(given)
        if self.prior is not None:
            value, gradients = self.prior(theta, query)
            loss = loss + value
            for name, gradient in zip(theta, gradients, strict=True):
                key = f"theta/{name}"
                found[key] = found[key] + gradient if key in found else gradient
        return loss.detach(), self.moving.pulled_back(found)

    @property
    def tier(self) -> Tier:
        """The highest tier in use."""
        return self.pieces.tier

    @property
    def seconds_staging(self) -> float:
        """Of tracing and compiling."""
        prior = 0.0 if self.prior is None else self.prior.seconds_staging
        return self.pieces.seconds_staging + prior


def _gradients(loss: Tensor, leaves: Mapping[str, Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [
        torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves.values(), strict=True)
    ]
