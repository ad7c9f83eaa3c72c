"""Bounds on the risk of a randomised predictor on one task, from that task's own sample.

A prior P over hypotheses h, fixed before the sample S = (z_1, …, z_n) is seen; S iid; a loss
ℓ(h, z) in [0, 1]. For a posterior Q let R̂ be the mean over S and h ~ Q of the loss, R its
expectation over a new z, and

    c = (KL(Q‖P) + log(2√n/δ)) / n.

Every bound below holds with probability at least 1 − δ over S, for all Q at once, so that Q may
depend on S in any way. All but McAllester's and Catoni's come from Maurer's kl(R̂‖R) ≤ c, which
rests on E e^(n kl(R̂‖R)) ≤ 2√n, and the order of those is

    seeger_kl ≤ quadratic = thiemann at its best temperature ≤ seeger_relaxed,
    seeger_kl ≤ maurer.

So the kl inverse is the one to quote; the others say how it behaves: like √(c/2) far from R̂ = 0
and like 2c at R̂ = 0.

Choosing the smallest of several of these on one sample is free among the five that are implied by
Maurer's inequality, and needs a union bound otherwise.

Sources: McAllester 1999; Seeger 2002; Langford 2005; Maurer 2004; Catoni 2007; Thiemann, Igel,
Wintenberger & Seldin 2017; Pérez-Ortiz, Rivasplata, Shawe-Taylor & Szepesvári 2021 (quadratic).
"""

from __future__ import annotations

import numpy as np

from hbmeta.bounds.bound import Bound, bound_of_terms
from hbmeta.bounds.checks import Array, Values, common_shape, positive, single_task_arguments
from hbmeta.bounds.inverse import kl_inverse
from hbmeta.errors import DataError

__all__ = [
    "catoni",
    "maurer",
    "mcallester",
    "new_task",
    "quadratic",
    "seeger_kl",
    "seeger_relaxed",
    "thiemann",
]


