"""Counts by group: germination of seeds, deaths in hospitals, visits to sites, dogs that learn.

The binomial programs have one row per group. x holds the number of trials and what else is known.
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import Case, bugs, grouped, one_task, posteriordb
from hbmeta.tasks import Tasks


def seeds(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds trials, seed type, root extract; logit p = α0 + … + b_i with b_i ~ N(0, σ)."""
    alpha0 = pyro.sample("alpha0", dist.Normal(0.0, 1000.0))
    alpha1 = pyro.sample("alpha1", dist.Normal(0.0, 1000.0))
    alpha2 = pyro.sample("alpha2", dist.Normal(0.0, 1000.0))
    alpha12 = pyro.sample("alpha12", dist.Normal(0.0, 1000.0))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    sigma = pyro.deterministic("sigma", tau**-0.5)
    with pyro.plate("task", n_tasks):
        b = pyro.sample("b", dist.Normal(0.0, sigma))
    trials, kind, root = x.unbind(-1)
    with pyro.plate("point", x.shape[0]):
        logit = alpha0 + alpha1 * kind + alpha2 * root + alpha12 * kind * root + b[task]
        pyro.sample("y", dist.Binomial(trials, logits=logit), obs=y)


def seeds_centred_effects(
    x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int
) -> None:
    """b = c − mean(c) ties all plates of seeds to each other, so all are φ of one task."""
    with pyro.plate("task", n_tasks):
        alpha0 = pyro.sample("alpha0", dist.Normal(0.0, 1.0))
        alpha1 = pyro.sample("alpha1", dist.Normal(0.0, 1.0))
        alpha2 = pyro.sample("alpha2", dist.Normal(0.0, 1.0))
        alpha12 = pyro.sample("alpha12", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([21]).to_event(1))
        c = pyro.deterministic("c", sigma[:, None] * z, event_dim=1)
        b = pyro.deterministic("b", c - c.mean(-1, keepdim=True), event_dim=1)
    trials, kind, root, which = x.unbind(-1)
    with pyro.plate("point", x.shape[0]):
        logit = alpha0[task] + alpha1[task] * kind + alpha2[task] * root
        logit = logit + alpha12[task] * kind * root + b[task, which.long()]
        pyro.sample("y", dist.Binomial(trials, logits=logit), obs=y)


def surgical(x: Tensor, y: Tensor | None = None) -> None:
    """x holds the operations of each hospital; logit p_i ~ N(μ, σ)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    variance = pyro.sample("sigmasq", dist.InverseGamma(1e-3, 1e-3))
    sigma = pyro.deterministic("sigma", variance.sqrt())
    pyro.deterministic("pop_mean", mu.sigmoid())
    with pyro.plate("task", x.shape[0], dim=-2):
        b = pyro.sample("b", dist.Normal(mu, sigma))
        pyro.deterministic("p", b.sigmoid())
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Binomial(x[..., 0], logits=b), obs=y)


def sites(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """Counts of a site in some years, all with one rate; x is not used."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    spread = pyro.sample("sd_alpha", dist.Uniform(0.0, 5.0))
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(mu, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Poisson(alpha[task].exp()), obs=y)


def dogs(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds earlier shocks and avoidances; P(shock) = a^shocks b^avoidances for all dogs."""
    with pyro.plate("task", n_tasks):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, 1.0))
    shocks, avoided = x.unbind(-1)
    with pyro.plate("point", x.shape[0]):
        log_p = shocks * a[task].log() + avoided * b[task].log()
        pyro.sample("y", dist.Bernoulli(log_p.exp()), obs=y)


def seeds_tasks(folder: Path) -> Tasks:
    """21 plates of seeds, one row each."""
    data = posteriordb(folder, "seeds_data")
    columns = {"trials": data.column("N"), "type": data.column("x1"), "root": data.column("x2")}
    return grouped(columns, data.column("n"), torch.arange(21), 21)


def seeds_together(folder: Path) -> Tasks:
    """The same as one task; the last column numbers the plates."""
    data = posteriordb(folder, "seeds_data")
    columns = {"trials": data.column("N"), "type": data.column("x1"), "root": data.column("x2")}
    return one_task({**columns, "plate": torch.arange(21)}, data.column("n"))


def surgical_tasks(folder: Path) -> Tasks:
    """12 hospitals, one row each."""
    data = posteriordb(folder, "surgical_data")
    return grouped({"operations": data.column("n")}, data.column("r"), torch.arange(12), 12)


def sites_tasks(folder: Path) -> Tasks:
    """2,072 counts at 235 sites; what is missing is predicted, and is no part of the posterior."""
    data = posteriordb(folder, "GLMM_data")
    return grouped(
        {"year": data.column("obsyear")},
        data.column("obs"),
        data.index("obssite"),
        data.values["nsite"],
    )


def dogs_tasks(folder: Path) -> Tasks:
    """25 trials of each of 30 dogs; 1 is a shock."""
    y = posteriordb(folder, "dogs").column("y")
    shocks = y.cumsum(1) - y
    avoided = (1 - y).cumsum(1) - (1 - y)
    return one_task({"shocks": shocks.flatten(), "avoided": avoided.flatten()}, y.flatten())


CASES = (
    Case(
        "seeds_data-seeds_model",
        seeds,
        seeds_tasks,
        bugs("seeds"),
        target_accept=0.95,
    ),
    Case(
        "seeds_data-seeds_centered_model",
        seeds_centred_effects,
        seeds_together,
        target_accept=0.95,
        note="effects that sum to 0 tie the groups: one task; c = σ z",
    ),
    Case("surgical_data-surgical_model", surgical, surgical_tasks, target_accept=0.95),
    Case("GLMM_data-GLMM1_model", sites, sites_tasks),
    Case("dogs-dogs_hierarchical", dogs, dogs_tasks, note="all dogs share a and b: one task"),
)
