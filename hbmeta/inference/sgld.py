"""Stochastic-gradient Langevin dynamics within a task.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ), θ at a point.
Estimator: in units z = φ / d in which no curvature is above 1 (`task_chains`), g a mini-batch's
gradient of log p(S_i, φ | θ) in z, and ξ ~ N(0, I),

    z' = z + (ε/2) g + √ε ξ.

Bias: for a Gaussian target of precision λ in z, z' = (1 − ελ/2) z + √ε ξ, whose stationary variance
ε / (1 − (1 − ελ/2)²) = 1 / (λ (1 − ελ/4)) is too large by ελ/4, with λ ≤ 1 in every direction, so
that correlation makes no bias larger; ελ ≥ 4 has no stationary law. Mini-batches whose gradient has
variance V add ε²V/4 to the noise, so that it is (1 + εV/4) / (λ (1 − ελ/4)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.inference.stochastic_gradient import StochasticGradientStrategy
from hbmeta.inference.task_chains import State

__all__ = ["SGLD"]


@dataclass(frozen=True)
class SGLD(StochasticGradientStrategy):
    """Langevin chains of φ; biased by a step size that stays fixed, not corrected.

    Keeps p(θ) at its mode, p(φ | θ) and p(y | φ, θ); holds θ at a point, at the maximum of
    log p(y | θ) + log p(θ) by Fisher's identity along the chains. Exact for Gaussian posteriors up
    to a factor of the variance of at most 1 / (1 − ε/4) (2.6 % at the default), which mini-batches
    raise; `rows` trades that for gradients of fewer rows. Correlation costs transitions: a
    direction of curvature λ in z is crossed in about 2/(ελ) of them.

    Args: those of `StochasticGradientStrategy`; step_size is ε.

    References:
        Welling, Teh (2011), ICML. De Bortoli, Durmus, Pereyra, Fernandez Vidal (2021), Statistics
        and Computing 31, for θ. Vollmer, Zygalakis, Teh (2016), JMLR 17(159), for the bias.
    """

    def start(self, phi: Tensor) -> State:
        """φ alone."""
        return (phi,)

    def move(self, state: State, gradient: Tensor, noise: Tensor, scale: Tensor) -> State:
        """One step of the module's recursion."""
        (phi,) = state
        step: Tensor = 0.5 * self.step_size * gradient + self.step_size**0.5 * noise
        return (torch.addcmul(phi, scale.expand_as(step), step),)
