"""What an inner optimizer implies for the prior: its residual polynomial on a quadratic loss.

A method that is linear in the gradients takes the start φ₀ of a quadratic loss of curvature λ and
minimum φ̂ to φ_N = φ̂ + r_N(λ) (φ₀ − φ̂), with r_N a polynomial of degree N and r_N(0) = 1:

    plain descent   r_N = Π_n (1 − α_n λ)
    momentum        r_{n+1} = r_n − α_n m_{n+1},  m_{n+1} = μ m_n + λ r_n,  r_0 = 1, m_0 = 0

The maximum a posteriori estimate under φ ~ N(φ₀, τ²) is φ̂ + (φ₀ − φ̂)/(1 + λτ²), so that the two
agree for every start where 1/τ² = λ r_N / (1 − r_N) is positive. Momentum may carry the iterate
past φ̂ at a curvature where plain descent would not: r_N < 0, and no prior gives that. Adam is no
such method (its steps do not depend on the scale of the gradients): it has no r_N and implies no
prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.theory.checks import require_count, require_curvature, require_positive
from hbmeta.theory.early_stopping import SignedPrecision

__all__ = ["implied_precision", "residual"]


def residual(
    curvature: float,
    step_size: float | Sequence[float] | Tensor,
    steps: int,
    *,
    momentum: float = 0.0,
) -> float:
    """r_N(λ): what is left of the distance to the minimum after N steps; negative beyond it.

    Args:
        curvature: λ ≥ 0 of the loss that is descended, in 1/φ² (see `scaled_step_size`).
        step_size: α, or N of them, one per step (signs as learned).
        steps: N ≥ 1.
        momentum: μ in [0, 1).
    Raises:
        DataError: an argument outside its domain.
    References:
        Polyak (1964), USSR Computational Mathematics 4(5), for momentum.
    Example:
        >>> round(residual(2.0, 0.1, 5), 5)
        0.32768
    """
    where = "residual"
    require_curvature(curvature, where)
    require_count(steps, "steps", "Pass the number of inner steps.", where)
    # Tensors too, of which `step_sizes` of a fit gives one per site.
    given = np.asarray(step_size, dtype=np.float64)
    sizes = [float(given)] * steps if given.ndim == 0 else given.reshape(-1).tolist()
    if len(sizes) != steps or not all(math.isfinite(size) for size in sizes):
        raise DataError(
            where,
            needed=f"one finite step size, or {steps} of them",
            found=f"{step_size!r}",
            do="Pass as many as there are steps.",
        )
    if not 0.0 <= momentum < 1.0:
        raise DataError(
            where,
            needed="momentum in [0, 1)",
            found=f"{momentum!r}",
            do="Leave it out for plain descent.",
        )
    left, moving = 1.0, 0.0
    for size in sizes:
        moving = momentum * moving + curvature * left
        left -= size * moving
    return left


def implied_precision(curvature: float, left: float) -> SignedPrecision:
    """λ r / (1 − r), the precision of the prior whose MAP estimate leaves the share r.

    Args:
        curvature: λ > 0 of the summed negative log-likelihood.
        left: r, from `residual`.
    Returns:
        the signed precision; a prior only where `is_prior`. `oscillating` says here that r < 0 (the
        iterate is beyond the minimum); r does not tell whether it went there and came back (even N
        of descent with αλ > 1), where `implied_prior_variance` says so and the agreement is an
        accident of this curvature.
    Raises:
        DataError: an argument outside its domain.
    Example:
        >>> round(implied_precision(2.0, residual(2.0, 0.1, 5)).precision, 10)
        0.9747739172
    """
    where = "implied_precision"
    require_positive(curvature, "curvature", where)
    if not math.isfinite(left):
        raise DataError(
            where,
            needed="a finite residual",
            found=f"{left!r}",
            do="Lower the step size: the iterates diverge.",
        )
    precision = math.inf if left == 1.0 else curvature * left / (1.0 - left)
    return SignedPrecision(precision, left < 0.0)
