"""KL divergences in closed form, in nats: what a certificate may be computed from.

A certificate needs an upper bound on KL(Q‖P). A Monte-Carlo estimate of it is none, whatever the
number of draws, because log dQ/dP is not bounded: so every function here is exact, and there is no
other. For normals in d dimensions, with Δ = μ_Q − μ_P,

    KL = ½ [tr(Σ_P⁻¹ Σ_Q) − d + Δᵀ Σ_P⁻¹ Δ + log(|Σ_P| / |Σ_Q|)].

A point mass has KL = ∞ with respect to every prior with a density.
"""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr

from hbmeta.bounds.checks import Array, Values, as_array, common_shape
from hbmeta.errors import DataError

__all__ = [
    "categorical_kl",
    "diagonal_gaussian_kl",
    "gaussian_kl",
    "low_rank_gaussian_kl",
]


def gaussian_kl(
    mean: Values, covariance: Values, prior_mean: Values, prior_covariance: Values
) -> Array:
    """KL(N(μ_Q, Σ_Q) ‖ N(μ_P, Σ_P)) with full covariances, by Cholesky factors.

    With Σ = LLᵀ and A = L_P⁻¹ L_Q: tr(Σ_P⁻¹Σ_Q) = ‖A‖², log(|Σ_P|/|Σ_Q|) = −2 Σ_j log A_jj.

    Args:
        mean: (..., d); leading dimensions broadcast.
        covariance: (..., d, d), positive definite.
        prior_mean: (..., d).
        prior_covariance: (..., d, d), positive definite.
    Returns:
        (...).
    Raises:
        DataError: numbers that are not finite, wrong shapes, or a covariance that is not symmetric
            and positive definite (a singular posterior has KL = ∞).
    """
    where = "gaussian_kl"
    shift = _difference(mean, prior_mean, where)
    own = _cholesky(covariance, "covariance", shift.shape[-1], where)
    prior = _cholesky(prior_covariance, "prior_covariance", shift.shape[-1], where)
    common_shape(where, means=shift[..., None], covariance=own, prior_covariance=prior)
    ratio = np.linalg.solve(prior, own)
    whitened = np.linalg.solve(prior, shift[..., None])[..., 0]
    diagonal = np.diagonal(ratio, axis1=-2, axis2=-1)
    # A² − 1 − 2 log A on the diagonal: every term is 0 or more.
    spread = np.square(ratio).sum((-2, -1)) - np.square(diagonal).sum(-1) + _spread(diagonal)
    return np.asarray(0.5 * (spread + np.square(whitened).sum(-1)))


def diagonal_gaussian_kl(mean: Values, sd: Values, prior_mean: Values, prior_sd: Values) -> Array:
    """KL of normals with independent coordinates, summed over the last dimension.

    ½ Σ_j [r_j² − 1 − 2 log r_j + ((μ_Q − μ_P)_j / s_P,j)²] with r_j = s_Q,j / s_P,j. A single sd
    stands for all d coordinates, and counts d times.

    Args:
        mean: (..., d).
        sd: (..., d) or a number, 0 or more; 0 gives ∞.
        prior_mean: (..., d) or a number.
        prior_sd: (..., d) or a number, above 0.
    Returns:
        (...), each term of the sum at least 0.
    Raises:
        DataError: numbers that are not finite, an sd out of range, or shapes that do not broadcast.
    """
    where = "diagonal_gaussian_kl"
    shift = _difference(mean, prior_mean, where)
    own = scale(sd, "sd", where, zero=True)
    prior = scale(prior_sd, "prior_sd", where)
    shape = common_shape(where, means=shift, sd=own, prior_sd=prior)
    ratio = np.broadcast_to(own / prior, shape)
    return np.asarray(0.5 * (_spread(ratio) + np.square(shift / prior + np.zeros(shape)).sum(-1)))


