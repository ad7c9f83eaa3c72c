"""Rats (Gelfand et al. 1990): weights of 30 rats on five days, a line per rat.

    y_n ~ N(α_i + β_i (x_n − 22), σ),  α_i ~ N(μ_α, σ_α),  β_i ~ N(μ_β, σ_β)

Twice: with flat priors on the scales, as in posteriordb, and with Gamma(0.001, 0.001) on the
precisions, as in the BUGS manual.
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
from torch import Tensor

from benchmarks.posterior_programs.case import Case, bugs, computed, grouped, posteriordb
from hbmeta.tasks import Tasks


def flat_scales(x: Tensor, y: Tensor | None = None) -> None:
    """x holds the age in days less 22."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 100.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 100.0))
    pyro.deterministic("alpha0", mu_alpha - 22 * mu_beta)
    spread_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1e4))
    spread_beta = pyro.sample("sigma_beta", dist.HalfNormal(1e4))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1e4))
    with pyro.plate("task", x.shape[0], dim=-2):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, spread_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, spread_beta))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(alpha + beta * x[..., 0], sigma), obs=y)


def gamma_precisions(x: Tensor, y: Tensor | None = None) -> None:
    """x holds the age in days less 22."""
    mu_alpha = pyro.sample("alpha.c", dist.Normal(0.0, 1000.0))
    mu_beta = pyro.sample("beta.c", dist.Normal(0.0, 1000.0))
    pyro.deterministic("alpha0", mu_alpha - 22 * mu_beta)
    precision_alpha = pyro.sample("alpha.tau", dist.Gamma(1e-3, 1e-3))
    precision_beta = pyro.sample("beta.tau", dist.Gamma(1e-3, 1e-3))
    sigma = pyro.deterministic("sigma", pyro.sample("tau.c", dist.Gamma(1e-3, 1e-3)) ** -0.5)
    with pyro.plate("task", x.shape[0], dim=-2):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, precision_alpha**-0.5))
        beta = pyro.sample("beta", dist.Normal(mu_beta, precision_beta**-0.5))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(alpha + beta * x[..., 0], sigma), obs=y)


def tasks(folder: Path) -> Tasks:
    """Five rows per rat."""
    data = posteriordb(folder, "rats_data")
    age = data.column("x") - data.values["xbar"]
    return grouped({"age": age}, data.column("y"), data.index("rat"), data.values["N"])


CASES = (
    Case(
        "rats_data-rats_model",
        flat_scales,
        tasks,
        computed("rats_data-rats_model"),
        note="flat priors of the scales are half-N(0, 1e4)",
    ),
    Case("bugs/rats", gamma_precisions, tasks, bugs("rats")),
)
