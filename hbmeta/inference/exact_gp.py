"""The exact posterior of a Gaussian process whose few hyperparameters differ between tasks.

Model: φ_i ~ p(φ | θ) (lengthscale, scale, noise, …), y_i | φ_i ~ N(m, K_φ + σ² I) over all points
of a task, the function itself integrated out (joint layout).
Estimator: the predictive of known hyperparameters is a Gaussian conditional; unknown ones are
integrated out by quadrature over φ,

    p(y_Q | S) = ∫ p(y_Q | S, φ) p(φ | S) dφ,   p(φ | S) ∝ p(φ | θ) p(y_S | φ),

which is the Bayes-optimal predictive of the family of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hbmeta.errors import UnsupportedModelError
from hbmeta.inference.quadrature import Quadrature
from hbmeta.problem import Problem

__all__ = ["ExactGP"]


@dataclass(frozen=True)
class ExactGP(Quadrature):
    """Exact Gaussian-process regression: known kernel, or hyperparameters integrated out.

    Keeps p(y | φ, θ) and p(φ | θ); θ as in `Quadrature`. Exact where every hyperparameter is known
    (φ is empty), and up to the quadrature where one to three differ between tasks. A program that
    knows each task's own kernel predicts better than any that has to infer it: see
    `hbmeta.oracles.known_kernel`.

    Args:
        nodes: per hyperparameter; by default 64, 48 and 16 for one, two and three of them.
        prior: add log p(θ) to the evidence.
    Raises:
        UnsupportedModelError: a program whose points are independent given φ, more than three
            hyperparameters per task.
    References:
        Rasmussen, Williams (2006), Gaussian Processes for Machine Learning, §2.2 and §5.2.
    """

    without_phi: ClassVar[bool] = True

    def check(self, problem: Problem) -> None:
        """A program that integrates its function out."""
        if problem.layout != "joint":
            raise UnsupportedModelError(
                self.name,
                needed="a program of the joint layout (keyword `mask`), such as "
                "models.GaussianProcess",
                found=f"the {problem.layout} layout, whose points are independent given φ",
                do="Use Quadrature for up to three parameters per task, ExactLinear or NUTS.",
            )
        super().check(problem)
