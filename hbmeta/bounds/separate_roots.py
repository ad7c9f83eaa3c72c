"""Bounds over tasks that keep the hyper-KL out of the within-task roots.

Environment, tasks, base learner, K_H and K_i as in `amit_meir`.

**Theorem R** (our proof, in docs/certificates.md). T ≥ 2, ε in (0, 1] fixed before the data,
c_i := log(2√m_i/ε) with m_i c_i ≥ 2 (automatic for ε ≤ 1/(2T)), η := Tε + 2T(T − 1)ε². With
probability at least 1 − δ, for all 𝒬 at once,

    R ≤ R̂ + √((K_H + log(2√T/δ) + η) / (2(T − 1))) + E_P (1/T) Σ_i √((KL(Q_i^P‖P) + c_i) / (2m_i)).

As √ is concave, E_P √(KL + c) ≤ √(K_i + c): the last term is computed from K_i = E_P KL.

**The bound with the hyper-KL outside the task term**, for equal m, is the square-root form that is
often quoted as Amit & Meir's, which it is not (formalML's page on meta-learning, (7.2)):

    R ≤ R̂ + √((K_H + log(4T/δ)) / (2(T − 1))) + (1/T) Σ_i √((K_i + log(4Tm/δ)) / (2(m − 1))).

Its published proof applies McAllester's bound for all P at once, which is false. The inequality is
true all the same: ε = δ/(2T√m) makes c = log(4Tm/δ) and η ≤ δ/(2√m) + δ²/(2m) ≤ log(2√T), so that
Theorem R is smaller in both roots.
"""

from __future__ import annotations

import numpy as np

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import Values, positive, task_arguments
from hbmeta.errors import DataError

__all__ = ["account_bound", "separate_roots"]


def separate_roots(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
    epsilon: Values | None = None,
) -> Bound:
    """Theorem R: K_H in the across-task root only; unpublished, proof in docs/certificates.md.

    Assumes: tasks iid, samples iid given their task, losses in [0, 1], 𝒫 fixed before any
    meta-training data, posteriors by one fixed map of (S_i, P) and of no other task, the same
    sample sizes in future tasks.

    Args:
        risk: R̂ in [0, 1], or R̂_i with the tasks last.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        task_kls: K_i in nats from a closed form, one number or with the tasks last.
        n_samples: m_i, at least 1, one number or with the tasks last.
        n_tasks: T, at least 2.
        delta: probability with which the bound may fail.
        epsilon: ε in (0, 1], (...), fixed before the data; None for 1/(2T), good for many tasks.
            δ/(2T√m) is better for few tasks of many samples. The smaller of the two after the data
            needs a union bound.
    Raises:
        DataError: an argument is out of its range, or m_i c_i < 2.
    """
    where = "separate_roots"
    given = task_arguments(
        where,
        risk=risk,
        hyper_kl=hyper_kl,
        task_kls=task_kls,
        n_samples=n_samples,
        n_tasks=n_tasks,
        delta=delta,
        least_tasks=2,
    )
    m, T = given.n_samples, given.n_tasks
    epsilon = np.asarray(0.5 / T) if epsilon is None else positive(epsilon, "epsilon", where)
    given.require_shapes(where, epsilon=epsilon)
    c = np.log(2.0 * np.sqrt(m) / epsilon[..., None])
    if (epsilon > 1.0).any() or (m * c < 2.0).any():
        raise DataError(
            where,
            needed="epsilon in (0, 1] with m log(2√m/epsilon) ≥ 2 for every m",
            found=f"epsilon {epsilon.max():g}, and {np.min(m * c):.3g} for the least of these",
            do="Leave it out, or take less than 1 / (2 n_tasks).",
        )
    eta = T * epsilon + 2.0 * T * (T - 1.0) * epsilon**2
    doubt = np.log(2.0 * np.sqrt(T) / given.delta) + eta
    return bound_of_terms(
        "Theorem R (separate roots), docs/certificates.md",
        empirical=given.mean_risk,
        within_task=np.sqrt((given.task_kls + c) / (2.0 * m)).mean(-1),
        across_task=np.sqrt((given.hyper_kl + doubt) / (2.0 * (T - 1.0))),
    )


def account_bound(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
) -> Bound:
    """The form often quoted as Amit & Meir's, with the hyper-KL outside the task term.

    True by Theorem R, though neither theirs nor proved where it is stated. Kept because people look
    for it. `separate_roots` assumes the same, is always smaller, and takes unequal samples.

    Args:
        risk: R̂ in [0, 1], or R̂_i with the tasks last.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        task_kls: K_i in nats from a closed form, one number or with the tasks last.
        n_samples: m, at least 2 and the same for all tasks of a bound.
        n_tasks: T, at least 2.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range, or samples are unequal.
    """
    where = "account_bound"
    given = task_arguments(
        where,
        risk=risk,
        hyper_kl=hyper_kl,
        task_kls=task_kls,
        n_samples=n_samples,
        n_tasks=n_tasks,
        delta=delta,
        least_tasks=2,
        least_samples=2,
    )
    m, T = given.n_samples, given.n_tasks
    if not given.equal_samples.all():
        raise DataError(
            where,
            needed="the same number of samples in every task",
            found=f"between {m.min():g} and {m.max():g}",
            do="Use separate_roots, which is smaller as well.",
        )
    paid = given.task_kls + np.log(4.0 * given.column("n_tasks") * m / given.column("delta"))
    doubt = np.log(4.0 * T / given.delta)
    return bound_of_terms(
        "The form quoted as Amit & Meir's, hyper-KL across tasks alone, by Theorem R",
        empirical=given.mean_risk,
        within_task=np.sqrt(paid / (2.0 * (m - 1.0))).mean(-1),
        across_task=np.sqrt((given.hyper_kl + doubt) / (2.0 * (T - 1.0))),
    )
