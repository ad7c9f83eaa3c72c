"""Gaussian processes on eleven points, one task each: Gaussian data, and counts.

f ~ GP(0, α² exp(−(x − x')² / 2ρ²)),  ρ ~ Gamma(25, 4),  α ~ half-N(0, 2)
y ~ N(f, σ I) with variance σ, σ ~ half-N(0, 1), f integrated out;  or  k ~ Poisson(exp f)
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import (
    Case,
    one_task,
    posteriordb,
    stan_benchmarks,
    stored_draws,
    together,
)
from hbmeta.tasks import Tasks

POINTS = 11


def covariance(x: Tensor, alpha: Tensor, rho: Tensor, diagonal: Tensor | float) -> Tensor:
    """(tasks, points, points) of x (tasks, points, 1), α and ρ (tasks, 1, 1)."""
    distance = (x - x.transpose(-1, -2)) / rho
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return alpha.square() * (-distance.square() / 2).exp() + diagonal * eye


def gaussian(x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None) -> None:
    """The points of the task as one observation; a masked point stands apart, with density 1."""
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
    kept = mask.to(x.dtype)
    with pyro.plate("task", x.shape[0]):
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))[:, None, None]
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))[:, None, None]
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[:, None, None]
        both = kept[:, :, None] * kept[:, None, :]
        alone = torch.diag_embed((1 - kept) / (2 * torch.pi))
        matrix = covariance(x, alpha, rho, sigma) * both + alone
        factor = torch.linalg.cholesky(matrix)
        value, zero = None if y is None else y * kept, x.new_zeros(x.shape[1])
        pyro.sample("y", dist.MultivariateNormal(zero, scale_tril=factor), obs=value)


def counts(x: Tensor, y: Tensor | None = None) -> None:
    """f on the grid is a site of the task, f = L f̃ with L Lᵀ the covariance; x lies on the grid."""
    grid = torch.linspace(-10.0, 10.0, POINTS, dtype=x.dtype).reshape(1, POINTS, 1)
    which = ((x[..., 0] + 10) / 2).round().long()
    with pyro.plate("task", x.shape[0], dim=-2):
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        z = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([POINTS]).to_event(1))
        matrix = covariance(grid, alpha[..., None], rho[..., None], 1e-10)
        f = (torch.linalg.cholesky(matrix) @ z.squeeze(-2).unsqueeze(-1)).squeeze(-1)
        pyro.deterministic("f", f.unsqueeze(-2), event_dim=1)
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Poisson(f.gather(-1, which).exp()), obs=y)


def numbers(folder: Path) -> Tasks:
    """y at eleven points."""
    data = posteriordb(folder, "gp_pois_regr")
    return one_task({"x": data.column("x")}, data.column("y"))


def events(folder: Path) -> Tasks:
    """Counts at the same points."""
    data = posteriordb(folder, "gp_pois_regr")
    return one_task({"x": data.column("x")}, data.column("k"))


CASES = (
    Case(
        "gp_pois_regr-gp_regr",
        gaussian,
        numbers,
        together(stored_draws("gp_pois_regr-gp_regr"), stan_benchmarks("gp_regr", 1_000_000)),
        note="one function: one task",
    ),
    Case(
        "gp_pois_regr-gp_pois_regr",
        counts,
        events,
        together(
            stored_draws("gp_pois_regr-gp_pois_regr"), stan_benchmarks("gp_pois_regr", 1_000_000)
        ),
        target_accept=0.95,
        note="one function: one task",
    ),
)
