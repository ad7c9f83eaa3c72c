"""MAML: early-stopped gradient descent from the location of the task prior.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: φ_i = φ_N of φ_{n+1} = φ_n − α ∇L^S_i(φ_n), φ_0 the location of p(φ | θ), in
unconstrained space; θ minimises the query loss L^Q_i(φ_N), through the steps (second order).
"""

from __future__ import annotations

from dataclasses import dataclass

from hbmeta.inference.gradient_strategy import GradientStrategy

__all__ = ["MAML"]


@dataclass(frozen=True)
class MAML(GradientStrategy):
    """Model-agnostic meta-learning: q(φ | S) = δ(φ_N), N gradient steps on the support loss.

    Keeps p(y | φ, θ); of p(φ | θ) it uses the location alone and replaces the rest by early
    stopping. On a quadratic loss with curvature λ (that of the sum over points) φ_N is the MAP
    under a Gaussian prior of variance expm1(−N log1p(−αλ)) / λ ≈ αN, which differs from task to
    task (docs/theory.md); it does not maximise the marginal likelihood. Optimises the query loss,
    so a θ that only enters p(φ | θ) (the scale of a centered prior) gets no gradient and stays at
    its prior. Exact as that MAP on linear-Gaussian programs.

    The gradient of φ_0 is A_0 ⋯ A_{N−1} ∇L^Q(φ_N) with A_n = I − α∇²L^S(φ_n), in this order.

    Args: those of `GradientStrategy`.

    References:
        Finn, Abbeel, Levine (2017), ICML, algorithm 1. Grant et al. (2018), ICLR, for the MAP view.
        Antoniou, Edwards, Storkey (2019), ICLR, for step sizes per site and step.
    """
