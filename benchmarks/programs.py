"""Programs that the benchmarks run, written as a person would write them."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from hbmeta.tasks import Tasks, load_radon


def data_folder() -> Path:
    """The folder of reference posteriors, $HBMETA_DATA or ../shared/data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("HBMETA_DATA", default))


def read_zip(path: Path) -> Any:
    """The JSON file inside a zip."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def radon_nested(x: Tensor, y: Tensor | None = None) -> None:
    """Radon with varying intercepts (posteriordb's hierarchical_intercept), nested layout."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        alpha = pyro.deterministic("alpha", mu + tau * z)
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(alpha + x @ beta, sigma), obs=y)


def radon_flat(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """The same program in the flat layout: one row per house, φ indexed by `task`."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        alpha = pyro.deterministic("alpha", mu + tau * z)
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(alpha[task] + x @ beta, sigma), obs=y)


def radon_tasks() -> Tasks:
    """All 919 houses; columns floor and log_uranium in the order of the reference's beta."""
    known = load_radon().support
    order = [known.features.index(name) for name in ("log_uranium", "floor")]
    return Tasks.from_flat(
        known.flat_x[:, order], known.flat_y, known.task, known.n_tasks,
        ids=known.ids, features=("log_uranium", "floor"),
    )  # fmt: skip


def eight_schools(x: Tensor, y: Tensor | None = None) -> None:
    """Eight schools, non-centered; x holds each school's standard error."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, x[..., 0]), obs=y)


def eight_schools_tasks() -> Tasks:
    """Rubin (1981): estimated effects of coaching and their standard errors."""
    y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
    sigma = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
    return Tasks(
        torch.tensor(sigma, dtype=torch.float64)[:, None, None],
        torch.tensor(y, dtype=torch.float64)[:, None],
        ids=list("ABCDEFGH"),
        features=["standard_error"],
    )


class SinusoidNetwork(pyro.nn.PyroModule):
    """φ = all weights of a 1-40-40-1 ReLU network; φ ~ N(w₀, 1) with w₀ = θ, y ~ N(f_φ(x), ½)."""

    def __init__(self, width: int = 40, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [(1, width), (width, width), (width, 1)]
        for index, (rows, columns) in enumerate(sizes):
            bound = rows**-0.5
            weight = (2 * torch.rand(rows, columns, generator=generator) - 1) * bound
            bias = (2 * torch.rand(columns, generator=generator) - 1) * bound
            self.register_parameter(f"weight{index}", torch.nn.Parameter(weight))
            self.register_parameter(f"bias{index}", torch.nn.Parameter(bias))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """The program, nested layout; x (tasks, points, 1)."""
        with pyro.plate("task", x.shape[0], dim=-2):
            hidden = x
            for index in range(3):
                weight, bias = getattr(self, f"weight{index}"), getattr(self, f"bias{index}")
                w = pyro.sample(f"w{index}", dist.Normal(weight, 1.0).to_event(2))
                b = pyro.sample(f"b{index}", dist.Normal(bias, 1.0).to_event(1))
                hidden = hidden @ w.squeeze(-3) + b
                hidden = torch.relu(hidden) if index < 2 else hidden
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(hidden.squeeze(-1), 0.5**0.5), obs=y)
