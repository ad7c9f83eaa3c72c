"""Lynx and hare (Howard 2009): a differential equation, one task.

    u' = (α − β v) u,  v' = (−γ + δ u) v,  y_t ~ LogNormal(log z_t, σ),  t = 0, …, 20

The stored reference integrates with an adaptive scheme; here the classical Runge-Kutta scheme takes
four steps a year. θ's priors are normals cut at 0. A uniform prior times the normal's density is
the same, less what lies above its upper end (12 posterior sds away).
"""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import Case, one_task, posteriordb, stored_draws
from hbmeta.tasks import Tasks

YEARS = 20
STEPS = 4
CENTRE = (1.0, 0.05, 1.0, 0.05)
SPREAD = (0.5, 0.05, 0.5, 0.05)


def lynx_and_hare(x: Tensor, y: Tensor | None = None) -> None:
    """x holds the year, 0 to 20; y hare and lynx."""
    centre, spread = torch.tensor(CENTRE), torch.tensor(SPREAD)
    with pyro.plate("task", x.shape[0], dim=-2):
        prior = dist.Uniform(torch.zeros(4), 2 * centre)
        theta = pyro.sample("theta", prior.to_event(1))
        pyro.factor("cut normal", dist.Normal(centre, spread).log_prob(theta).sum(-1))
        start = dist.LogNormal(math.log(10.0), 1.0)
        z = pyro.sample("z_init", start.expand([2]).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
        path = log_path(z.squeeze(-2).log(), theta.squeeze(-2))
        path = path.gather(-2, x.long().expand(*x.shape[:2], 2))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.LogNormal(path, sigma).to_event(1), obs=y)


def log_path(start: Tensor, theta: Tensor) -> Tensor:
    """(tasks, years + 1, 2) of log u and log v; their slopes are α − β v and −γ + δ u."""
    alpha, beta, gamma, delta = theta.unbind(-1)
    constant = torch.stack([alpha, -gamma], -1)
    factor = torch.stack([-beta, delta], -1)

    def slope(log_z: Tensor) -> Tensor:
        return constant + factor * log_z.flip(-1).exp()

    size = 1.0 / STEPS
    states = [start]
    for _ in range(YEARS):
        z = states[-1]
        for _ in range(STEPS):
            k1 = slope(z)
            k2 = slope(z + size / 2 * k1)
            k3 = slope(z + size / 2 * k2)
            k4 = slope(z + size * k3)
            z = z + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(z)
    return torch.stack(states, -2)


def tasks(folder: Path) -> Tasks:
    """21 years; the first is the start, observed as the others are."""
    data = posteriordb(folder, "hudson_lynx_hare")
    y = torch.cat([data.column("y_init")[None], data.column("y")])
    return one_task({"year": torch.arange(YEARS + 1)}, y)


CASES = (
    Case(
        "hudson_lynx_hare-lotka_volterra",
        lynx_and_hare,
        tasks,
        stored_draws("hudson_lynx_hare-lotka_volterra"),
        note="one pair of series: one task; four Runge-Kutta steps a year",
    ),
)
