"""Pentina & Lampert's bound over tasks: linear in the KLs.

Environment, tasks and samples as in `amit_meir`. With m̄ the harmonic mean of the sample sizes, and
λ, β > 0 fixed before the data, with probability at least 1 − δ, for all 𝒬 at once,

    R ≤ R̂ + (1/λ + 1/(Tβ)) K_H + (1/(Tβ)) Σ_i K_i
          + λ/(8T) + β/(8m̄) + (1/λ + 1/(Tβ)) log(2/δ).

Two Hoeffding lemmas with δ/2 each: with λ for the tasks, with β for the samples within them.
λ = √T and β = √m̄ give Theorem 1 as published. The same form with β = m and a Gibbs posterior is
PACOH's objective, whose constant for losses in [0, 1] is the last line.

Sources: Pentina & Lampert 2014, Theorem 1 and Lemma 2; Rothfuss et al. 2021.
"""

from __future__ import annotations

import numpy as np

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import Array, Values, positive, task_arguments

__all__ = ["pentina_lampert"]


def pentina_lampert(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
    task_temperature: Values | None = None,
    sample_temperature: Values | None = None,
) -> Bound:
    """Pentina & Lampert 2014, Theorem 1, with the temperatures free.

    Assumes: tasks iid, samples iid given their task, losses in [0, 1], 𝒫 fixed before any
    meta-training data, posteriors by one fixed map of (S_i, P). Holds for one task and one sample
    on, and for unequal samples. Linear in the KLs, it is the largest of all here at tens or
    hundreds of tasks; without log T in its within-task term it passes below Amit & Meir's at
    thousands.

    Args:
        risk: R̂ in [0, 1], or R̂_i with the tasks last.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        task_kls: K_i = E_{P~𝒬} KL(Q_i‖P) in nats, one number or with the tasks last.
        n_samples: m_i, at least 1, one number or with the tasks last.
        n_tasks: T, at least 1.
        delta: probability with which the bound may fail.
        task_temperature: λ, (...), fixed before the data; None for √T.
        sample_temperature: β, (...), fixed before the data; None for √m̄.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "pentina_lampert"
    given = task_arguments(
        where,
        risk=risk,
        hyper_kl=hyper_kl,
        task_kls=task_kls,
        n_samples=n_samples,
        n_tasks=n_tasks,
        delta=delta,
    )
    T = given.n_tasks
    harmonic = 1.0 / np.asarray((1.0 / given.n_samples).mean(-1))
    lam = _temperature(task_temperature, "task_temperature", np.sqrt(T), where)
    beta = _temperature(sample_temperature, "sample_temperature", np.sqrt(harmonic), where)
    given.require_shapes(where, task_temperature=lam, sample_temperature=beta)
    doubt = np.log(2.0 / given.delta)
    across = (given.hyper_kl + doubt) / lam + lam / (8.0 * T)
    paid = given.hyper_kl + given.summed_task_kls + doubt
    within = paid / (T * beta) + beta / (8.0 * harmonic)
    return bound_of_terms(
        "Pentina & Lampert 2014, Theorem 1",
        empirical=given.mean_risk,
        within_task=within,
        across_task=across,
    )


def _temperature(value: Values | None, name: str, default: Array, where: str) -> Array:
    return default if value is None else positive(value, name, where)
