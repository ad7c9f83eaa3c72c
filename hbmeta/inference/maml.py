"""MAML: early-stopped gradient descent from the location of the task prior.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: φ_i = φ_N of φ_{n+1} = φ_n − α ∇L^S_i(φ_n), φ_0 the location of p(φ | θ), in
unconstrained space; θ minimises the query loss L^Q_i(φ_N), through the steps (second order).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hbmeta.densities import Delta
from hbmeta.errors import DataError
from hbmeta.inference.gradient_descent import descend
from hbmeta.inference.strategy import Strategy
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta

__all__ = ["MAML"]


@dataclass(frozen=True)
class MAML(Strategy):
    """Model-agnostic meta-learning: q(φ | S) = δ(φ_N), N gradient steps on the support loss.

    Keeps p(y | φ, θ); of p(φ | θ) it uses the location alone and replaces the rest by early
    stopping. On a quadratic loss with curvature λ (that of the sum over points) φ_N is the MAP
    under a Gaussian prior of variance expm1(−N log1p(−αλ)) / λ ≈ αN, which differs from task to
    task (docs/theory.md); it does not maximise the marginal likelihood. Optimises the query loss,
    so a θ that only enters p(φ | θ) (the scale of a centered prior) gets no gradient and stays at
    its prior. Exact as that MAP on linear-Gaussian programs.

    Args:
        steps: N, inner steps.
        step_size: α, in units of φ² per unit of loss.
        reduction: "mean" (the published form: the loss of a task is the mean over its support
            points, so that α fits any number of them) or "sum" (the Bayesian one: the implied prior
            weakens as points come in).
    References:
        Finn, Abbeel, Levine (2017), ICML, algorithm 1. Grant et al. (2018), ICLR, for the MAP view.
    """

    steps: int = 5
    step_size: float = 0.01
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and self.steps >= 0
        if not whole or not 0 <= self.step_size < float("inf"):
            raise DataError(
                "MAML",
                needed="whole steps of 0 or more and a finite step_size of 0 or more",
                found=f"steps={self.steps}, step_size={self.step_size}",
                do="The published values are steps=1 to 10 and step_size=0.01.",
            )
        if self.reduction not in ("mean", "sum"):
            raise DataError(
                "MAML",
                needed="reduction 'mean' or 'sum'",
                found=repr(self.reduction),
                do="Choose one.",
            )

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Delta:
        """δ(φ_N) per task; the location of the task prior for a task without support."""
        points = support.counts.clamp_min(1.0) if self.reduction == "mean" else 1.0

        def loss(phi: Phi) -> Tensor:
            return -problem.log_likelihood(theta, phi, support) / points

        start = problem.location_by_site(theta, support)
        found = descend(loss, start, step_size=self.step_size, steps=self.steps)
        return Delta(problem.sites.to_vector(found))
