"""Amit & Meir's bound over tasks, and its form with an inverse of kl per task.

An environment τ draws tasks D_i iid, i = 1, …, T, and each task a sample S_i of size m_i. The base
learner is one fixed map (S_i, P) → Q_i; a prior P is drawn from the hyperposterior 𝒬. Then

    R̂ = E_{P~𝒬} (1/T) Σ_i R̂_i(Q_i),       R = E_{P~𝒬} E over a new task, its sample, Q and a point,
    K_H = KL(𝒬‖𝒫),                          K_i = E_{P~𝒬} KL(Q_i‖P).

With δ/2 for the environment and δ/(2T) for each task, with probability at least 1 − δ, for all 𝒬 at
once,

    R ≤ R̂ + (1/T) Σ_i √((K_H + K_i + log(2T m_i/δ)) / (2(m_i − 1)))
          + √((K_H + log(2T/δ)) / (2(T − 1))).

K_H stands inside every within-task root: with few samples per task it is paid in full there,
whatever T. And log T stands there too, so that the bound rises again for very many tasks of few
samples.

Source: Amit & Meir 2018, Theorem 2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import Array, Values, task_arguments
from hbmeta.bounds.inverse import kl_inverse
from hbmeta.errors import DataError

__all__ = ["amit_meir", "amit_meir_kl"]


def amit_meir(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
) -> Bound:
    """Amit & Meir 2018, Theorem 2.

    Assumes: tasks iid, samples iid given their task, losses in [0, 1], 𝒫 fixed before any
    meta-training data, posteriors by one fixed map of (S_i, P) and of no other task, the same
    sample sizes in future tasks.

    Args:
        risk: R̂ in [0, 1], or R̂_i with the tasks last.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        task_kls: K_i in nats from a closed form, one number or with the tasks last.
        n_samples: m_i, at least 2, one number or with the tasks last.
        n_tasks: T, at least 2.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    given = task_arguments(
        "amit_meir",
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
    doubt = np.log(2.0 * given.column("n_tasks") * m / given.column("delta"))
    paid = given.column("hyper_kl") + given.task_kls + doubt
    within = np.sqrt(paid / (2.0 * (m - 1.0))).mean(-1)
    across = _environment(given.hyper_kl, T, given.delta)
    return bound_of_terms(
        "Amit & Meir 2018, Theorem 2",
        empirical=given.mean_risk,
        within_task=within,
        across_task=across,
    )


def amit_meir_kl(
    *,
    risk: Values,
    hyper_kl: Values,
    task_kls: Values,
    n_samples: Values,
    n_tasks: Values,
    delta: Values,
    environment: Literal["root", "kl"] = "root",
) -> Bound:
    """Amit & Meir's argument with Maurer's kl bound in every task.

    R̃ := (1/T) Σ_i kl⁻¹(R̂_i, (K_H + K_i + log(4T√m_i/δ)) / m_i) bounds the mean true risk of the
    training tasks. `environment="root"` adds their environment term to it; "kl" (our improvement)
    passes it through kl⁻¹(·, (K_H + log(4√T/δ)) / T), which is smaller for every T ≥ 2.

    The bound is about each R̂_i. Means over tasks of the risk and of the KL may stand in for them
    where all m_i are equal: kl⁻¹ is concave in (q, c) jointly, so this can only raise the bound.

    Assumes: what `amit_meir` does. Samples of 1 are allowed.

    Args:
        risk: R̂_i in [0, 1] with the tasks last, or their mean.
        hyper_kl: K_H = KL(𝒬‖𝒫) in nats, (...); ∞ gives the trivial bound.
        task_kls: K_i in nats from a closed form, one number or with the tasks last.
        n_samples: m_i, at least 1, one number or with the tasks last.
        n_tasks: T, at least 2, or 1 with `environment="kl"`.
        delta: probability with which the bound may fail.
        environment: "root" or "kl", the step from the training tasks to a new one.
    Raises:
        DataError: an argument is out of its range; a mean risk or KL beside unequal m_i.
    """
    where = "amit_meir_kl"
    if environment not in ("root", "kl"):
        raise DataError(
            where,
            needed="environment 'root' or 'kl'",
            found=repr(environment),
            do="'root' is the published environment term.",
        )
    given = task_arguments(
        where,
        risk=risk,
        hyper_kl=hyper_kl,
        task_kls=task_kls,
        n_samples=n_samples,
        n_tasks=n_tasks,
        delta=delta,
        least_tasks=2 if environment == "root" else 1,
    )
    m, T, delta = given.n_samples, given.n_tasks, given.delta
    if given.risk.shape[-1] == 1 and not given.equal_samples.all():
        raise DataError(
            where,
            needed="the risk of every task, where their samples are unequal",
            found="one risk for all",
            do="Give the empirical risks with the tasks last.",
        )
    doubt = np.log(4.0 * given.column("n_tasks") * np.sqrt(m) / given.column("delta"))
    c = (given.column("hyper_kl") + given.task_kls + doubt) / m
    inner = kl_inverse(given.risk, c).mean(-1)
    if environment == "root":
        across = _environment(given.hyper_kl, T, delta)
        raw = inner + across
    else:
        raw = kl_inverse(inner, (given.hyper_kl + np.log(4.0 * np.sqrt(T) / delta)) / T)
        across = raw - inner
    return bound_of_terms(
        "Amit & Meir 2018 with a kl inverse per task",
        empirical=given.mean_risk,
        within_task=inner - given.mean_risk,
        across_task=across,
        raw=raw,
    )


def _environment(hyper_kl: Array, T: Array, delta: Array) -> Array:
    """√((K_H + log(2T/δ)) / (2(T − 1))), from the training tasks to a new one, at δ/2."""
    root: Array = np.sqrt((hyper_kl + np.log(2.0 * T / delta)) / (2.0 * (T - 1.0)))
    return root
