"""Inverses of the binary kl divergence, rounded outward.

    kl(q‖p) = q log(q/p) + (1 − q) log((1 − q)/(1 − p))
    kl⁻¹(q, c) = sup {p ≥ q : kl(q‖p) ≤ c},     the lower one inf {p ≤ q : kl(q‖p) ≤ c}

Both ends are one problem. A mass a shrinks to a e^(−t) and the mass b = 1 − a grows by
d = a (1 − e^(−t)): a = 1 − q for the upper end, a = q for the lower one. With
ψ(x) = x − log(1 + x) ≥ 0,

    f(t) = kl = a ψ(e^(−t) − 1) + b ψ(d/b),     f′(t) = d/(b + d).

Nothing cancels in f: both terms are positive. f is convex and increasing in t (f′ grows with d), so
Newton's method comes down to the root from above and never passes it. It starts from the smallest
of three upper bounds on the root: Pinsker's d ≤ √(c/2), d ≤ c + √(c² + 2bc) from
kl ≥ d²/(2(b + d)), and t ≤ (c + b log(1/b))/a from log(b + d) ≤ 0.

Rounding. The computed f(t) is f at an argument off by a few units of ε, times 1 + a few ε. As
f(t) ≤ t f′(t) by convexity, an error of kε in f or in c moves t by no more than a fraction kε. So c
and t are enlarged by 64ε, which is more than all of that together, and the result by 4ε: it is
never on the wrong side of the true value. The upper end is within 1e-13 of it, relatively; the
lower end within 1e-10 where it is above 1e-300 (p = q e^(−t) multiplies the error by t), and 0
below.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hbmeta.bounds.checks import Array, Values, common_shape, divergence, probability

__all__ = ["kl_inverse", "kl_inverse_lower"]

EPSILON = float(np.finfo(np.float64).eps)
MARGIN = 64.0 * EPSILON
SMALLEST_MASS = 1e-290  # below it d/b overflows; enlarging b moves either end outward
SMALLEST_KL = 1e-290
LARGEST_T = 1e4  # e^(−t) is 0 long before
ITERATIONS = 100


def kl_inverse(q: Values, c: Values) -> Array:
    """Largest p with kl(q‖p) ≤ c, never below the true value.

    Args:
        q: empirical risk in [0, 1]; broadcasts.
        c: bound on kl, 0 or more, in nats; broadcasts.
    Returns:
        p in [q, 1]: 1 − e^(−c) at q = 0, 1 at q = 1 or c = ∞, q at c = 0.
    Raises:
        DataError: q outside [0, 1], c negative, or NaN.
    """
    q, c = _arguments(q, c, "kl_inverse")
    with np.errstate(over="ignore"):
        inside = (q > 0.0) & (q < 1.0) & (c > 0.0)
        shrinking = np.where(inside, 1.0 - q, 0.5)
        growing = np.where(inside, np.maximum(q, SMALLEST_MASS), 0.5)
        t = _log_ratio(shrinking, growing, np.where(inside, c, 1.0))
        p = np.where(inside, growing - shrinking * np.expm1(-t), -np.expm1(-c))
    p = np.minimum(p * (1.0 + 4.0 * EPSILON), 1.0)
    return np.asarray(np.where((q == 1.0) | (c == 0.0), q, p))


def kl_inverse_lower(q: Values, c: Values) -> Array:
    """Smallest p with kl(q‖p) ≤ c, never above the true value.

    Args:
        q: empirical risk in [0, 1]; broadcasts.
        c: bound on kl, 0 or more, in nats; broadcasts.
    Returns:
        p in [0, q]: e^(−c) at q = 1, 0 at q = 0 or c = ∞, q at c = 0.
    Raises:
        DataError: q outside [0, 1], c negative, or NaN.
    """
    q, c = _arguments(q, c, "kl_inverse_lower")
    with np.errstate(over="ignore"):
        inside = (q > 0.0) & (q < 1.0) & (c > 0.0)
        t = _log_ratio(
            np.where(inside, q, 0.5), np.where(inside, 1.0 - q, 0.5), np.where(inside, c, 1.0)
        )
        p = q * np.exp(-np.where(inside, t, c)) * (1.0 - 4.0 * EPSILON)
    # Numbers below 1e-300 are on their way to the subnormal ones, which round by more than 4ε.
    p = np.where(p < 1e-300, 0.0, p)
    return np.asarray(np.where(c == 0.0, q, p))


def _arguments(q: Values, c: Values, where: str) -> tuple[Array, Array]:
    q, c = probability(q, "q", where), divergence(c, "c", where)
    shape = common_shape(where, q=q, c=c)
    return np.broadcast_to(q, shape), np.broadcast_to(c, shape)


def _log_ratio(shrinking: Array, growing: Array, c: Array) -> Array:
    """t = log(a / what is left of a) at which kl reaches c, rounded upward; masses in (0, 1)."""
    a, b = shrinking, growing
    c = np.clip(c, SMALLEST_KL, 1e280) * (1.0 + MARGIN)
    gap = np.minimum(np.sqrt(0.5 * c), c + np.sqrt(c * (c + 2.0 * b)))
    reached = gap >= a
    start = np.where(reached, np.inf, -np.log1p(-np.where(reached, 0.0, gap / a)))
    # The smaller of the two masses is the one that is known to full relative precision.
    log_growing = np.where(b < 0.5, np.log(b), np.log1p(-np.minimum(a, 0.5)))
    t = np.minimum(np.minimum(start, (c - b * log_growing) / a), LARGEST_T)
    for _ in range(ITERATIONS):
        left = np.expm1(-t)
        growth = -a * left / b
        kl = a * _psi(left, -t) + b * _psi(growth, np.log1p(growth))
        last, t = t, np.minimum(t - (kl - c) * (1.0 + growth) / growth, LARGEST_T)
        # Newton's error is the square of its last step, relatively: f″t/f′ is at most about 1.
        if np.all(np.abs(t - last) <= 1e-10 * t):
            break
    return t * (1.0 + MARGIN)


def _psi(x: Array, log1p_x: Array) -> Array:
    """x − log(1 + x), given the logarithm, to a few units in the last place.

    With r = x/(2 + x), log(1 + x) = 2 artanh r and x − 2r = xr, so that
    ψ(x) = xr − 2(r³/3 + r⁵/5 + …); |r| ≤ 1/3 for |x| ≤ 1/2.
    """
    small: NDArray[np.bool_] = np.abs(x) <= 0.5
    near = np.where(small, x, 0.0)
    r = near / (2.0 + near)
    square = r * r
    tail = np.zeros_like(r)
    for k in range(18, 0, -1):
        tail = square * (1.0 / (2 * k + 1) + tail)
    return np.where(small, near * r - 2.0 * r * tail, x - log1p_x)
