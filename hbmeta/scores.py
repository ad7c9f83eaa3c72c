"""Scores of a predictive distribution and distances between Gaussians, as pure functions.

| formula | function |
|---|---|
| E|X − y| − ½ E|X − X'| | `crps_draws`, `crps_normal` |
| KL(N₀ ‖ N₁) | `gaussian_kl` |
| W₂(N₀, N₁) | `wasserstein2_gaussian` |
| smallest x with F(x) ≥ p | `weighted_quantile` |
| (Σ w)² / Σ w² | `effective_sample_size_of_weights` |

Everything is computed and returned in float64. Draws lie along the first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hbmeta.densities import Gaussian
from hbmeta.errors import CurvatureError, DataError

__all__ = [
    "crps_draws",
    "crps_normal",
    "effective_sample_size_of_weights",
    "gaussian_kl",
    "normalised_log_weights",
    "wasserstein2_gaussian",
    "weighted_quantile",
]


def normalised_log_weights(log_weights: Tensor) -> Tensor:
    """Log weights (draws, ...) whose exponentials sum to 1 over the draws.

    Raises:
        DataError: NaN, +inf, or no draw with a positive weight.
    """
    normalised = torch.log_softmax(log_weights.double(), 0)
    # log_softmax turns NaN, +inf and a column of -inf into NaN.
    if bool(normalised.isnan().any()):
        raise DataError(
            "normalised_log_weights",
            needed="log weights below +inf, at least one of them finite in each column",
            found="NaN, +inf or only -inf",
            do="Look for a log density that is not finite.",
        )
    return normalised


def effective_sample_size_of_weights(log_weights: Tensor) -> Tensor:
    """Number of equally weighted draws with the same variance, (Σ w)² / Σ w² (Kish 1965).

    Args:
        log_weights: (draws, ...), up to a constant per column.
    Returns:
        (...), between 1 and the number of draws.
    """
    return torch.exp(-torch.logsumexp(2.0 * normalised_log_weights(log_weights), 0))


def weighted_quantile(
    draws: Tensor, p: float | Sequence[float], log_weights: Tensor | None = None
) -> Tensor:
    """Smallest draw at which the (weighted) empirical distribution function reaches p.

    One of the draws, never between two: quantiles of whole numbers are whole. Its standard error
    is about sqrt(p (1 − p) / ESS) / f(x), f the density at the quantile.

    Args:
        draws: (draws, ...).
        p: one level or several, between 0 and 1.
        log_weights: (draws, ...) or (draws,), up to a constant per column; None weighs all alike.
    Returns:
        (...) for one level, (levels, ...) for several; float64.
    Raises:
        DataError: no draws, a level outside (0, 1), or weights of no use.
    """
    _check_draws(draws, at_least=1, where="weighted_quantile")
    levels = [float(level) for level in p] if isinstance(p, Sequence) else [float(p)]
    for level in levels:
        if not 0.0 < level < 1.0:
            raise DataError(
                "weighted_quantile",
                needed="levels between 0 and 1",
                found=f"{level}",
                do="Pass 0.5 for the median.",
            )
    sorted_draws, order = draws.double().sort(0)
    count = len(draws)
    # The tolerance keeps a cumulative sum such as 0.1 + 0.2 from missing the level 0.3.
    if log_weights is None:
        places = [max(0, math.ceil(level * count * (1.0 - 1e-12)) - 1) for level in levels]
        quantiles = sorted_draws[places]
    else:
        weights = _aligned(normalised_log_weights(log_weights), draws).exp()
        cumulative = weights.gather(0, order).cumsum(0)
        rows = [
            (cumulative < level * (1.0 - 1e-12)).sum(0).clamp(max=count - 1) for level in levels
        ]
        quantiles = sorted_draws.gather(0, torch.stack(rows))
    return quantiles if isinstance(p, Sequence) else quantiles[0]


def crps_draws(draws: Tensor, y: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of a sample, the fair form, in O(S log S).

    Equal weights, over n draws:

        mean |x_i − y| − Σ_ij |x_i − x_j| / (2 n (n − 1))

    which is unbiased for the score of the distribution that the draws come from. Weights w with
    sum 1 use the same correction,

        Σ w_i |x_i − y| − Σ_ij w_i w_j |x_i − x_j| / (2 (1 − Σ w_i²))

    which is the line above for equal weights, and consistent for importance weights. Where one
    draw carries all the weight the second term is 0.

    Args:
        draws: (draws, ...), two or more.
        y: (...), in the units of the draws.
        log_weights: (draws, ...) or (draws,), up to a constant per column.
    Returns:
        (...), in the units of y; lower is better, 0 is perfect (the fair form can fall below 0).
    Raises:
        DataError: fewer than two draws, or weights of no use.
    References:
        Ferro (2014), Q. J. R. Meteorol. Soc. 140, 1917–1923.
    """
    _check_draws(draws, at_least=2, where="crps_draws")
    # Distances to y, so that a large common offset costs no digits.
    offset, order = (draws.double() - y.double()).sort(0)
    count = len(offset)
    if log_weights is None:
        # Σ_ij |x_i − x_j| = 2 Σ_k (2 k − n + 1) x_(k), with k from 0.
        rank = torch.arange(count, dtype=torch.float64, device=offset.device)
        coefficient = ((2.0 * rank - count + 1.0) / (count * (count - 1.0))).reshape(
            count, *[1] * (offset.dim() - 1)
        )
        return offset.abs().mean(0) - (coefficient * offset).sum(0)
    weights = _aligned(normalised_log_weights(log_weights), offset).exp().gather(0, order)
    # Σ_ij w_i w_j |x_i − x_j| = 2 Σ_k w_k x_(k) (W_below − W_above), where with the cumulative
    # weight C_k, k included, W_below − W_above = (C_k − w_k) − (1 − C_k).
    signs = 2.0 * weights.cumsum(0) - weights - 1.0
    spread = (weights * offset * signs).sum(0)
    room = 1.0 - weights.square().sum(0)
    correction = torch.where(room > 1e-12, spread / room.clamp(min=1e-12), 0.0)
    return (weights * offset.abs()).sum(0) - correction


