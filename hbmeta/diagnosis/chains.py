"""R̂, effective draws and divergences of Markov chains, and k̂ of weighted draws, as symptoms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hbmeta.diagnosis.records import Symptom
from hbmeta.fitted import Fitted
from hbmeta.inference.nuts import trouble
from hbmeta.posterior import TaskPosterior

__all__ = ["effective_draws", "mixes", "symptoms_of_draws"]

_LARGEST_R_HAT = 1.01
_FEWEST = 400


def mixes(fitted: Fitted) -> bool:
    """Whether these are chains of θ and φ in which R̂, effective draws and transitions are good."""
    return "divergences" in fitted.info and "r_hat" in fitted.info and not trouble(fitted.info)


def effective_draws(fitted: Fitted, posterior: TaskPosterior) -> float:
    """The least effective number of draws of a parameter; NaN where there are none."""
    for info in (posterior.info, fitted.info):
        for name in ("ess_bulk", "effective_draws"):
            if name in info:
                return float(torch.as_tensor(info[name], dtype=torch.float64).min())
    return math.nan


def symptoms_of_draws(fitted: Fitted, posterior: TaskPosterior) -> list[Symptom]:
    """What speaks against a set of draws; empty for a density and for good draws."""
    out = []
    if "divergences" in fitted.info:
        out = [_of_sampler(text) for text in trouble(fitted.info)]
    r_hat = posterior.info.get("r_hat")
    if isinstance(r_hat, Tensor) and posterior.chains > 1:
        worst = r_hat.double().nan_to_num(math.inf).reshape(len(posterior.ids), -1).amax(-1)
        bad = worst > _LARGEST_R_HAT
        if bool(bad.any()):
            measured = (
                f"split R̂ up to {float(worst.max()):.3f} (task "
                f"{posterior.ids[int(worst.argmax())]!r}), above {_LARGEST_R_HAT} in "
                f"{int(bad.sum())} of {len(worst)} tasks"
            )
            out.append(_of_mixing(measured))
    ess = posterior.info.get("ess_bulk")
    if isinstance(ess, Tensor) and not bool((ess >= _FEWEST).all()):
        out.append(_of_mixing(f"{float(ess.nan_to_num(0.0).min()):.0f} effective draws at least"))
    if "pareto_k" in fitted.info and not isinstance(fitted.info["pareto_k"], Tensor):
        out += _of_weights(fitted.info)
    return out


def _of_sampler(text: str) -> Symptom:
    return Symptom(
        name="chains",
        about="approximation",
        measured=text.split(". ")[0],
        sure="R̂ and effective draws are estimates; a divergence is a fact",
        means="the chains may not have reached all of the posterior, so that means and intervals "
        "of what they missed are off.",
        do=text.split(". ", 1)[-1],
    )


def _of_mixing(measured: str) -> Symptom:
    return Symptom(
        name="chains",
        about="approximation",
        measured=measured,
        sure="an estimate from the chains themselves, which sees only where they went",
        means="the chains of these tasks had not forgotten where they started, or are too short "
        "for the tails of an interval.",
        do="Raise warmup, thin and draws.",
    )


def _of_weights(info: dict[str, Any]) -> list[Symptom]:
    k, threshold = float(info["pareto_k"]), float(info.get("threshold", 0.7))
    if k <= threshold:
        return []
    return [
        Symptom(
            name="weights of draws",
            about="approximation",
            measured=f"Pareto k̂ = {k:.2f}, above {threshold:.2f}",
            sure="k̂ has a standard error of about 0.1",
            means="a few draws carry the posterior; another seed may give other means.",
            do="Use more draws, or NUTS.",
        )
    ]
