"""The inner step of gradient-based adaptation: plain descent, momentum, Adam.

With g_n = ∇L(φ_n), step size α_n and step number n = 0, 1, …

    descent    φ_{n+1} = φ_n − α_n g_n
    momentum   m_{n+1} = μ m_n + g_n,   φ_{n+1} = φ_n − α_n m_{n+1}
    adam       m, v running means of g and g²;  φ_{n+1} = φ_n − α_n m̂ / √(v̂ + ε²)

On a quadratic loss of curvature λ the first two are linear in the start,
φ_N = φ̂ + r_N(λ)(φ_0 − φ̂), so that each is a maximum a posteriori estimate wherever
0 < r_N(λ) < 1, under the prior of precision λ r_N / (1 − r_N) (`theory.residual`,
`theory.implied_precision`). Adam divides by the size of the gradient: where it ends is no linear
function of where it started, and no Gaussian prior gives that for all starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hbmeta.movement import at_least_single

Leaves = list[Tensor]
State = list[Leaves]
"""φ first, then what the optimizer remembers; one entry per site in each."""

InnerOptimizerName = Literal["descent", "momentum", "adam"]

__all__ = [
    "Adam",
    "Descent",
    "InnerOptimizer",
    "InnerOptimizerName",
    "Leaves",
    "Momentum",
    "State",
    "inner_optimizer",
]


class InnerOptimizer(Protocol):
    """An update rule that is differentiable through its steps."""

    def start(self, phi: Leaves) -> State:
        """φ_0 and an empty memory."""

    def step(
        self,
        state: State,
        gradients: Leaves,
        rates: Sequence[Tensor | float],
        number: int | Tensor,
    ) -> State:
        """The state after step `number`, counted from 0, with one step size per site."""


@dataclass(frozen=True)
class Descent:
    """Plain gradient descent."""

    def start(self, phi: Leaves) -> State:
        """φ_0; nothing is remembered."""
        return [phi]

    def step(
        self,
        state: State,
        gradients: Leaves,
        rates: Sequence[Tensor | float],
        number: int | Tensor,
    ) -> State:
        """φ − α g."""
        return [[p - r * g for p, r, g in zip(state[0], rates, gradients, strict=True)]]


@dataclass(frozen=True)
class Momentum:
    """Heavy-ball momentum, `decay` = μ (Polyak 1964, as torch.optim.SGD has it)."""

    decay: float = 0.9

    def start(self, phi: Leaves) -> State:
        """φ_0 at rest."""
        return [phi, [torch.zeros_like(p) for p in phi]]

    def step(
        self,
        state: State,
        gradients: Leaves,
        rates: Sequence[Tensor | float],
        number: int | Tensor,
    ) -> State:
        """φ − α m."""
        phi, before = state
        moving = [self.decay * m + g for m, g in zip(before, gradients, strict=True)]
        return [[p - r * m for p, r, m in zip(phi, rates, moving, strict=True)], moving]


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma, Ba 2015); ε stands under the root, which has no derivative at 0."""

    first: float = 0.9
    second: float = 0.999
    floor: float = 1e-8

    def start(self, phi: Leaves) -> State:
        """φ_0 with both running means at 0."""
        # In float16 the square of a gradient below 2e-4 is 0.
        zeros = [torch.zeros_like(at_least_single(p)) for p in phi]
        return [phi, zeros, [z.clone() for z in zeros]]

    def step(
        self,
        state: State,
        gradients: Leaves,
        rates: Sequence[Tensor | float],
        number: int | Tensor,
    ) -> State:
        """φ − α m̂ / √(v̂ + ε²)."""
        phi, m, v = state
        gradients = [at_least_single(g) for g in gradients]
        m = [self.first * a + (1 - self.first) * g for a, g in zip(m, gradients, strict=True)]
        v = [self.second * a + (1 - self.second) * g * g for a, g in zip(v, gradients, strict=True)]
        first, second = 1 - self.first ** (number + 1), 1 - self.second ** (number + 1)
        # ε² must not vanish beside nothing in single precision.
        floor = max(self.floor**2, float(torch.finfo(v[0].dtype).tiny) * 1e6)
        moved = [
            p - r * ((a / first) / (b / second + floor).sqrt()).to(p.dtype)
            for p, r, a, b in zip(phi, rates, m, v, strict=True)
        ]
        return [moved, m, v]


def inner_optimizer(name: InnerOptimizerName, momentum: float) -> InnerOptimizer:
    """The rule of that name; `momentum` is μ, which the other two do not read."""
    if name == "momentum":
        return Momentum(momentum)
    return Adam() if name == "adam" else Descent()
