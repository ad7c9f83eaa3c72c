"""Pareto k̂ of q(φ | S) per task, and what its weights say that q's moments should have been.

At the θ of the fit, with w_s = p(S, φ_s | θ) / q(φ_s), φ_s ~ q: k̂ below 0.7 says that the weighted
draws can be relied on, so that their mean and sd are those of p(φ | S, θ). This judges q given θ
and says nothing of what θ's own uncertainty adds.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.densities import Transported
from hbmeta.diagnosis.records import Symptom
from hbmeta.errors import HbmetaError
from hbmeta.importance import importance, largest_k
from hbmeta.posterior import TaskPosterior

__all__ = ["Corrected", "correct", "symptoms_of_weights"]


@dataclass(frozen=True)
class Corrected:
    """q with weights to p(φ | S, θ): the posterior of them, k̂ and effective draws per task."""

    posterior: TaskPosterior
    pareto_k: Tensor
    effective: Tensor

    @property
    def usable(self) -> Tensor:
        """(tasks,) whether the weights can be relied on."""
        return self.pareto_k <= float(self.posterior.info["threshold"])


def correct(posterior: TaskPosterior, draws: int, seed: int) -> Corrected | None:
    """None where q has no density, or where weights are not finite."""
    if posterior.drawn or not isinstance(posterior.density, Transported):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large k̂, which is what we want to know
            found = importance(posterior, draws=draws, seed=seed)
    except HbmetaError:
        return None
    k = found.info["pareto_k"].double().cpu()
    return Corrected(found, k, found.info["effective_draws"].double().cpu())


def symptoms_of_weights(corrected: Corrected | None, draws: int) -> list[Symptom]:
    """Tasks whose q is too far from p(φ | S, θ) for its weights."""
    if corrected is None or bool(corrected.usable.all()):
        return []
    k, limit = corrected.pareto_k.nan_to_num(math.inf), largest_k(draws)
    bad = ~corrected.usable
    worst = int(k.argmax())
    some = torch.nonzero(bad).flatten()[:3].tolist()
    names = ", ".join(repr(corrected.posterior.ids[i]) for i in some)
    return [
        Symptom(
            name="Pareto k̂ of q(φ | S)",
            about="approximation",
            measured=f"above {limit:.2f} in {int(bad.sum())} of {len(k)} tasks ({names}"
            f"{', …' if int(bad.sum()) > 3 else ''}), up to {float(k[worst]):.2f}",
            sure="k̂ has a standard error of about 0.1, and grows with the number of parameters per "
            "task",
            means="q is narrower than p(φ | S, θ) somewhere, or elsewhere, in these tasks; single "
            "parameters can still be right.",
            do="Use a wider or richer family (full rank, a flow), or NUTS.",
        )
    ]
