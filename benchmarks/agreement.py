"""When draws agree with a reference, and how often correct draws would not.

A parameter agrees where its mean lies within 0.1 reference sd and its sd within 10 %. With Monte
Carlo standard errors e of our moment and r of the reference's, both nearly normal, a correct
sampler fails a limit L with probability 2 Φ(−L / √(e² + r²)). Summed over all parameters this
bounds the false-alarm rate of a table; it is computed from the very draws and printed with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import arviz
import numpy as np
import numpy.typing as npt

from benchmarks.posterior_programs import Moments
from benchmarks.posterior_programs.case import Draws, moments_of_chains
from hbmeta.fitted import Fitted

MEAN_LIMIT, SD_LIMIT = 0.1, 0.1
_ALL = 10**9


@dataclass(frozen=True)
class Agreement:
    """One parameter of one program against its reference."""

    parameter: str
    found: Moments
    reference: Moments

    @property
    def shift(self) -> float:
        """Difference of the means in reference sds."""
        return abs(self.found.mean - self.reference.mean) / self.reference.sd

    @property
    def ratio(self) -> float:
        """sd over reference sd."""
        return self.found.sd / self.reference.sd

    @property
    def agrees(self) -> bool:
        """Within 0.1 sd of the mean and 10 % of the sd."""
        return self.shift <= MEAN_LIMIT and abs(self.ratio - 1) <= SD_LIMIT

    @property
    def false_alarm(self) -> float:
        """How likely correct draws of this effective number are to disagree; NaN if unknown."""
        mean = math.hypot(self.found.error_mean, self.reference.error_mean)
        sd = math.hypot(self.found.error_sd, self.reference.error_sd)
        scale = self.reference.sd
        return _outside(MEAN_LIMIT * scale, mean) + _outside(SD_LIMIT * scale, sd)

    def to_json(self) -> dict[str, object]:
        """For a file."""
        return asdict(self)


def _outside(limit: float, error: float) -> float:
    """P(|e| > limit) for e ~ N(0, error)."""
    if math.isnan(error):
        return math.nan
    return math.erfc(limit / error / math.sqrt(2)) if error > 0 else 0.0


def draws_by_name(fitted: Fitted) -> Draws:
    """(chains, draws) of every scalar; entries of a vector are numbered from 1 on."""
    problem, particles = fitted.problem, fitted.posterior.particles(_ALL)
    batch, sites = problem.batch(fitted.tasks), problem.sites
    local = (*sites.locals, *sites.deterministic_local)
    shapes = {site.name: site.shape for site in (*sites.globals, *sites.deterministic_global)}
    shapes |= {site.name: (fitted.tasks.n_tasks, *site.shape) for site in local}
    found = problem.particle_values(particles.theta, particles.drawn, particles.phi, batch)
    draws = len(particles.phi)
    flat: Draws = {}
    for name, shape in shapes.items():
        columns = found[name].expand(draws, *shape).reshape(draws, -1).numpy().T
        for label, column in zip(labels(name, len(columns)), columns, strict=True):
            flat[label] = column.reshape(fitted.chains, -1)
    return flat


def labels(name: str, entries: int) -> list[str]:
    """`alpha`, or `alpha[1]`, `alpha[2]`, …"""
    return [name] if entries == 1 else [f"{name}[{k + 1}]" for k in range(entries)]


def with_logarithms(found: Draws, names: Sequence[str]) -> Draws:
    """The draws and, for the parameters named, their logarithms."""
    return {**found, **{f"log {name}": np.log(found[name]) for name in names}}


def effective_draws(found: Draws) -> npt.NDArray[np.float64]:
    """Bulk effective sample size of every parameter."""
    return _diagnosed(found, "ess")


def split_r_hat(found: Draws) -> npt.NDArray[np.float64]:
    """Rank-normalised split R̂ of every parameter."""
    return _diagnosed(found, "rhat")


def _diagnosed(found: Draws, what: str) -> npt.NDArray[np.float64]:
    # A constant (a simplex of one entry) has no diagnostics.
    varying = [draws for draws in found.values() if np.ptp(draws) > 0]
    data = arviz.convert_to_dataset(np.stack(varying, -1))
    result = arviz.ess(data, method="bulk") if what == "ess" else arviz.rhat(data)
    return np.asarray(result["x"].values)


def compare(found: Draws, reference: Mapping[str, Moments]) -> list[Agreement]:
    """One row per parameter of the reference."""
    return [
        Agreement(name, moments_of_chains(found[name]), moments)
        for name, moments in reference.items()
    ]
