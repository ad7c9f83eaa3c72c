"""Gradient descent on every task's own loss at once, differentiable through the steps.

Tasks are independent given θ, so one gradient of Σ_i L_i gives every task's own ∇L_i(φ_i), and no
loop over tasks is needed. With A_n = I − α∇²L(φ_n) the result φ_N depends on its start φ_0 through

    ∂φ_N/∂φ_0 = A_{N−1} ⋯ A_0,   and reverse mode gives   A_0 ⋯ A_{N−1} ∇L^Q(φ_N)

(the order matters where the Hessians do not commute).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["descend"]


def descend(
    loss: Callable[[Tensor], Tensor], start: Tensor, *, step_size: float, steps: int
) -> Tensor:
    """φ_N of φ_{n+1} = φ_n − α ∇L(φ_n), per task.

    Args:
        loss: φ (tasks, phi_size) to (tasks,), tasks independent of each other.
        start: φ_0; the result is differentiable in it where it requires gradients.
        step_size: α, in units of φ² per unit of loss.
        steps: N; 0 returns the start.
    """
    phi = start if start.requires_grad else start.detach().requires_grad_()
    with torch.enable_grad():
        for _ in range(steps):
            total = loss(phi).sum()
            (gradient,) = torch.autograd.grad(total, phi, create_graph=True)
            phi = phi - step_size * gradient
    return phi
