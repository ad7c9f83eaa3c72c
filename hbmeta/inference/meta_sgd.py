"""Meta-SGD: MAML whose step size is learned for each parameter.

Model and estimator: those of MAML, with φ_{n+1} = φ_n − α ∘ ∇L^S(φ_n) and α a vector like φ that is
learned with θ.
"""

from __future__ import annotations

from dataclasses import dataclass

from hbmeta.inference.gradient_strategy import GradientStrategy, LearnedStep

__all__ = ["MetaSGD"]


@dataclass(frozen=True)
class MetaSGD(GradientStrategy):
    """MAML with a learned step size per parameter, which starts at `step_size`.

    Keeps and replaces what MAML does. On quadratic losses its implied prior has covariance about
    N diag(α) for small steps (`theory.implied_prior_precision` with `preconditioner=`, exact for
    any): learning α is learning the scales of the task prior. A step size that turned negative has
    no prior. `inference.step_sizes(fitted)` returns what was learned.

    Args: those of `GradientStrategy`, with other defaults.

    References:
        Li, Zhou, Chen, Li (2017), arXiv:1707.09835.
    """

    steps: int = 1
    learned_step: LearnedStep | None = "parameter"
