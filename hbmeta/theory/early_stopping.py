"""The prior behind early stopping.

φ is a task's parameter, φ̂ its maximum likelihood estimate, φ₀ the start,
λ the curvature of the SUM of the task's negative log-likelihoods, α the step size and N the number
of steps. On a quadratic loss N steps of gradient descent give φ_N = φ̂ + q (φ₀ − φ̂) with
q = (1 − αλ)^N, and the maximum a posteriori estimate under φ ~ N(φ₀, τ²) gives the same with
1 / (1 + λτ²) in place of q. Equating the two:

    1/τ² = λ q / (1 − q) = λ / expm1(−N log1p(−αλ))

Two forms of this in print are wrong. The expansion is 1/τ² = 1/(αN) − λ (N+1)/(2N) + …, not
1/(αN) − λ, which holds for N = 1 alone. The domain is 0 < αλ < 1, not 0 < αλ < 2: beyond 1 the
iterates jump over φ̂ at every step, and for odd N the "precision" is negative. In either form λ is
the task's own, so tasks of different size or design have different implied priors: early stopping
is no single hierarchical prior unless αNλ → 0, and it does not maximise the marginal likelihood
(with an infinite query MAML's φ₀ weights tasks by q_i², Type-II by 1 / (τ² + σ²/n_i)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.theory.checks import (
    require_count,
    require_curvature,
    require_positive,
    require_steps,
    symmetric,
)

Reduction = Literal["sum", "mean", "mean-squared-error"]

# A product below this gives its limit at 0 to all digits, and may itself have lost digits.
_TINY = 1e-200

__all__ = [
    "Reduction",
    "SignedPrecision",
    "implied_prior_precision",
    "implied_prior_variance",
    "matching_step_size",
    "scaled_step_size",
]


@dataclass(frozen=True)
class SignedPrecision:
    """λq / (1 − q), which outside 0 ≤ αλ < 1 may belong to no prior.

    Attributes:
        precision: 1/τ² where positive; 0 is a flat prior, infinity a point, negative is no prior.
        oscillating: whether iterates pass the minimum (αλ > 1; from `implied_precision`, r < 0):
            those on alternating sides agree with a prior by accident.
    """

    precision: float
    oscillating: bool

    @property
    def is_prior(self) -> bool:
        """Whether some Gaussian prior of positive, finite variance has this precision."""
        return 0.0 < self.precision < math.inf


@overload
def implied_prior_variance(
    curvature: float, step_size: float, steps: int, *, allow_oscillating: Literal[False] = False
) -> float: ...


@overload
def implied_prior_variance(
    curvature: float, step_size: float, steps: int, *, allow_oscillating: Literal[True]
) -> SignedPrecision: ...


def implied_prior_variance(
    curvature: float, step_size: float, steps: int, *, allow_oscillating: bool = False
) -> float | SignedPrecision:
    """τ² = expm1(−N log1p(−αλ)) / λ of the prior N(φ₀, τ²) whose MAP estimate is the N-th iterate.

    Exact on quadratic losses; αN in the limit λ → 0, never below αN, and increasing in all three.
    It is often written with 0 < αλ < 2, which is wrong (see the module): needed is αλ < 1.

    Args:
        curvature: λ ≥ 0, of the sum of the negative log-likelihoods, in 1/φ².
        step_size: α > 0 on that sum, in φ²; for other losses see `scaled_step_size`.
        steps: N ≥ 1.
        allow_oscillating: accept 1 ≤ αλ and return the signed precision with a flag instead.
    Returns:
        τ² in φ², or with `allow_oscillating` a `SignedPrecision`.
    Raises:
        DataError: an argument outside its domain, αλ ≥ 1 among them.
    References:
        Santos (1996), Neural Computation 8(2), for the equivalence; Grant et al. (2018), ICLR.
    Example:
        >>> round(implied_prior_variance(2.0, 0.1, 5), 10)
        1.0258789062
    """
    where = "implied_prior_variance"
    require_positive(step_size, "step_size", where)
    require_steps(steps, where)
    require_curvature(curvature, where)
    product = step_size * curvature
    if allow_oscillating:
        return SignedPrecision(_signed_precision(curvature, product, step_size, steps), product > 1)
    if product >= 1.0:
        raise DataError(
            where,
            needed="step_size · curvature below 1, where gradient descent stays on one side",
            found=f"{step_size:g} · {curvature:g} = {product:g}",
            do="Lower step_size, or pass allow_oscillating=True for the signed precision.",
        )
    if product < _TINY:
        return step_size * steps
    with np.errstate(over="ignore"):  # the prior of many steps is as good as flat
        return float(np.expm1(-steps * np.log1p(-product))) / curvature


def _precision(product: Any, steps: int) -> Any:
    """k / expm1(−N log1p(−k)) for 0 ≤ k = αλ < 1: the implied precision in units of 1/α."""
    k = np.asarray(product, dtype=np.float64)
    # 1/N at k = 0; the ratio of two numbers that both vanish is exact well before that.
    safe = np.where(k > 0.0, k, 0.5)
    with np.errstate(over="ignore"):
        return np.where(k > 0.0, safe / np.expm1(-steps * np.log1p(-safe)), 1.0 / steps)


def _signed_precision(curvature: float, product: float, step_size: float, steps: int) -> float:
    if product < 1.0:
        return float(_precision(product, steps)) / step_size
    shrinkage = (1.0 - product) ** steps
    if shrinkage == 1.0:
        return math.inf
    return curvature * shrinkage / (1.0 - shrinkage)


def implied_prior_precision(
    hessian: Any, step_size: float, steps: int, preconditioner: Any = None
) -> Tensor:
    """Precision Λ of the prior N(φ₀, Λ⁻¹) whose MAP estimate is the N-th iterate, for vectors φ.

    For steps φ ← φ − α P ∇L with P = S Sᵀ and K = α Sᵀ H S = U diag(k) Uᵀ,

        Λ = S⁻ᵀ U diag(f(k)) Uᵀ S⁻¹ / α,   f(k) = k (1 − k)^N / (1 − (1 − k)^N).

    Λ shares the eigenvectors of H where P = I, so it depends on the task's design. For small steps
    it is (αP)⁻¹/N − H (N+1)/(2N), not (αP)⁻¹/N − H: the prior covariance is about αN P. Steps that
    change their P on the way have no such prior.

    Args:
        hessian: H (p, p) of the summed negative log-likelihood; symmetric, positive semi-definite.
            Directions without curvature get the precision 1/(αN).
        step_size: α > 0.
        steps: N ≥ 1.
        preconditioner: P (p, p) positive definite, or (p,) a diagonal; None for the identity.
    Returns:
        Λ (p, p), float64.
    Raises:
        DataError: H or P is not as needed, or the largest eigenvalue of K is 1 or more.
    """
    where = "implied_prior_precision"
    require_positive(step_size, "step_size", where)
    require_steps(steps, where)
    h = symmetric(hessian, "hessian", where)
    size = h.shape[0]
    p = torch.eye(size, dtype=torch.float64) if preconditioner is None else preconditioner
    p = torch.as_tensor(p, dtype=torch.float64)
    p = symmetric(torch.diag(p) if p.ndim == 1 else p, "preconditioner", where)
    root, failed = torch.linalg.cholesky_ex(p)
    if p.shape != h.shape or int(failed):
        raise DataError(
            where,
            needed=f"a positive definite preconditioner of shape {(size, size)} or {(size,)}",
            found=f"shape {tuple(p.shape)}, eigenvalues {torch.linalg.eigvalsh(p).tolist()}",
            do="Use a positive step size per parameter; no prior gives the iterate otherwise.",
        )
    k, u = torch.linalg.eigh(step_size * root.T @ h @ root)
    if float(k[0]) < -1e-9 * max(float(k[-1]), 1e-300):
        raise DataError(
            where,
            needed="a positive semi-definite hessian",
            found=f"smallest eigenvalue {float(torch.linalg.eigvalsh(h)[0]):.3g}",
            do="Take the curvature at a minimum, or its Gauss-Newton form.",
        )
    if float(k[-1]) >= 1.0:
        raise DataError(
            where,
            needed="steps times curvature below 1 in every direction",
            found=f"largest eigenvalue {float(k[-1]):g}",
            do="Lower step_size.",
        )
    f = torch.from_numpy(_precision(k.clamp_min(0.0).numpy(), steps))
    whitened = torch.linalg.solve_triangular(root.T, u, upper=True)
    precision: Tensor = (whitened * f) @ whitened.T / step_size
    return 0.5 * (precision + precision.T)


def scaled_step_size(step_size: float, n: int, noise: float | None, reduction: Reduction) -> float:
    """The step on the summed negative log-likelihood that does what `step_size` does on a loss.

    If the loss is s times the sum (and a constant), a step α on it is a step sα on the sum:

        "sum"                 Σ_j −log p(y_j | φ)         s = 1
        "mean"                the same over n             s = 1/n
        "mean-squared-error"  Σ_j (y_j − f(x_j, φ))² / n  s = 2σ²/n, y Normal with sd σ

    Mean losses therefore imply a prior whose variance shrinks with the number of points, about
    αN/n or 2σ²αN/n.

    Args:
        step_size: α > 0 on the loss.
        n: number of support points.
        noise: σ, the standard deviation of y; needed by "mean-squared-error" alone.
        reduction: the loss.
    Raises:
        DataError: an argument outside its domain.
    """
    where = "scaled_step_size"
    require_positive(step_size, "step_size", where)
    require_count(n, "n", "Pass the number of support points.", where)
    if reduction == "sum":
        return step_size
    if reduction == "mean":
        return step_size / n
    if reduction == "mean-squared-error":
        if noise is None:
            raise DataError(
                where,
                needed="noise, the standard deviation of y, for a squared error",
                found="None",
                do="A squared error is a likelihood only with a noise; 0.5 ** 0.5 gives s = 1/n.",
            )
        require_positive(noise, "noise", where)
        return 2.0 * noise**2 * step_size / n
    raise DataError(
        where,
        needed="reduction 'sum', 'mean' or 'mean-squared-error'",
        found=f"{reduction!r}",
        do="Choose one.",
    )


def matching_step_size(curvature: float, prior_variance: float, steps: int) -> float:
    """The step size whose N-th iterate is the MAP estimate under a prior of the given variance.

    α = (1 − q^(1/N)) / λ with q = 1 / (1 + λτ²); the inverse of `implied_prior_variance`.

    Args:
        curvature: λ ≥ 0 of the summed negative log-likelihood.
        prior_variance: τ² > 0.
        steps: N ≥ 1.
    Raises:
        DataError: an argument outside its domain.
    """
    where = "matching_step_size"
    require_positive(prior_variance, "prior_variance", where)
    require_steps(steps, where)
    require_curvature(curvature, where)
    if curvature * prior_variance < _TINY:
        return prior_variance / steps
    return -math.expm1(-math.log1p(curvature * prior_variance) / steps) / curvature
