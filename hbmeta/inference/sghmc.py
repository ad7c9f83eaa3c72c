"""Stochastic-gradient Hamiltonian Monte Carlo within a task.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ), θ at a point.
Estimator: in units z = φ / d (`task_chains`), with g a mini-batch's gradient of log p(S_i, φ | θ)
in z, step size h, friction γ, α = γh, and ξ ~ N(0, I),

    v' = (1 − α) v + h² g + √(2αh²) ξ,        z' = z + v'.

Bias: for a Gaussian target of precision λ in z this is a linear recursion of (z, v), whose
stationary covariance solves P = A P Aᵀ + Q. With E zv = ½ E v², which E z'² = E z² demands,

    Var z = 1 / (λ (1 − h²λ / (4 − 2α))),

too large by h²λ / (4 − 2α), λ ≤ 1 in every direction. α = 1 forgets v and is SGLD with ε = 2h².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.inference.stochastic_gradient import StochasticGradientStrategy
from hbmeta.inference.task_chains import State

__all__ = ["SGHMC"]


@dataclass(frozen=True)
class SGHMC(StochasticGradientStrategy):
    """Langevin chains of φ with momentum, which cross correlated posteriors faster than `SGLD`.

    Keeps p(θ) at its mode, p(φ | θ) and p(y | φ, θ); holds θ at a point, as SGLD does. Exact for
    Gaussian posteriors up to a factor of the variance of at most 1 / (1 − h² / (4 − 2γh)) (2.7 % at
    the defaults), which mini-batches raise: their noise is not estimated and taken off.

    Args:
        step_size: h.
        draws, warmup, thin, chains, rows: those of `StochasticGradientStrategy`.
        friction: γ, with γh ≤ 1.
    References:
        Chen, Fox, Guestrin (2014), ICML, equation 15. De Bortoli et al. (2021), for θ.
    """

    step_size: float = 0.3
    friction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.friction, int | float) and not isinstance(self.friction, bool)
        if not number or not 0 < self.friction * self.step_size <= 1:
            raise DataError(
                self.name,
                needed="a friction above 0, times step_size at most 1",
                found=f"friction={self.friction!r}, step_size={self.step_size!r}",
                do="The defaults are friction=1 and step_size=0.3.",
            )

    def start(self, phi: Tensor) -> State:
        """φ and v = 0."""
        return phi, torch.zeros_like(phi)

    def move(self, state: State, gradient: Tensor, noise: Tensor, scale: Tensor) -> State:
        """One step of the module's recursion."""
        phi, velocity = state
        decay, eta = self.friction * self.step_size, self.step_size**2
        velocity = (1.0 - decay) * velocity + eta * gradient + (2.0 * decay * eta) ** 0.5 * noise
        return torch.addcmul(phi, scale.expand_as(velocity), velocity), velocity
