"""A verdict per parameter: the fit's mean and sd against those of a reference, errors counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.densities import Empirical
from hbmeta.diagnosis.chains import effective_draws, mixes
from hbmeta.diagnosis.records import Parameter, Verdict
from hbmeta.diagnosis.reference import Reference
from hbmeta.diagnosis.weights import Corrected
from hbmeta.distances import SD_LIMITS, TASK_LIMIT, moments_of
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior

# A standard error of a shift above this is too large to judge by, unless the case is clear.
_VAGUE, _CLEAR = 0.1, 0.95
# Draws of a fit whose moments are not exact.
_OWN_DRAWS = 4000

__all__ = ["judged_parameters", "verdict_of"]


@dataclass(frozen=True)
class _Yardstick:
    """Moments to judge by: per site mean and sd, with effective draws and use of each task."""

    moments: dict[str, tuple[Tensor, Tensor]]
    effective: Tensor
    usable: Tensor
    whole: bool


def _yardstick(
    judge: Reference | None, corrected: Corrected | None, seed: int
) -> _Yardstick | None:
    if judge is not None:
        found = dict(moments_of(judge.posterior, _OWN_DRAWS, seed))
        return _Yardstick(found, judge.effective, judge.usable, True)
    if corrected is not None:
        found = dict(moments_of(corrected.posterior, _OWN_DRAWS, seed))
        # Given θ: what is off there is wrong, what is not may be.
        return _Yardstick(found, corrected.effective, corrected.usable, False)
    return None


def judged_parameters(
    fitted: Fitted,
    posterior: TaskPosterior,
    judge: Reference | None,
    corrected: Corrected | None,
    seed: int,
) -> list[Parameter]:
    """Level-1 parameters where they are drawn, then the sites of every task."""
    own_draws = effective_draws(fitted, posterior)
    if math.isnan(own_draws):
        density = posterior.density
        own_draws = float(_OWN_DRAWS)
        # Nodes of a grid have no Monte Carlo error.
        if isinstance(density, Empirical) and not density.nodes:
            own_draws = float(density.phi.shape[0])
    otherwise: Verdict = "unverified"
    if mixes(fitted) and all(fitted.saw(posterior.support)):
        otherwise = "right"
    out = []
    if fitted.drawn:
        level_one = {} if judge is None else judge.level_one
        for name, drawn in fitted.globals().items():
            mean, sd = drawn.double().mean(0), drawn.double().std(0)
            of_reference = None
            if name in level_one and judge is not None and bool(judge.usable.all()):
                value = level_one[name].double()
                of_reference = (value.mean(0), value.std(0), float(judge.effective.min()))
            out += _judged(name, None, mean, sd, of_reference, own_draws, True, otherwise)
    yardstick = _yardstick(judge, corrected, seed)
    own = moments_of(posterior, _OWN_DRAWS, seed)
    for position, task in enumerate(posterior.ids):
        for name, (mean, sd) in own.items():
            of_reference = None
            if yardstick is not None and bool(yardstick.usable[position]):
                m, s = yardstick.moments[name]
                of_reference = (m[position], s[position], float(yardstick.effective[position]))
            whole = yardstick is not None and yardstick.whole
            out += _judged(
                name, task, mean[position], sd[position], of_reference, own_draws, whole, otherwise
            )
    return out


def _judged(
    name: str,
    task: object,
    mean: Tensor,
    sd: Tensor,
    of_reference: tuple[Tensor, Tensor, float] | None,
    own_draws: float,
    whole: bool,
    otherwise: Verdict,
) -> list[Parameter]:
    """The entries of one site; those that do not vary in the reference are left out."""
    out = []
    for entry in _indices(mean):
        m, s = float(mean[entry]), float(sd[entry])
        if of_reference is None:
            out.append(Parameter(name, entry, task, otherwise, math.nan, math.nan, math.nan))
            continue
        means, sds, effective = of_reference
        m_ref, s_ref = float(means[entry]), float(sds[entry])
        if not s_ref > 0:
            continue
        shift, ratio = (m - m_ref) / s_ref, s / s_ref
        verdict, sure = verdict_of(shift, ratio, effective, own_draws)
        if verdict == "right" and not whole:
            verdict, sure = "unverified", math.nan
        out.append(Parameter(name, entry, task, verdict, shift, ratio, sure))
    return out


def verdict_of(shift: float, ratio: float, effective: float, own: float) -> tuple[Verdict, float]:
    """The verdict on a shift and an sd ratio, and its probability.

    With n and n' draws of the reference and of the fit, in the reference's sds, the mean is off by
    √(1/n + r²/n') and the ratio r by r √(1/n + 1/n'): twice the variance of normal draws, 1/2n,
    because posteriors of scales have heavy tails.
    """
    if not math.isfinite(shift) or not math.isfinite(ratio):
        # A posterior that overflowed is no posterior.
        return "wrong", 1.0
    of_shift = math.sqrt(1.0 / effective + ratio**2 / own)
    of_ratio = ratio * math.sqrt(1.0 / effective + 1.0 / own)
    low, high = SD_LIMITS
    right = _inside(shift, of_shift, -TASK_LIMIT, TASK_LIMIT) * _inside(ratio, of_ratio, low, high)
    sure = max(right, 1.0 - right)
    vague = math.sqrt(1.0 / effective) > _VAGUE or math.sqrt(1.0 / own) > _VAGUE
    if vague and sure < _CLEAR:
        return "unverified", math.nan
    return ("right" if right >= 0.5 else "wrong"), sure


def _inside(value: float, error: float, low: float, high: float) -> float:
    """P(low ≤ value + e ≤ high), e ~ N(0, error²)."""
    if error == 0.0:
        return float(low <= value <= high)
    above, below = ((value - limit) / error / math.sqrt(2.0) for limit in (low, high))
    return 0.5 * (math.erfc(below) - math.erfc(above))


def _indices(value: Tensor) -> list[tuple[int, ...]]:
    if not value.dim():
        return [()]
    found = torch.cartesian_prod(*(torch.arange(n) for n in value.shape))
    return [tuple(row) for row in found.reshape(-1, value.dim()).tolist()]
