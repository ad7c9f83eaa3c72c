"""Radon in the houses of Minnesota (and of all states), by county.

    y_n ~ N(α_c + β_c · floor + …, σ_y),  α_c ~ N(μ_α, σ_α),  scales ~ half-N(0, 1)

Coefficients of level 1 have N(0, 10). The last program is the one of TensorFlow Probability's
Inference Gym, with the county's share of first floors as a further column and other priors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.posterior_programs.case import (
    Case,
    Moments,
    Reference,
    computed,
    grouped,
    moments_of_file,
    one_task,
    posteriordb,
)
from hbmeta.tasks import Tasks

GYM = "radon_contextual_effects_minnesota"


def hierarchical_centered(
    x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int
) -> None:
    """x holds log uranium and floor."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    spread = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(mu, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task] + x @ beta, sigma), obs=y)


def hierarchical_non_centered(
    x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int
) -> None:
    """x holds log uranium and floor."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    spread = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        z = pyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
        alpha = pyro.deterministic("alpha", mu + spread * z)
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task] + x @ beta, sigma), obs=y)


def partially_pooled_centered(
    x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int
) -> None:
    """A mean per county; x is not used."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    spread = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(mu, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task], sigma), obs=y)


def partially_pooled_non_centered(
    x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int
) -> None:
    """A mean per county; x is not used."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    spread = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        z = pyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
        alpha = pyro.deterministic("alpha", mu + spread * z)
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task], sigma), obs=y)


def variable_intercept(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds floor, whose coefficient all counties share."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    spread = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(mu, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task] + beta * x[:, 0], sigma), obs=y)


def variable_slope(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds floor; all counties share the intercept."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    mu = pyro.sample("mu_beta", dist.Normal(0.0, 10.0))
    spread = pyro.sample("sigma_beta", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        beta = pyro.sample("beta", dist.Normal(mu, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha + beta[task] * x[:, 0], sigma), obs=y)


def variable_both(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds floor."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 10.0))
    spread_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    spread_beta = pyro.sample("sigma_beta", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, spread_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, spread_beta))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task] + beta[task] * x[:, 0], sigma), obs=y)


def pooled(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds floor; one line for all houses, its parameters those of the one task."""
    with pyro.plate("task", n_tasks):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
        sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task] + beta[task] * x[:, 0], sigma[task]), obs=y)


def contextual(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds log uranium, floor, and the mean of floor in the county."""
    mean = pyro.sample("county_effect_mean", dist.Normal(0.0, 1.0))
    spread = pyro.sample("county_effect_scale", dist.Uniform(0.0, 100.0))
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    sigma = pyro.sample("log_radon_scale", dist.Uniform(0.0, 100.0))
    with pyro.plate("task", n_tasks):
        effect = pyro.sample("county_effect", dist.Normal(mean, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(effect[task] + x @ weight, sigma), obs=y)


def minnesota(folder: Path) -> Tasks:
    """All columns of the Minnesota file."""
    return _counties(folder, "radon_mn", ("log_uppm", "floor_measure"))


def minnesota_floor(folder: Path) -> Tasks:
    """The floor alone."""
    return _counties(folder, "radon_mn", ("floor_measure",))


def minnesota_pooled(folder: Path) -> Tasks:
    """All houses as one task."""
    data = posteriordb(folder, "radon_mn")
    return one_task({"floor_measure": data.column("floor_measure")}, data.column("log_radon"))


def all_states(folder: Path) -> Tasks:
    """12,573 houses in 386 counties."""
    return _counties(folder, "radon_all", ("log_uppm", "floor_measure"))


def _counties(folder: Path, name: str, columns: tuple[str, ...]) -> Tasks:
    data = posteriordb(folder, name)
    x = {column: data.column(column) for column in columns}
    return grouped(x, data.column("log_radon"), data.index("county_idx"), data.values["J"])


def contextual_tasks(folder: Path) -> Tasks:
    """Minnesota as the Inference Gym prepares it: counties in alphabetical order, no + 0.1."""
    path = folder / "reference_hierarchical" / "inference_gym" / f"{GYM}.data.json"
    data = json.loads(path.read_text())
    names = ("log_uranium", "floor", "floor_by_county")
    columns = {name: torch.tensor(data[name], dtype=torch.float64) for name in names}
    y = torch.tensor(data["log_radon"], dtype=torch.float64)
    return grouped(columns, y, torch.tensor(data["county"]), data["J"])


def contextual_references(folder: Path) -> tuple[Reference, ...]:
    """By quadrature, and as published with its Monte Carlo errors; indices from 1 on, as ours."""
    place = folder / "reference_hierarchical" / "inference_gym"
    exact = moments_of_file(place / f"{GYM}.moments_computed.json")
    published: dict[str, Moments] = {}
    stored = json.loads((place / f"{GYM}.ground_truth.json").read_text())["parameters"]
    for name, row in stored.items():
        if isinstance(row["mean"], list):
            columns = zip(row["mean"], row["sd"], row["mcse"], strict=True)
            for index, (mean, sd, error) in enumerate(columns, 1):
                published[f"{name}[{index}]"] = Moments(mean, sd, error, error / math.sqrt(2))
        else:
            error = row["mcse"]
            published[name] = Moments(row["mean"], row["sd"], error, error / math.sqrt(2))
    return (
        Reference("quadrature", {_from_one(name): value for name, value in exact.items()}),
        Reference("Inference Gym, 20,000 draws", published),
    )


def _from_one(name: str) -> str:
    if not name.endswith("]"):
        return name
    stem, index = name[:-1].split("[")
    return f"{stem}[{int(index) + 1}]"


HIERARCHICAL = computed("radon_mn-radon_hierarchical_intercept")
PARTIAL = computed("radon_mn-radon_partially_pooled")

CASES = (
    Case(
        "radon_mn-radon_hierarchical_intercept_centered",
        hierarchical_centered,
        minnesota,
        HIERARCHICAL,
    ),
    Case(
        "radon_mn-radon_hierarchical_intercept_noncentered",
        hierarchical_non_centered,
        minnesota,
        HIERARCHICAL,
    ),
    Case("radon_mn-radon_partially_pooled_centered", partially_pooled_centered, minnesota, PARTIAL),
    Case(
        "radon_mn-radon_partially_pooled_noncentered",
        partially_pooled_non_centered,
        minnesota,
        PARTIAL,
    ),
    Case("radon_mn-radon_variable_intercept_centered", variable_intercept, minnesota_floor),
    Case(
        "radon_mn-radon_variable_slope_centered",
        variable_slope,
        minnesota_floor,
    ),
    Case("radon_mn-radon_variable_intercept_slope_centered", variable_both, minnesota_floor),
    Case("radon_mn-radon_pooled", pooled, minnesota_pooled, note="no groups: one task"),
    Case(
        "radon_all-radon_hierarchical_intercept_noncentered",
        hierarchical_non_centered,
        all_states,
    ),
    Case(
        f"inference_gym/{GYM}",
        contextual,
        contextual_tasks,
        contextual_references,
    ),
)
