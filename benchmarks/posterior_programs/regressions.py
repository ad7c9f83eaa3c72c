"""Regressions without groups: one task, whose φ are all parameters.

A flat prior is written as N(0, s), or half-N(0, s), so wide that nobody sees it: it moves a
posterior mean m with sd σ by about m σ / s² of an sd. The largest is that of the constant of
log earnings, 5.8 · 0.45 / 1e8 = 3e-8.
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import Case, one_task, posteriordb, stored_draws
from hbmeta.tasks import Tasks

FLAT = 1e4
NOTE = "no groups: one task; flat priors are N(0, 1e4)"


def linear(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """y ~ N(x β, σ), β ~ N(0, 10), σ ~ half-N(0, 10)."""
    with pyro.plate("task", n_tasks):
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal((x * beta[task]).sum(-1), sigma[task]), obs=y)


def scores(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """y ~ N(x β, σ), β flat, σ ~ half-Cauchy(0, 2.5)."""
    with pyro.plate("task", n_tasks):
        beta = pyro.sample("beta", dist.Normal(0.0, FLAT).expand([x.shape[1]]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal((x * beta[task]).sum(-1), sigma[task]), obs=y)


def log_earnings(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """y ~ N(x β, σ), β and σ flat."""
    with pyro.plate("task", n_tasks):
        beta = pyro.sample("beta", dist.Normal(0.0, FLAT).expand([x.shape[1]]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(FLAT))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal((x * beta[task]).sum(-1), sigma[task]), obs=y)


def sblrc(folder: Path) -> Tasks:
    """100 rows, five columns."""
    data = posteriordb(folder, "sblrc")
    columns = data.column("X")
    return one_task({f"x{k + 1}": columns[:, k] for k in range(5)}, data.column("y"))


def mother_iq(folder: Path) -> Tasks:
    """Constant and the mother's IQ."""
    data = posteriordb(folder, "kidiq")
    iq, y = data.column("mom_iq"), data.column("kid_score")
    return one_task({"constant": torch.ones_like(y), "mom_iq": iq}, y)


def interaction(folder: Path) -> Tasks:
    """Constant, the mother's school, her IQ, and their product."""
    data = posteriordb(folder, "kidiq")
    school, iq, y = data.column("mom_hs"), data.column("mom_iq"), data.column("kid_score")
    columns = {"constant": torch.ones_like(y), "mom_hs": school, "mom_iq": iq, "both": school * iq}
    return one_task(columns, y)


def earnings(folder: Path) -> Tasks:
    """Constant and height."""
    data = posteriordb(folder, "earnings")
    y = data.column("earn").log()
    return one_task({"constant": torch.ones_like(y), "height": data.column("height")}, y)


CASES = (
    Case("sblrc-blr", linear, sblrc, stored_draws("sblrc-blr"), note="no groups: one task"),
    Case(
        "kidiq-kidscore_momiq", scores, mother_iq, stored_draws("kidiq-kidscore_momiq"), note=NOTE
    ),
    Case(
        "kidiq-kidscore_interaction",
        scores,
        interaction,
        stored_draws("kidiq-kidscore_interaction"),
        note=NOTE,
    ),
    Case(
        "earnings-logearn_height",
        log_earnings,
        earnings,
        stored_draws("earnings-logearn_height"),
        note=NOTE,
    ),
)
