"""Gradient descent on every task's own loss at once, differentiable through the steps.

Tasks are independent given θ, so one gradient of Σ_i L_i gives every task's own ∇L_i(φ_i), and no
loop over tasks is needed. With A_n = I − α∇²L(φ_n) the result φ_N depends on its start φ_0 through

    ∂φ_N/∂φ_0 = A_{N−1} ⋯ A_0,   and reverse mode gives   A_0 ⋯ A_{N−1} ∇L^Q(φ_N)

(the order matters where the Hessians do not commute).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["descend"]

Tree = TypeVar("Tree", Tensor, dict[str, Tensor])


def descend(loss: Callable[[Tree], Tensor], start: Tree, *, step_size: float, steps: int) -> Tree:
    """φ_N of φ_{n+1} = φ_n − α ∇L(φ_n), per task.

    Args:
        loss: φ to (tasks,), tasks independent of each other.
        start: φ_0, one tensor (tasks, ...) or one per site; the result is differentiable in it
            where it requires gradients. One tensor per site spares a network the slices of one
            vector.
        step_size: α, in units of φ² per unit of loss.
        steps: N; 0 returns the start.
    """
    leaves, structure = pytree.tree_flatten(start)
    leaves = [v if v.requires_grad else v.detach().requires_grad_() for v in leaves]
    with torch.enable_grad():
        for _ in range(steps):
            total = loss(pytree.tree_unflatten(leaves, structure)).sum()
            gradients = torch.autograd.grad(total, leaves, create_graph=True)
            leaves = [v - step_size * g for v, g in zip(leaves, gradients, strict=True)]
    end: Tree = pytree.tree_unflatten(leaves, structure)
    return end
