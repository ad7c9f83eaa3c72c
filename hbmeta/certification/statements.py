"""One theorem with numbers put in: computed here, and checked here from the same inputs.

Inputs are plain numbers and lists, so that a file holds all that the bound was computed from:

    losses      (T,) X_i per task of a predictor that is not random           → mean
    draws       (M,) Y_j of fresh draws of a random one, with δ′              → monte_carlo
    candidates  (k,) exact risks of a finite set, averaged with the weights   → Σ w_k X_k
    hyper       dimension, distance ‖θ̂ − θ_0‖, sd κ_Q, prior_sd κ_P           → gaussian_hyper_kl
    weights     (k,) 𝒬 over a finite set, prior_weights (k,)                  → categorical_kl
    task_kls    (T,) K_i;  samples (T,) m_i

`delta` is what the theorem gets, `evaluation_delta` what the Monte-Carlo limit gets; the two add up
to what the statement costs, where the first counts once for each κ_P of `grid` that was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbmeta import bounds

__all__ = ["OVER_TASKS", "Statement", "state"]

OVER_TASKS: dict[str, Callable[..., bounds.Bound]] = {
    "meta_test": bounds.meta_test,
    "query_split": bounds.query_split,
    "joint_kl": bounds.joint_kl,
    "amit_meir_kl": bounds.amit_meir_kl,
    "separate_roots": bounds.separate_roots,
    "amit_meir": bounds.amit_meir,
}
"""The theorems about the average future task that `certify` knows."""
ONE_TASK = {"new_task": bounds.new_task, "hold_out": bounds.hold_out}
"""The theorems about one task, after its data."""
WITHIN = ("joint_kl", "amit_meir_kl", "separate_roots", "amit_meir")
"""Those that pay for the samples within tasks, and so need a KL per task."""


@dataclass(frozen=True)
class Statement:
    """With probability at least 1 − `cost`, the risk is at most `value`.

    Attributes:
        bound: name of the theorem in `hbmeta.bounds`.
        theorem: its name and source.
        value: min(1, raw).
        raw: the right-hand side, which may exceed 1.
        vacuous: whether raw ≥ 1.
        measured: the empirical risk as measured.
        evaluation: what is paid for measuring a random predictor by finitely many draws.
        within_task: what is paid for finitely many samples in a task.
        across_task: what is paid for finitely many tasks.
        hyper_kl: K_H in nats; None where the theorem has none.
        cost: δ of the statement, all parts together.
        beside: whether it stands beside the certificate at a δ of its own: it and the certificate
            do not hold together at 1 − δ.
        inputs: all that it was computed from.
    """

    bound: str
    theorem: str
    value: float
    raw: float
    vacuous: bool
    measured: float
    evaluation: float
    within_task: float
    across_task: float
    hyper_kl: float | None
    cost: float
    beside: bool
    inputs: Mapping[str, Any]


def state(bound: str, inputs: Mapping[str, Any], *, beside: bool = False) -> Statement:
    """The statement of a theorem at its inputs.

    Raises:
        DataError: an argument of the theorem is out of its range.
        KeyError: an input is missing.
    """
    delta, evaluation_delta = inputs["delta"], inputs.get("evaluation_delta", 0.0)
    measured = _measured(inputs)
    limit = measured
    if "draws" in inputs:
        limit = float(
            bounds.monte_carlo(risk=measured, n_draws=len(inputs["draws"]), delta=evaluation_delta)
        )
    hyper_kl = _hyper_kl(inputs)
    if bound in ONE_TASK:
        found = _one_task(bound, inputs, limit)
    else:
        arguments: dict[str, Any] = {"risk": limit, "n_tasks": inputs["n_tasks"], "delta": delta}
        if bound != "meta_test":
            arguments["hyper_kl"] = hyper_kl
        if bound in WITHIN:
            kls = inputs["task_kls"]
            # One average of draws does not know each R̂_i. Where a theorem takes kl⁻¹ per task, both
            # means stand in together, which joint concavity allows; one of them alone may not.
            arguments["task_kls"] = np.mean(kls) if bound == "amit_meir_kl" else kls
            arguments["n_samples"] = inputs["samples"]
        found = OVER_TASKS[bound](**arguments)
    return Statement(
        bound=bound,
        theorem=found.theorem,
        value=float(found.value),
        raw=float(found.raw),
        vacuous=bool(found.vacuous),
        measured=measured,
        evaluation=float(found.empirical) - measured,
        within_task=float(found.within_task),
        across_task=float(found.across_task),
        hyper_kl=hyper_kl,
        cost=float(delta * len(inputs.get("grid", [None])) + evaluation_delta),
        beside=beside,
        inputs=dict(inputs),
    )


def _measured(inputs: Mapping[str, Any]) -> float:
    if "candidates" in inputs:
        return float(np.dot(inputs["weights"], inputs["candidates"]))
    return float(np.mean(inputs["draws" if "draws" in inputs else "losses"]))


def _hyper_kl(inputs: Mapping[str, Any]) -> float | None:
    if "hyper" in inputs:
        hyper = inputs["hyper"]
        # ‖θ̂ − θ_0‖² is all that the formula has of the D coordinates.
        mean = np.zeros(int(hyper["dimension"]))
        mean[0] = hyper["distance"]
        return float(bounds.gaussian_hyper_kl(mean, 0.0, hyper["sd"], hyper["prior_sd"]))
    if "weights" in inputs:
        return float(bounds.categorical_kl(inputs["weights"], inputs["prior_weights"]))
    return None


def _one_task(bound: str, inputs: Mapping[str, Any], limit: float) -> bounds.Bound:
    samples, delta = inputs["samples"][0], inputs["delta"]
    if bound == "hold_out":
        return bounds.hold_out(risk=limit, n_samples=samples, delta=delta)
    return bounds.new_task(risk=limit, kl=inputs["task_kls"][0], n_samples=samples, delta=delta)