def low_rank_gaussian_kl(
    mean: Values,
    variance: Values,
    factor: Values,
    prior_mean: Values,
    prior_variance: Values,
    prior_factor: Values | None = None,
) -> Array:
    """KL of normals with covariances diag(v) + F Fᵀ, in O(d r²) time and O(d r) memory.

    With the prior's C = I + FᵀV⁻¹F = LLᵀ, and its F and V (Woodbury), for any matrix X of d rows

        tr(Xᵀ Σ_P⁻¹ X) = ‖V^(−½) X‖² − ‖L⁻¹ FᵀV⁻¹ X‖²,

    applied to X = Δ, to X = F_Q and, without forming it, to X = diag(v_Q)^½; and
    log|Σ| = Σ_j log v_j + log|C|. Terms of size d are subtracted: the absolute error is about
    1e-15 d.

    Args:
        mean: (..., d); leading dimensions broadcast.
        variance: v_Q, (..., d), above 0.
        factor: F_Q, (..., d, r).
        prior_mean: (..., d).
        prior_variance: v_P, (..., d), above 0.
        prior_factor: F_P, (..., d, r); None for a diagonal prior.
    Returns:
        (...).
    Raises:
        DataError: numbers that are not finite, a variance of 0 or less, or wrong shapes.
    """
    where = "low_rank_gaussian_kl"
    shift = _difference(mean, prior_mean, where)
    d = shift.shape[-1]
    v = per_coordinate(scale(variance, "variance", where), "variance", d, where)
    w = per_coordinate(scale(prior_variance, "prior_variance", where), "prior_variance", d, where)
    F = _factor(factor, "factor", d, where)
    G = (
        np.zeros((d, 1))
        if prior_factor is None
        else _factor(prior_factor, "prior_factor", d, where)
    )
    common_shape(where, means=shift[..., None], variance=v[..., None], factor=F[..., :1])
    common_shape(
        where, prior_variance=w[..., None], prior_factor=G[..., :1], means=shift[..., None]
    )

    G_scaled = G / w[..., None]
    prior_chol = np.asarray(np.linalg.cholesky(_capacity(G, w)), dtype=np.float64)

    def squared(X: Array) -> Array:
        """tr(Xᵀ Σ_P⁻¹ X)."""
        inner = np.linalg.solve(prior_chol, np.swapaxes(G_scaled, -1, -2) @ X)
        outer = np.square(X / np.sqrt(w)[..., None]).sum((-2, -1))
        return np.asarray(outer - np.square(inner).sum((-2, -1)))

    # tr(Σ_P⁻¹ diag(v)) = Σ_j v_j/w_j − tr(C⁻¹ Gᵀ W⁻¹ diag(v) W⁻¹ G).
    columns = np.linalg.solve(prior_chol, np.swapaxes(G_scaled * np.sqrt(v)[..., None], -1, -2))
    spread = _spread(np.sqrt(v / w)) - np.square(columns).sum((-2, -1)) + squared(F)
    own_chol = np.asarray(np.linalg.cholesky(_capacity(F, v)), dtype=np.float64)
    volume = np.subtract(_log_determinant(prior_chol), _log_determinant(own_chol))
    return np.asarray(0.5 * (spread + volume + squared(shift[..., None])))


def categorical_kl(probabilities: Values, prior_probabilities: Values) -> Array:
    """Σ_k w_k log(w_k / p_k) over a finite set: of hypotheses, or of priors for a hyperposterior.

    Args:
        probabilities: w, (..., k), sums of 1.
        prior_probabilities: p, (..., k), sums of 1.
    Returns:
        (...); ∞ where the prior excludes what the posterior does not.
    Raises:
        DataError: negative probabilities, sums other than 1, or shapes that do not broadcast.
    """
    where = "categorical_kl"
    own = _distribution(probabilities, "probabilities", where)
    prior = _distribution(prior_probabilities, "prior_probabilities", where)
    common_shape(where, probabilities=own, prior_probabilities=prior)
    if own.shape[-1] != prior.shape[-1]:
        raise DataError(
            where,
            needed="both distributions over the same set",
            found=f"{own.shape[-1]} and {prior.shape[-1]} elements",
            do="Give the prior probability of every element.",
        )
    return np.asarray(np.maximum(rel_entr(own, prior).sum(-1), 0.0))


