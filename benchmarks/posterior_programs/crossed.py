"""Crossed effects: one factor is the task, the others are vectors at level 1.

Vectors at level 1 are drawn as standard normals and scaled. They have few entries (four ages, five
regions), so their scales are hardly known, and centred they would be funnels.
"""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import Case, grouped, posteriordb
from hbmeta.tasks import Tasks

GROUPS, AGES, SCHOOLINGS, BOTH, REGIONS = 5, 4, 4, 16, 5


def effects(name: str, size: int, scale: Tensor) -> Tensor:
    """A vector of level-1 effects ~ N(0, scale), as scale times standard normals."""
    z = pyro.sample(f"{name}_raw", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    found: Tensor = pyro.deterministic(name, scale * z, event_dim=1)
    return found


def pilots(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds the group of pilots; y ~ N(a_group + b_scenario, σ_y), scenarios are the tasks."""
    mu_a = pyro.sample("mu_a", dist.Normal(0.0, 1.0))
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 1.0))
    sigma_a = pyro.sample("sigma_a", dist.Uniform(0.0, 100.0))
    sigma_b = pyro.sample("sigma_b", dist.Uniform(0.0, 100.0))
    sigma = pyro.sample("sigma_y", dist.Uniform(0.0, 100.0))
    z = pyro.sample("a_raw", dist.Normal(0.0, 1.0).expand([GROUPS]).to_event(1))
    a = pyro.deterministic("a", 10 * mu_a + sigma_a * z, event_dim=1)
    with pyro.plate("task", n_tasks):
        b = pyro.sample("b", dist.Normal(10 * mu_b, sigma_b))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(a[x[:, 0].long()] + b[task], sigma), obs=y)


def election(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds black, female, earlier vote, and indices of age, schooling, both and region."""
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0).expand([5]).to_event(1))
    sigma = {k: pyro.sample(f"sigma_{k}", dist.Uniform(0.0, 100.0)) for k in "abcde"}
    a = effects("a", AGES, sigma["a"])
    b = effects("b", SCHOOLINGS, sigma["b"])
    c = effects("c", BOTH, sigma["c"])
    e = effects("e", REGIONS, sigma["e"])
    with pyro.plate("task", n_tasks):
        d = pyro.sample("d", dist.Normal(0.0, sigma["d"]))
    black, female, before = x[:, 0], x[:, 1], x[:, 2]
    age, schooling, both, region = x[:, 3:].long().unbind(-1)
    with pyro.plate("point", x.shape[0]):
        fixed = beta[0] + beta[1] * black + beta[2] * female + beta[3] * before
        fixed = fixed + beta[4] * female * black
        logit = fixed + a[age] + b[schooling] + c[both] + d[task] + e[region]
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)


def items(x: Tensor, y: Tensor | None = None) -> None:
    """x marks the item; logit P(right) = β θ_student − α_item, students are the tasks."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 100.0).expand([5]).to_event(1))
    beta = pyro.sample("beta", dist.HalfNormal(100.0))
    mean = pyro.deterministic("mean_alpha", alpha.mean())
    pyro.deterministic("a", alpha - mean, event_dim=1)
    with pyro.plate("task", x.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=beta * theta - x @ alpha), obs=y)


def pilots_tasks(folder: Path) -> Tasks:
    """Eight scenarios by five groups."""
    data = posteriordb(folder, "pilots")
    group, scenario = data.index("group_id"), data.index("scenario_id")
    return grouped({"group": group}, data.column("y"), scenario, data.values["n_scenarios"])


def election_tasks(folder: Path) -> Tasks:
    """11,566 voters in 51 states (two without one)."""
    data = posteriordb(folder, "election88")
    columns = {name: data.column(name) for name in ("black", "female", "v_prev_full")}
    columns |= {name: data.index(name) for name in ("age", "edu", "age_edu", "region_full")}
    return grouped(columns, data.column("y"), data.index("state"), data.values["n_state"])


def items_tasks(folder: Path) -> Tasks:
    """1,000 students by five items; the file counts the 32 patterns of answers."""
    data = posteriordb(folder, "lsat_data")
    ends = torch.tensor(data.values["culm"])
    patterns = data.column("response").repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), 0)
    students, n_items = patterns.shape
    marks = torch.eye(n_items, dtype=torch.float64).repeat(students, 1)
    columns = {f"item{k + 1}": marks[:, k] for k in range(n_items)}
    task = torch.arange(students).repeat_interleave(n_items)
    return grouped(columns, patterns.flatten(), task, students)


CASES = (
    Case(
        "pilots-pilots",
        pilots,
        pilots_tasks,
        target_accept=0.95,
        note="crossed: scenarios are the tasks, groups at level 1",
    ),
    Case(
        "election88-election88_full",
        election,
        election_tasks,
        target_accept=0.95,
        note="crossed: states are the tasks; age, schooling, both, region at level 1",
    ),
    Case("lsat_data-lsat_model", items, items_tasks, note="crossed: students are the tasks"),
)