def crps_normal(mean: Tensor, sd: Tensor, y: Tensor) -> Tensor:
    """Continuous ranked probability score of N(mean, sd²), in closed form.

    σ (z (2 Φ(z) − 1) + 2 φ(z) − 1/√π), z = (y − μ) / σ (Gneiting et al. 2005).

    Args:
        mean: (...).
        sd: (...), positive.
        y: (...), in the units of the mean.
    Returns:
        (...), in the units of y; lower is better, never below 0.
    """
    mean, sd, y = mean.double(), sd.double(), y.double()
    z = (y - mean) / sd
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2.0 * math.pi)
    inside = z * torch.erf(z / math.sqrt(2.0)) + 2.0 * density - 1.0 / math.sqrt(math.pi)
    return sd * inside


def gaussian_kl(mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor) -> Tensor:
    """KL(N(mean0, cov0) ‖ N(mean1, cov1)) in nats, in closed form.

    ½ (tr(S₁⁻¹ S₀) + (m₁ − m₀)ᵀ S₁⁻¹ (m₁ − m₀) − d + log |S₁| − log |S₀|).

    Args:
        mean0: (..., d).
        cov0: (..., d, d), positive definite.
        mean1: (..., d).
        cov1: (..., d, d), positive definite.
    Raises:
        CurvatureError: a covariance is not positive definite.
    """
    batch = torch.broadcast_shapes(
        mean0.shape[:-1], cov0.shape[:-2], mean1.shape[:-1], cov1.shape[:-2]
    )

    def density(mean: Tensor, cov: Tensor, name: str) -> Gaussian:
        size = cov.shape[-1]
        factor = _cholesky(cov, name, where="gaussian_kl").expand(*batch, size, size)
        return Gaussian(mean.double().expand(*batch, size), factor)

    return density(mean0, cov0, "cov0").kl(density(mean1, cov1, "cov1"))


def wasserstein2_gaussian(mean0: Tensor, cov0: Tensor, mean1: Tensor, cov1: Tensor) -> Tensor:
    """Wasserstein distance W₂ between two Gaussians (the distance, not its square).

    W₂² = ‖m₀ − m₁‖² + tr(S₀ + S₁ − 2 (S₀^½ S₁ S₀^½)^½). Rounding leaves about 1e-8 times the
    standard deviation between equal Gaussians.

    Args:
        mean0: (..., d).
        cov0: (..., d, d), positive semi-definite.
        mean1: (..., d).
        cov1: (..., d, d), positive semi-definite.
    Returns:
        (...), in the units of the means.
    """
    cov0, cov1 = cov0.double(), cov1.double()
    values, vectors = torch.linalg.eigh(cov0)
    root = (vectors * values.clamp(min=0.0).sqrt()[..., None, :]) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov1 @ root).clamp(min=0.0).sqrt().sum(-1)
    traces = (cov0.diagonal(dim1=-2, dim2=-1) + cov1.diagonal(dim1=-2, dim2=-1)).sum(-1)
    squared = (mean0.double() - mean1.double()).square().sum(-1) + traces - 2.0 * cross
    distance: Tensor = squared.clamp(min=0.0).sqrt()
    return distance


def _cholesky(covariance: Tensor, name: str, *, where: str) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(covariance.double())
    if bool((info != 0).any()):
        smallest = torch.linalg.eigvalsh(covariance.double().nan_to_num()).min()
        raise CurvatureError(
            where,
            needed=f"{name} positive definite",
            found=f"the smallest eigenvalue {float(smallest):.3g}",
            do="Use more draws than dimensions, or drop a parameter that never varies.",
        )
    return factor


def _aligned(log_weights: Tensor, draws: Tensor) -> Tensor:
    """Weights (draws,) or (draws, ...) in the shape of the draws; missing dimensions go last."""
    missing = draws.dim() - log_weights.dim()
    return log_weights.reshape(*log_weights.shape, *[1] * missing).expand(draws.shape)


def _check_draws(draws: Tensor, *, at_least: int, where: str) -> None:
    if draws.dim() == 0 or len(draws) < at_least:
        raise DataError(
            where,
            needed=f"at least {at_least} draws along the first dimension",
            found=f"shape {tuple(draws.shape)}",
            do="Draw more.",
        )