def scale(value: Values, name: str, where: str, *, zero: bool = False) -> Array:
    """Standard deviations or variances: finite and above 0, or at least 0."""
    array = as_array(value, name, where)
    good = np.isfinite(array) & ((array >= 0.0) if zero else (array > 0.0))
    if not good.all():
        raise DataError(
            where,
            needed=f"{name} finite and {'0 or more' if zero else 'above 0'}",
            found=f"{array[~good].flat[0]:g}",
            do="Give standard deviations and variances as they are, not their logarithms.",
        )
    return array


def per_coordinate(array: Array, name: str, d: int, where: str) -> Array:
    """(..., d) from one number for all coordinates or one for each."""
    if array.shape[-1:] not in ((), (1,), (d,)):
        raise DataError(
            where,
            needed=f"{name} as one number or with {d} coordinates last",
            found=f"shape {array.shape}",
            do="Give it for the coordinates of the means.",
        )
    return array + np.zeros(d)


def _difference(mean: Values, prior_mean: Values, where: str) -> Array:
    own, prior = as_array(mean, "mean", where), as_array(prior_mean, "prior_mean", where)
    common_shape(where, mean=own, prior_mean=prior)
    shift = np.asarray(own - prior)
    if shift.ndim == 0 or not np.isfinite(shift).all():
        raise DataError(
            where,
            needed="finite means with the coordinates last",
            found=f"shape {shift.shape}" if shift.ndim == 0 else "infinity",
            do="Write a single coordinate as [x]: its number of coordinates enters the KL.",
        )
    return shift


def _cholesky(value: Values, name: str, d: int, where: str) -> Array:
    matrix = as_array(value, name, where)
    problem = ""
    if matrix.ndim < 2 or matrix.shape[-2:] != (d, d):
        problem = f"shape {matrix.shape}"
    elif not np.isfinite(matrix).all():
        problem = "infinity"
    elif not np.allclose(matrix, np.swapaxes(matrix, -1, -2), rtol=1e-9, atol=1e-12):
        problem = "a matrix that is not symmetric"
    else:
        try:
            return np.asarray(np.linalg.cholesky(matrix))
        except np.linalg.LinAlgError:
            problem = "a matrix that is not positive definite"
    raise DataError(
        where,
        needed=f"{name} symmetric and positive definite, (..., {d}, {d})",
        found=problem,
        do="A posterior without spread in some direction has KL = ∞: add some, or use a hold-out.",
    )


def _factor(value: Values, name: str, d: int, where: str) -> Array:
    factor = as_array(value, name, where)
    if factor.ndim < 2 or factor.shape[-2] != d or not np.isfinite(factor).all():
        raise DataError(
            where,
            needed=f"{name} finite and of shape (..., {d}, rank)",
            found=f"shape {factor.shape}",
            do="Put the coordinates before the rank.",
        )
    return factor


def _distribution(value: Values, name: str, where: str) -> Array:
    array = np.atleast_1d(as_array(value, name, where))
    sums = array.sum(-1)
    if (array < 0.0).any() or not np.allclose(sums, 1.0, rtol=0.0, atol=1e-9):
        raise DataError(
            where,
            needed=f"{name} of 0 or more that sum to 1 over the last dimension",
            found=f"a smallest of {array.min():g} and sums from {sums.min():g} to {sums.max():g}",
            do="Divide them by their sum.",
        )
    return array


def _spread(ratio: Array) -> Array:
    """Σ_j r_j² − 1 − 2 log r_j over the last dimension; ∞ where an r_j is 0."""
    with np.errstate(divide="ignore"):
        log_ratio = 2.0 * np.log(ratio)
    return np.asarray((np.expm1(log_ratio) - log_ratio).sum(-1))


def _capacity(factor: Array, variance: Array) -> Array:
    """I + FᵀV⁻¹F."""
    scaled = factor / variance[..., None]
    return np.asarray(np.eye(factor.shape[-1]) + np.swapaxes(factor, -1, -2) @ scaled)


def _log_determinant(cholesky: Array) -> Array:
    return np.asarray(2.0 * np.log(np.diagonal(cholesky, axis1=-2, axis2=-1)).sum(-1))
