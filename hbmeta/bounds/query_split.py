"""Query-split bound: adapt on the support of a task, certify on its query.

Task i has a support S_i and a disjoint query set U_i. The base learner sees S_i and the prior P
only; it may return a point mass. X_i(P) is the mean loss of its predictor on U_i. Given P the X_i
are iid in [0, 1] with mean R(P) = E over a new task, its support, the adaptation and a query: there
is no gap within a task to pay for. Maurer's bound with the *tasks* as the sample and P ~ 𝒬 as the
randomised predictor gives, with probability at least 1 − δ, for all 𝒬 at once,

    R(𝒬) ≤ kl⁻¹(E_{P~𝒬} (1/T) Σ_i X_i(P), (K_H + log(2√T/δ)) / T),     K_H = KL(𝒬‖𝒫).

The query labels may be used for meta-training: that is what "for all 𝒬" is for. The price is T, not
the number of points, in the denominator, and K_H in the dimension of θ.
"""

from __future__ import annotations

import numpy as np

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import Values, task_arguments
from hbmeta.bounds.inverse import kl_inverse

__all__ = ["query_split"]


def query_split(*, risk: Values, hyper_kl: Values, n_tasks: Values, delta: Values) -> Bound:
    """R ≤ kl⁻¹(R̂, (K_H + log(2√T/δ))/T), R̂ the mean query loss under P ~ 𝒬.

    Assumes: tasks iid; losses in [0, 1]; the hyperprior 𝒫 fixed before any meta-training data; each
    task adapted by one fixed map of its support and P (a random seed counts as data of the task);
    the law of support sizes the same for future tasks. Queries of unequal size are fine: each task
    counts once. Only θ is softened, 𝒬 = N(θ̂, κ²I); a point mass 𝒬 has K_H = ∞.

    Args:
        risk: R̂ in [0, 1], or E_P X_i(P) with the tasks last.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        n_tasks: T, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    given = task_arguments(
        "query_split", risk=risk, hyper_kl=hyper_kl, n_tasks=n_tasks, delta=delta
    )
    T, mean = given.n_tasks, given.mean_risk
    raw = kl_inverse(mean, (given.hyper_kl + np.log(2.0 * np.sqrt(T) / given.delta)) / T)
    return bound_of_terms(
        "Query split (Maurer 2004 over tasks)", empirical=mean, across_task=raw - mean, raw=raw
    )
