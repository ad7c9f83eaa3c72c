"""Gradient descent on every task's own loss at once, differentiable through the steps.

Tasks are independent given θ, so one gradient of Σ_i L_i gives every task's own ∇L_i(φ_i), and no
loop over tasks is needed. With A_n = I − α∇²L(φ_n) the result φ_N depends on its start φ_0 through

    ∂φ_N/∂φ_0 = A_{N−1} ⋯ A_0,   and reverse mode gives   A_0 ⋯ A_{N−1} ∇L^Q(φ_N)

(the order matters where the Hessians do not commute). Cutting the gradients out of the graph makes
every A_n the identity: the first-order methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hbmeta.inference.inner_optimizers import Descent, InnerOptimizer, Leaves, State

__all__ = ["descend", "one_step"]

Tree = TypeVar("Tree", Tensor, dict[str, Tensor])


def one_step(
    loss: Callable[[Leaves], Tensor],
    state: State,
    rates: Sequence[Tensor | float],
    number: int | Tensor,
    *,
    optimizer: InnerOptimizer,
    first_order: bool = False,
    history: bool = True,
) -> State:
    """The state after one step on Σ_i L_i.

    Args:
        loss: φ by site to (tasks,).
        state: φ and what the optimizer remembers.
        rates: α per site, numbers or tensors that broadcast over (tasks, *shape).
        number: of the step, from 0.
        optimizer: the update rule.
        first_order: take the gradients as constants.
        history: whether the result will be differentiated.
    """
    keep = [history and v.requires_grad for v in state[0]]
    phi = [v if k else v.detach().requires_grad_() for v, k in zip(state[0], keep, strict=True)]
    with torch.enable_grad():
        gradients = list(
            torch.autograd.grad(
                loss(phi).sum(), phi, create_graph=history and not first_order, allow_unused=True
            )
        )
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(phi, gradients, strict=True)]
    with torch.set_grad_enabled(history):
        return optimizer.step([phi, *state[1:]], found, rates, number)


def descend(
    loss: Callable[[Tree], Tensor],
    start: Tree,
    *,
    step_size: float,
    steps: int,
    optimizer: InnerOptimizer | None = None,
    first_order: bool = False,
) -> Tree:
    """φ_N of φ_{n+1} = φ_n − α ∇L(φ_n), per task.

    Args:
        loss: φ to (tasks,), tasks independent of each other.
        start: φ_0, one tensor (tasks, ...) or one per site; the result is differentiable in it
            where it requires gradients. One tensor per site spares a network the slices of one
            vector.
        step_size: α, in units of φ² per unit of loss.
        steps: N; 0 returns the start.
        optimizer: the update rule; plain descent by default.
        first_order: take the gradients as constants.
    """
    leaves, structure = pytree.tree_flatten(start)
    rule = optimizer or Descent()
    state = rule.start(leaves)
    rates = [step_size] * len(leaves)
    for number in range(steps):
        state = one_step(
            lambda values: loss(pytree.tree_unflatten(values, structure)),
            state,
            rates,
            number,
            optimizer=rule,
            first_order=first_order,
        )
    end: Tree = pytree.tree_unflatten(state[0], structure)
    return end