def mcallester(*, risk: Values, kl: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ R̂ + √((KL + log(n/δ)) / (2(n − 1))), McAllester's older bound.

    The form inside Amit & Meir's theorem. `maurer` is smaller for every n ≥ 2, and holds at n = 1.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 2.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "mcallester"
    risk, kl, n, delta = single_task_arguments(where, risk, kl, n_samples, delta, least=2)
    gap = np.sqrt((kl + np.log(n / delta)) / (2.0 * (n - 1.0)))
    return bound_of_terms("McAllester 1999", empirical=risk, within_task=gap)


def maurer(*, risk: Values, kl: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ R̂ + √((KL + log(2√n/δ)) / (2n)): Pinsker's inequality on kl(R̂‖R) ≤ c.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    risk, kl, n, delta = single_task_arguments("maurer", risk, kl, n_samples, delta)
    return bound_of_terms(
        "Maurer 2004", empirical=risk, within_task=np.sqrt(0.5 * _complexity(kl, n, delta))
    )


def seeger_kl(*, risk: Values, kl: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ kl⁻¹(R̂, c): Langford & Seeger's bound with Maurer's constant 2√n.

    The original constant, log((n + 1)/δ), is larger for every n ≥ 2.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    return _kl_bound("Langford & Seeger, Maurer 2004", "seeger_kl", risk, kl, n_samples, delta)


def quadratic(*, risk: Values, kl: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ (√(R̂ + c/2) + √(c/2))², from kl(q‖p) ≥ (p − q)²/(2p).

    Smooth in R̂ and KL, and close to `seeger_kl` where the risk is small: a good objective.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    risk, kl, n, delta = single_task_arguments("quadratic", risk, kl, n_samples, delta)
    c = _complexity(kl, n, delta)
    # The square, multiplied out, less R̂.
    gap = c + np.sqrt(c * (c + 2.0 * risk))
    return bound_of_terms("Pérez-Ortiz et al. 2021, quadratic", empirical=risk, within_task=gap)


def seeger_relaxed(*, risk: Values, kl: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ R̂ + √(2R̂c) + 2c, the quadratic bound with √(x + y) ≤ √x + √y.

    What Amit & Meir's code calls the Seeger bound.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    risk, kl, n, delta = single_task_arguments("seeger_relaxed", risk, kl, n_samples, delta)
    c = _complexity(kl, n, delta)
    with np.errstate(invalid="ignore"):  # 0 · ∞ where R̂ = 0 and KL = ∞
        gap = np.sqrt(2.0 * risk * c) + 2.0 * c
    return bound_of_terms("Seeger, relaxed", empirical=risk, within_task=gap)


def thiemann(
    *,
    risk: Values,
    kl: Values,
    n_samples: Values,
    delta: Values,
    temperature: Values | None = None,
) -> Bound:
    """R ≤ R̂/(1 − λ/2) + c/(λ(1 − λ/2)) for all λ in (0, 2) at once.

    Linear in R̂ and in KL for a given λ. The best λ = 2/(1 + √(1 + 2R̂/c)) gives `quadratic`, and
    may be chosen after the data because the bound holds for all λ simultaneously.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 1.
        delta: probability with which the bound may fail.
        temperature: λ in (0, 2); None takes the best.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "thiemann"
    risk, kl, n, delta = single_task_arguments(where, risk, kl, n_samples, delta)
    c = _complexity(kl, n, delta)
    if temperature is None:
        chosen = 2.0 / (1.0 + np.sqrt(1.0 + 2.0 * risk / c))
    else:
        chosen = positive(temperature, "temperature", where)
        if (chosen >= 2.0).any():
            raise DataError(
                where,
                needed="a temperature in (0, 2)",
                found=f"{chosen.max():g}",
                do="Leave it out to take the best one: the bound holds for all at once.",
            )
        common_shape(where, temperature=chosen, others=risk + c)
    keep = 1.0 - 0.5 * chosen
    # R̂/keep − R̂ = R̂ λ/(2 keep).
    gap = 0.5 * chosen * risk / keep + c / (chosen * keep)
    return bound_of_terms("Thiemann et al. 2017", empirical=risk, within_task=gap)


def catoni(
    *, risk: Values, kl: Values, n_samples: Values, delta: Values, temperature: Values
) -> Bound:
    """R ≤ (1 − e^(−C R̂ − (KL + log(1/δ))/n)) / (1 − e^(−C)), with C fixed before the data.

    Tightest of all where C happens to suit: it pays log(1/δ) and no log √n. A C chosen after the
    data from a grid costs a union bound over the grid.

    Args:
        risk: R̂ in [0, 1]; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: n, at least 1.
        delta: probability with which the bound may fail.
        temperature: C > 0, fixed before the data.
    Raises:
        DataError: an argument is out of its range.
    """
    where = "catoni"
    risk, kl, n, delta = single_task_arguments(where, risk, kl, n_samples, delta)
    chosen = positive(temperature, "temperature", where)
    common_shape(where, temperature=chosen, others=risk + kl + n + delta)
    exponent = chosen * risk + (kl - np.log(delta)) / n
    raw = np.expm1(-exponent) / np.expm1(-chosen)
    return bound_of_terms("Catoni 2007", empirical=risk, within_task=raw - risk, raw=raw)


def new_task(*, risk: Values, kl: Values, n_samples: Values, delta: Values) -> Bound:
    """R ≤ kl⁻¹(R̂, c) for one new task, with a prior that was learned from other tasks.

    Data of other tasks are independent of the new sample S, so a prior learned from them is fixed
    as far as S is concerned: no hyper-KL is paid, and no term for the number of tasks. Q may depend
    on all of S. Legal priors, to be chosen before S is seen (or with a union bound):

    - P_θ̂, the prior at the hyper-posterior's mean;
    - one draw P ~ 𝒬;
    - the mixture ∫ P d𝒬, which for P = N(θ, s²I) and 𝒬 = N(θ̂, κ²I) is N(θ̂, (s² + κ²)I). Its KL is
      at most the expected KL under 𝒬, by convexity.

    It speaks of this task, after its data; the bounds over tasks speak of the average future task,
    before its data. The two must not be mixed. A point-mass posterior has KL = ∞ here: adapt on one
    part of the sample and use `hold_out` on the other.

    Args:
        risk: R̂ in [0, 1] of Q on all of S; broadcasts with the others.
        kl: KL(Q‖P) in nats, from a closed form; ∞ gives the trivial bound.
        n_samples: size of S, at least 1.
        delta: probability with which the bound may fail.
    Raises:
        DataError: an argument is out of its range.
    """
    name = "New task, learned prior (Maurer 2004)"
    return _kl_bound(name, "new_task", risk, kl, n_samples, delta)


def _complexity(kl: Array, n: Array, delta: Array) -> Array:
    """c = (KL + log(2√n/δ)) / n."""
    return np.asarray((kl + np.log(2.0 * np.sqrt(n) / delta)) / n)


def _kl_bound(
    theorem: str, where: str, risk: Values, kl: Values, n_samples: Values, delta: Values
) -> Bound:
    risk, kl, n, delta = single_task_arguments(where, risk, kl, n_samples, delta)
    raw = kl_inverse(risk, _complexity(kl, n, delta))
    return bound_of_terms(theorem, empirical=risk, within_task=raw - risk, raw=raw)
