"""Bounds over tasks that treat all samples of all tasks as one sample.

Environment, tasks, base learner, K_H and K_i as in `amit_meir`; R̃ is the mean true risk of the
training tasks. Take (P, h_1, …, h_T) as one hypothesis, with prior 𝒫 ⊗ P^T, posterior 𝒬 ⊗ ∏_i Q_i^P
and KL K_H + Σ_i K_i. With δ/2 each, with probability at least 1 − δ, for all 𝒬 at once,

    kl(R̂‖R̃) ≤ ε_T := (K_H + Σ_i K_i + log(4√(Tm)/δ)) / (Tm)
    kl(R̃‖R) ≤ ε_E := (K_H + log(4√T/δ)) / T.

First line: for fixed (P, h_1, …, h_T) the Tm losses are independent in [0, 1] with different means,
and E exp(Tm kl(mean‖mean of the means)) ≤ 2√(Tm), because their sum is dominated in convex order by
a binomial with the mean of their means (Hoeffding 1956). It needs no fixed map: Q_i may depend on
all tasks. Second line: the T true risks are iid given P; here the fixed map is needed.

K_H is divided by Tm within tasks, not by m as in Amit & Meir's bound: hence far smaller.

Unequal m_i, with n₀ := T min_i m_i ≥ 2: the first line becomes

    kl₊(R̂‖R̃) ≤ (K_H + Σ_i K_i + log(2n₀/δ)) / (n₀ − 1),

kl₊ = kl where R̂ < R̃ and else 0, with R̂ the mean over tasks of their mean losses. To weigh tasks by
their samples is not allowed in the second line: where m_i goes with difficulty it fails.

The idea is Guan & Lu's (2022); the statement and its proof are ours.
"""

from __future__ import annotations

import numpy as np

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import Array, TaskArguments, Values, task_arguments
from hbmeta.bounds.inverse import kl_inverse
from hbmeta.errors import DataError

__all__ = ["joint_kl", "joint_root"]


def joint_kl(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
) -> Bound:
    """R ≤ kl⁻¹(kl⁻¹(R̂, ε_T), ε_E).

    Assumes: tasks iid, samples independent given their task, losses in [0, 1], 𝒫 fixed before any
    meta-training data, posteriors by one fixed map of (S_i, P), the same sample sizes in future
    tasks.

    Args:
        risk: R̂ in [0, 1], or R̂_i with the tasks last; the mean counts every task once.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        task_kls: K_i in nats from a closed form, one number (their mean) or with the tasks last.
        n_samples: m_i, at least 1, one number or with the tasks last.
        n_tasks: T, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "joint_kl"
    given = task_arguments(
        where,
        risk=risk,
        hyper_kl=hyper_kl,
        task_kls=task_kls,
        n_samples=n_samples,
        n_tasks=n_tasks,
        delta=delta,
    )
    within, across = _rates(given, where)
    mean = given.mean_risk
    of_training_tasks = kl_inverse(mean, within)
    raw = kl_inverse(of_training_tasks, across)
    return bound_of_terms(
        "Joint kl",
        empirical=mean,
        within_task=of_training_tasks - mean,
        across_task=raw - of_training_tasks,
        raw=raw,
    )


def joint_root(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
) -> Bound:
    """R ≤ R̂ + √(ε_T/2) + √(ε_E/2): `joint_kl` through Pinsker's inequality, never smaller.

    Args:
        risk: as for `joint_kl`.
        hyper_kl: as for `joint_kl`.
        task_kls: as for `joint_kl`.
        n_samples: as for `joint_kl`.
        n_tasks: as for `joint_kl`.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "joint_root"
    given = task_arguments(
        where,
        risk=risk,
        hyper_kl=hyper_kl,
        task_kls=task_kls,
        n_samples=n_samples,
        n_tasks=n_tasks,
        delta=delta,
    )
    within, across = _rates(given, where)
    return bound_of_terms(
        "Joint root",
        empirical=given.mean_risk,
        within_task=np.sqrt(0.5 * within),
        across_task=np.sqrt(0.5 * across),
    )


def _rates(given: TaskArguments, where: str) -> tuple[Array, Array]:
    """ε_T and ε_E."""
    T, K_H, delta = given.n_tasks, given.hyper_kl, given.delta
    across = (K_H + np.log(4.0 * np.sqrt(T) / delta)) / T
    n = T * given.n_samples.min(-1)
    paid = K_H + given.summed_task_kls
    equal = given.equal_samples
    if (~equal & (n < 2.0)).any():
        raise DataError(
            where,
            needed="two samples or more in all, where their numbers are unequal",
            found=f"{n.min():g}",
            do="Give the tasks more data.",
        )
    alike = (paid + np.log(4.0 * np.sqrt(n) / delta)) / n
    unlike = (paid + np.log(2.0 * n / delta)) / np.maximum(n - 1.0, 1.0)
    return np.where(equal, alike, unlike), np.asarray(across)
