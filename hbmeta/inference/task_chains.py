"""Markov chains of φ on the gradients of mini-batches, all tasks and chains side by side.

What a strategy of this kind brings is one transition (its file); here is what the members share:
the gradient of

    f_i(φ) = (n_i / b_i) log p(B_i | φ, θ) + log p(φ | θ),    B_i ⊆ S_i, |B_i| = b_i rows,

an unbiased estimate of log p(S_i, φ | θ), and the preconditioner. Chains move z = φ / d with

    d = c / √λ,   c = |diag H|^(−1/2),   λ = ‖C H C‖₂, C = diag c,

H the curvature of log p(S_i, φ | θ), so that a step size has no units and serves a precise task as
well as a vague one. In units of c alone every diagonal entry is 1, but the curvature along a
direction in which p entries pull together is up to λ = p; by √λ the largest in z is 1, which the
stability and the bias of a step rest on. Correlated posteriors are crossed the more slowly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Tier

State = tuple[Tensor, ...]
"""φ (chains, tasks, phi_size), and what else a transition carries on, of the same shape."""


class Transition(Protocol):
    """What moves chains; hashable, equal to another that moves them alike."""

    def move(self, state: State, gradient: Tensor, noise: Tensor, scale: Tensor) -> State:
        """From state, gradient of f in z, standard normal noise (both as φ), d (tasks, size)."""
        ...


# Up to so many entries H is exact, from as many products with it.
_DENSE = 32
# Above, diag H is estimated from random signs v, E[v ∘ H v] = diag H (Bekas, Kokiopoulou, Saad
# 2007), and λ by power iterations, which after k of them is too small by a share of about log(p)/k
# at worst (Kuczyński, Woźniakowski 1992).
_SIGNS = 16
_POWERS = 20
# A curvature below this share of the task's mean is flat: the step there is that of a tenth of it.
_LEAST = 1e-2

__all__ = ["State", "TaskChains", "Transition", "curvature_scale"]


def curvature_scale(function: Callable[[Tensor], Tensor], phi: Tensor, *, seed: int = 0) -> Tensor:
    """d (tasks, phi_size) at φ (tasks, phi_size); see the module's docstring.

    Args:
        function: φ to (tasks,), tasks independent of each other.
        phi: where.
        seed: of the random signs and the start of the power iterations.
    """
    size = phi.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        phi = phi.detach().requires_grad_()
        # Nothing may depend on φ twice (a flat prior, a Laplace one): zeros then.
        value = function(phi).sum() + 0.0 * phi.square().sum()
        (gradient,) = torch.autograd.grad(value, phi, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((gradient * vector).sum(), phi, retain_graph=True)
        return found.nan_to_num(0.0, 0.0, 0.0)

    if size <= _DENSE:
        unit = torch.eye(size, dtype=phi.dtype, device=phi.device)
        hessian = torch.stack([product(row.expand(phi.shape)) for row in unit], -2)
        diagonal = _diagonal_scale(hessian.diagonal(dim1=-2, dim2=-1))
        white = diagonal.unsqueeze(-1) * hessian * diagonal.unsqueeze(-2)
        largest = torch.linalg.matrix_norm(white, ord=2)
    else:
        signs = (2 * torch.randint(0, 2, (_SIGNS, size), generator=generator) - 1).to(phi)
        diagonal = _diagonal_scale(sum(v * product(v.expand(phi.shape)) for v in signs) / _SIGNS)
        vector = torch.randn(phi.shape, generator=generator, dtype=torch.float64).to(phi)
        for _ in range(_POWERS):
            vector = torch.nn.functional.normalize(vector, dim=-1)
            vector = diagonal * product(diagonal * vector)
        largest = torch.linalg.vector_norm(vector, dim=-1)
    known = largest > 1e-12
    return diagonal * torch.where(known, largest, torch.ones_like(largest)).rsqrt().unsqueeze(-1)


def _diagonal_scale(diagonal: Tensor) -> Tensor:
    """c (tasks, phi_size) of diag H."""
    curvature = diagonal.abs()
    floor = _LEAST * curvature.mean(-1, keepdim=True)
    flat = curvature.amax(-1, keepdim=True) <= 1e-12
    return torch.where(flat, torch.ones_like(curvature), torch.maximum(curvature, floor)).rsqrt()


class TaskChains:
    """Chains of φ for the tasks of a batch, at a θ that comes with every call.

    Args:
        problem: the program.
        batch: all rows of the tasks.
        transition: a strategy. Its step is traced once for a problem, however many chains begin.
        rows: rows in a mini-batch of a task; None for all of them.
        tier: of staging.
        moves: how often it will be called, for tier "auto".
        seed: of the mini-batches.
    """

    def __init__(
        self,
        problem: Problem,
        batch: Batch,
        transition: Transition,
        *,
        rows: int | None,
        tier: Tier | Literal["auto"],
        moves: int,
        seed: int,
    ) -> None:
        self.problem, self.batch, self.transition = problem, batch, transition
        longest = int(batch.counts.max()) if batch.n_tasks else 0
        self.rows = None if rows is None or rows >= longest else rows
        self.generator = torch.Generator().manual_seed(seed)
        self._order = _rows_by_task(batch) if self.rows is not None else None
        self.staged = problem.staged(("TaskChains", transition), self._moved, tier, moves)

    def scale(self, theta: Theta, phi: Tensor) -> Tensor:
        """d (tasks, phi_size) at φ (tasks, phi_size)."""
        return curvature_scale(lambda p: log_joint(self.problem, theta, p, self.batch), phi)

    def step(
        self, theta: Theta, state: State, scale: Tensor, noise: Tensor, limit: float = math.inf
    ) -> State:
        """One transition of every chain.

        Args:
            theta: θ.
            state: where the chains are.
            scale: d.
            noise: standard normal, (chains, tasks, phi_size).
            limit: largest gradient in z that is believed, per entry; chains far from their task's
                mode, in units that were taken elsewhere, would leap over it.
        """
        chosen = self._choose(noise.shape[0])
        bound = torch.full((), limit, dtype=noise.dtype, device=noise.device)
        moved: State = tuple(
            self.staged(theta, list(state), scale, noise, bound, self.batch, *chosen)
        )
        return moved

    def _moved(
        self,
        theta: Theta,
        state: list[Tensor],
        scale: Tensor,
        noise: Tensor,
        limit: Tensor,
        batch: Batch,
        *chosen: Tensor,
    ) -> list[Tensor]:
        # Nothing but the problem and the transition is the object's own: chains of other data come
        # through here too.
        phi = state[0].detach().requires_grad_()
        with torch.enable_grad():
            if not chosen:
                values = torch.vmap(lambda p: log_joint(self.problem, theta, p, batch))(phi)
            else:
                values = torch.vmap(lambda p, rows: self._estimate(theta, p, batch, rows))(
                    phi, *chosen
                )
            (gradient,) = torch.autograd.grad(values.sum(), phi)
        gradient = torch.minimum(torch.maximum(scale * gradient, -limit), limit)
        return [
            value.detach() for value in self.transition.move(tuple(state), gradient, noise, scale)
        ]

    # -- mini-batches -----------------------------------------------------------------------------

    def _choose(self, chains: int) -> tuple[Tensor, ...]:
        """Positions of the rows (chains, tasks, b) that each chain sees, without replacement."""
        if self._order is None or self.rows is None:
            return ()
        first, count = self._order
        width = int(count.max())
        key = torch.rand((chains, len(count), width), generator=self.generator)
        key = torch.where(torch.arange(width) < count[:, None], key, 2.0)
        rank = key.argsort(-1)[..., : self.rows]
        # A task with fewer rows than b has all of them; what is too much repeats its first, masked.
        inside = torch.arange(self.rows) < count[:, None]
        position = first[:, None] + torch.where(inside, rank, torch.zeros_like(rank))
        # Behind the last row there is none for a task without rows to repeat.
        return (position.clamp_max(self.batch.weight.numel() - 1).to(self.batch.x.device),)

    def _estimate(self, theta: Theta, phi: Tensor, batch: Batch, position: Tensor) -> Tensor:
        """(tasks,) f_i on the rows at `position` (tasks, b)."""
        part = self._part(batch, position)
        likelihood, local, _ = self.problem.terms(theta, phi, part)
        # Factors of the program (pyro.factor) are no rows, and count once.
        factor = self.problem.log_likelihood(theta, phi, part.where(torch.zeros_like(part.mask)))
        share = batch.counts / part.counts.clamp_min(1.0)
        return share * (likelihood - factor) + factor + local

    def _part(self, batch: Batch, position: Tensor) -> Batch:
        b = position.shape[-1]
        assert batch.y is not None
        weight = (torch.arange(b, device=position.device) < batch.counts[:, None]).to(batch.weight)
        if batch.task is None:
            cells = (batch.x.shape[0] * batch.x.shape[1],)
            x, y = (t.reshape(*cells, *t.shape[2:])[position] for t in (batch.x, batch.y))
            return self.problem.given(replace(batch, x=x, y=y, weight=weight, context=None), batch)
        flat = position.reshape(-1)
        task = torch.arange(batch.n_tasks, device=position.device).repeat_interleave(b)
        return replace(
            batch, x=batch.x[flat], y=batch.y[flat], weight=weight.reshape(-1), task=task
        )


def _rows_by_task(batch: Batch) -> tuple[Tensor, Tensor]:
    """Position of each task's first row among the cells, and its number of rows, on the CPU.

    Rows of a task stand together, those that count first (`Tasks`).
    """
    counts = batch.counts.round().long().cpu()
    if batch.task is None:
        return torch.arange(batch.n_tasks) * batch.weight.shape[1], counts
    return counts.cumsum(0) - counts, counts
