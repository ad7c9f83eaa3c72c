"""Type-II maximum likelihood of a mean and a variance between tasks, with its boundary at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from hbmeta.errors import DataError
from hbmeta.theory.checks import require_positive

__all__ = ["TypeTwoEstimate", "type_two_maximum_likelihood"]


@dataclass(frozen=True)
class TypeTwoEstimate:
    """Maximum of Σ_i log N(ȳ_i; μ, τ² + σ²/n_i).

    Attributes:
        mean: μ̂.
        variance: τ̂², 0 where the means vary no more than their noise explains.
        at_zero: whether τ̂² is the boundary 0; its usual standard error does not hold there.
        log_likelihood: the maximum, in nats; the spread of y inside the tasks is not in it.
    """

    mean: float
    variance: float
    at_zero: bool
    log_likelihood: float


def type_two_maximum_likelihood(
    means: Sequence[float] | Any, counts: int | Sequence[int] | Any, noise_variance: float
) -> TypeTwoEstimate:
    """μ̂ and τ̂² of φ_i ~ N(μ, τ²), y_ij ~ N(φ_i, σ²) with σ² known, φ_i integrated out.

    With v_i = τ² + σ²/n_i the maximum has μ̂ = Σ ȳ_i/v_i / Σ 1/v_i and solves
    Σ [(ȳ_i − μ̂)²/v_i² − 1/v_i] = 0, or is at τ² = 0. For equal n that is
    τ̂² = max(0, mean (ȳ_i − μ̂)² − σ²/n). Where the equation has several solutions (it can for
    unequal n) the most likely one is returned.

    Args:
        means: (tasks,) ȳ_i, two or more.
        counts: n_i ≥ 1, one number for all or (tasks,).
        noise_variance: σ² > 0.
    Raises:
        DataError: fewer than two tasks (τ² is then not identified), or values outside the domain.
    References:
        Gelman et al. (2013), Bayesian Data Analysis, 3rd ed., section 5.4.
    """
    where = "type_two_maximum_likelihood"
    require_positive(noise_variance, "noise_variance", where)
    y = np.asarray(means, dtype=np.float64)
    n = np.asarray(counts, dtype=np.float64)
    if y.ndim != 1 or len(y) < 2 or not np.isfinite(y).all():
        raise DataError(
            where,
            needed="finite means of two tasks or more, to estimate how much tasks vary",
            found=f"{means!r}",
            do="With a single task, give the variance between tasks a prior.",
        )
    if n.shape not in ((), y.shape) or not (n >= 1).all() or not (n == np.round(n)).all():
        raise DataError(
            where,
            needed=f"whole counts of at least 1, one or {len(y)}",
            found=f"{counts!r}",
            do="Leave tasks without data out.",
        )
    errors = np.broadcast_to(noise_variance / n, y.shape)
    if bool((errors == errors[0]).all()):
        variance = max(0.0, float(np.square(y - y.mean()).mean() - errors[0]))
    else:
        variance = _largest_likelihood(y, errors)
    mean, log_likelihood = _profile(y, errors, variance)
    return TypeTwoEstimate(mean, variance, variance == 0.0, log_likelihood)


def _profile(y: Any, errors: Any, variance: float) -> tuple[float, float]:
    """μ̂(τ²), and the log-likelihood there."""
    v = variance + errors
    mean = float((y / v).sum() / (1.0 / v).sum())
    return mean, float(-0.5 * (np.log(2 * np.pi * v) + np.square(y - mean) / v).sum())


def _largest_likelihood(y: Any, errors: Any) -> float:
    """τ̂² for unequal n: the best of 0 and the zeros of the score."""

    def score(variance: float) -> float:
        v = variance + errors
        mean = (y / v).sum() / (1.0 / v).sum()
        return float((np.square((y - mean) / v) - 1.0 / v).sum())

    # From the squared range on, every (ȳ_i − μ̂)² is below v_i and the score is negative.
    top = float(np.ptp(y)) ** 2
    if top == 0.0:
        return 0.0
    grid = np.concatenate([[0.0], np.geomspace(1e-9 * min(top, errors.min()), top, 400)])
    values = [score(point) for point in grid]
    candidates = [0.0]
    for left, right, before, after in zip(grid, grid[1:], values, values[1:], strict=False):
        # A maximum is where the score falls through zero.
        if before > 0.0 >= after:
            candidates.append(float(brentq(score, left, right, xtol=1e-300, rtol=1e-15)))
    return max(candidates, key=lambda variance: _profile(y, errors, variance)[1])
