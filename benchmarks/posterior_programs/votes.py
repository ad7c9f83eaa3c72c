"""Votes for president by state, 1976 to 2016: processes in time by state and by region.

    y_st ~ N(μ + year_t + state_s + region_r + f_r(t) + g_s(t), σ),  f_r, g_s ~ GP(long + short)

States are the tasks; their regions' processes and the years are level 1. All 17 variances are
shares of one total: 17 · total · share, share ~ Dirichlet(2, …, 2).
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import Case, grouped, posteriordb
from hbmeta.tasks import Tasks

YEARS, SEEN, REGIONS = 14, 11, 10


def factor(long: Tensor, short: Tensor, scale_long: Tensor, scale_short: Tensor) -> Tensor:
    """Cholesky factor of the sum of two squared-exponential covariances over the years."""
    year = torch.arange(YEARS, dtype=long.dtype)
    half = -(year[:, None] - year).square() / 2
    covariance = scale_long * (half / long.square()).exp()
    covariance = covariance + scale_short * (half / short.square()).exp()
    return torch.linalg.cholesky(covariance + 1e-6 * torch.eye(YEARS, dtype=long.dtype))


def standard(name: str, *shape: int) -> Tensor:
    """Standard normals at level 1."""
    drawn: Tensor = pyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
    return drawn


def votes(x: Tensor, y: Tensor | None = None) -> None:
    """x holds the indices of the year and of the region."""
    total = pyro.sample("tot_var", dist.Gamma(3.0, 3.0))
    share = pyro.sample("prop_var", dist.Dirichlet(2 * torch.ones(17)))
    mu = pyro.sample("mu", dist.Normal(0.5, 0.5))
    lengths = {
        (level, kind): pyro.sample(f"length_GP_{level}_{kind}", dist.Weibull(scale, 30.0))
        for level in ("region", "state")
        for kind, scale in (("long", 8.0), ("short", 3.0))
    }
    variance = 17 * share * total
    scale = variance.sqrt()
    year_effect = scale[0] * standard("year_std", SEEN)
    region_effect = scale[1] * standard("region_std", REGIONS)
    of_region = factor(
        lengths["region", "long"], lengths["region", "short"], variance[12], variance[14]
    ) @ standard("GP_region_std", YEARS, REGIONS)
    of_state = factor(
        lengths["state", "long"], lengths["state", "short"], variance[13], variance[15]
    )
    year, region = x.long().unbind(-1)
    with pyro.plate("task", x.shape[0], dim=-2):
        normals = dist.Normal(0.0, 1.0)
        state = pyro.sample("state_std", normals)
        path = pyro.sample("GP_state_std", normals.expand([YEARS]).to_event(1))
        own = (of_state @ path.squeeze(-2).unsqueeze(-1)).squeeze(-1)
        with pyro.plate("point", x.shape[1], dim=-1):
            mean = mu + year_effect[year] + scale[2 + region] * state + region_effect[region]
            mean = mean + of_region[year, region] + own.gather(-1, year)
            pyro.sample("y", dist.Normal(mean, scale[16]), obs=y)


def tasks(folder: Path) -> Tasks:
    """Eleven elections in 50 states."""
    data = posteriordb(folder, "state_wide_presidential_votes")
    columns = {"year": data.index("year_ind"), "region": data.index("region_ind")}
    state = data.index("state_ind")
    return grouped(columns, data.column("y"), state, data.values["N_states"])


CASES = (
    Case(
        "state_wide_presidential_votes-hierarchical_gp",
        votes,
        tasks,
        note="crossed: states are the tasks; years and regions at level 1",
    ),
)
