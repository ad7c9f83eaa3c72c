"""Bounds from losses that nothing was adapted to: no posterior, no KL within the sample.

X_1, …, X_n iid in [0, 1] with mean R, X̄ their average. Chernoff's bound in Hoeffding's form says
P(kl(X̄‖R) > c and X̄ < R) ≤ e^(−nc), one-sided, hence with probability at least 1 − δ

    R ≤ kl⁻¹(X̄, log(1/δ)/n).

What X_i and n are differs, and is all that differs: queries of one task that is held out
(`hold_out`), tasks held out (`meta_test`), draws of a randomised predictor (`monte_carlo`). Queries
of several tasks are never pooled as if they were independent: 100 tasks of 15 queries each, where
the tasks differ, break a bound at δ = 0.05 in 30 cases of 100.

Sources: Chernoff 1952; Hoeffding 1963; Langford & Caruana 2001; Clopper & Pearson 1934.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import (
    Array,
    Values,
    common_shape,
    confidence,
    count,
    probability,
    task_arguments,
)
from hbmeta.bounds.inverse import kl_inverse
from hbmeta.errors import DataError

__all__ = ["clopper_pearson", "hold_out", "meta_test", "monte_carlo"]


def meta_test(*, risk: Values, n_tasks: Values, delta: Values) -> Bound:
    """R ≤ kl⁻¹(X̄, log(1/δ)/T) on T fresh tasks: the baseline of every certificate over tasks.

    X_i is the query loss on a fresh task after adapting to its support. No KL, nothing softened: it
    holds for a deterministic meta-learner. Fresh means that no task served training or the choice
    of anything. It speaks of the same law of tasks, supports and episodes that the T were drawn by.

    Args:
        risk: X̄ in [0, 1], or X_i with the tasks last; the mean over tasks counts each once.
        n_tasks: T, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    given = task_arguments("meta_test", risk=risk, n_tasks=n_tasks, delta=delta)
    mean = given.mean_risk
    raw = _chernoff(mean, given.n_tasks, given.delta)
    return bound_of_terms("Meta-test (Chernoff)", empirical=mean, across_task=raw - mean, raw=raw)


def hold_out(*, risk: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ kl⁻¹(R̂_U, log(1/δ)/|U|) for one task: adapt on S, certify on the rest U.

    The only certificate for a point-mass adaptation of one new task. U must not choose the
    adaptation, nor when it stops.

    Args:
        risk: R̂_U in [0, 1]; broadcasts with the others.
        n_samples: |U|, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "hold_out"
    risk = probability(risk, "risk", where)
    n, delta = count(n_samples, "n_samples", where), confidence(delta, where)
    common_shape(where, risk=risk, n_samples=n, delta=delta)
    raw = _chernoff(risk, n, delta)
    return bound_of_terms("Hold-out (Chernoff)", empirical=risk, within_task=raw - risk, raw=raw)


def monte_carlo(*, risk: Values, n_draws: Values, delta: Values) -> Array:
    """Upper confidence limit of the empirical risk R̂ of a randomised predictor, from M fresh draws.

    Draw P_j ~ 𝒬 and then h_ij ~ Q_i for every task, j = 1, …, M; Y_j = mean over tasks and points
    of the loss of these. The Y_j are iid given the data, with mean R̂: R̂ ≤ kl⁻¹(Ȳ, log(1/δ′)/M)
    with probability at least 1 − δ′ over the draws. Put the result where a bound asks for its
    risk: the two hold together with probability at least 1 − δ − δ′.

    M is fixed in advance and the draws are not those of the training. It is one-sided; log(2/δ′),
    as published, is valid too. One average does not replace the risks per task that `amit_meir_kl`
    takes: those need δ′/T each, or the mean over tasks of everything (see there).

    Args:
        risk: Ȳ in [0, 1]; broadcasts with the others.
        n_draws: M, at least 1.
        delta: δ′, probability with which the limit may fail.
    Returns:
        The limit, of the shape to which the arguments broadcast.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "monte_carlo"
    risk = probability(risk, "risk", where)
    draws, delta = count(n_draws, "n_draws", where), confidence(delta, where)
    common_shape(where, risk=risk, n_draws=draws, delta=delta)
    return _chernoff(risk, draws, delta)


def clopper_pearson(*, errors: Values, n_samples: Values, delta: Values) -> Bound:
    """Exact one-sided upper limit of a probability of error from k errors in n independent trials.

    The 1 − δ quantile of Beta(k + 1, n − k). Only for losses of 0 or 1: with other losses in [0, 1]
    it is not valid (draw a Bernoulli(X_i) in place of X_i to use it).

    Args:
        errors: k, a whole number in 0, …, n; broadcasts with the others.
        n_samples: n, at least 1: samples of one task, or tasks with a single 0-1 loss each.
        delta: probability with which the limit may fail.
    Raises:
        DataError: an argument is out of its range, or k > n.
    """
    where = "clopper_pearson"
    k = count(errors, "errors", where, least=0)
    n, delta = count(n_samples, "n_samples", where), confidence(delta, where)
    common_shape(where, errors=k, n_samples=n, delta=delta)
    if (k > n).any():
        raise DataError(
            where,
            needed="no more errors than trials",
            found=f"{np.max(k - n):g} more",
            do="Give the number of losses that are 1, of losses that are 0 or 1.",
        )
    limit = beta.ppf(1.0 - delta, k + 1.0, np.maximum(n - k, 0.5))
    raw = np.where(k == n, 1.0, limit)
    return bound_of_terms(
        "Clopper & Pearson 1934", empirical=k / n, within_task=raw - k / n, raw=raw
    )


def _chernoff(mean: Array, n: Array, delta: Array) -> Array:
    return kl_inverse(mean, -np.log(delta) / n)
