"""University ratings (InstEval) as a three-level program, and the maximum of its likelihood.

Model, y_r the rating of row r by student i of lecturer d, who belongs to department k:

    y_r ~ N(μ + β service_r + v_d + w_k + φ_i, σ),
    φ_i ~ N(0, τ_student),   v_d = ν_d ~ N(0, τ_lecturer),   w_k = τ_department z_k,  z_k ~ N(0, 1).

Students are the tasks. Lecturers teach many students, so that their effects stand at level 1, with
a scale of their own: 65 ratings say more about a lecturer than the prior does, hence centered;
14 departments say little about theirs beside its lecturers, hence not.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from hbmeta.tasks import Tasks, from_frame

LECTURERS, DEPARTMENTS = 1128, 14
COLUMNS = ("service", "lecturer", "department")
FIXED = ("mu", "beta")
SCALES = ("tau_student", "tau_lecturer", "tau_department", "sigma")

__all__ = ["COLUMNS", "FIXED", "SCALES", "Ratings", "part_of", "read_ratings"]


class Ratings:
    """The program, flat layout; columns of x: service, and whole numbers lecturer and department.

    Args:
        lecturers: number of them.
        departments: number of them.
    """

    def __init__(self, lecturers: int = LECTURERS, departments: int = DEPARTMENTS) -> None:
        self.lecturers, self.departments = lecturers, departments

    def __call__(self, x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
        """The program."""
        mu = pyro.sample("mu", dist.Normal(3.0, 1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
        tau_student = pyro.sample("tau_student", dist.HalfNormal(1.0))
        tau_lecturer = pyro.sample("tau_lecturer", dist.HalfNormal(1.0))
        tau_department = pyro.sample("tau_department", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        zero = x.new_zeros(())
        lecturer = pyro.sample(
            "lecturer", dist.Normal(zero, tau_lecturer).expand([self.lecturers]).to_event(1)
        )
        z = pyro.sample("z", dist.Normal(zero, 1.0).expand([self.departments]).to_event(1))
        with pyro.plate("task", n_tasks):
            student = pyro.sample("student", dist.Normal(zero, tau_student))
        with pyro.plate("point", x.shape[0]):
            mean = mu + beta * x[:, 0] + lecturer[x[:, 1].long()]
            mean = mean + tau_department * z[x[:, 2].long()] + student[task]
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def read_ratings(folder: Path) -> Tasks:
    """The ratings by student; lecturers and departments numbered from 0."""
    frame = pd.read_csv(folder / "mixed_effects" / "lme4" / "InstEval.csv")
    for name, column in (("lecturer", "d"), ("department", "dept")):
        frame[name] = frame[column].rank(method="dense").astype(int) - 1
    return from_frame(frame, group="s", x=list(COLUMNS), y="y").support


def part_of(tasks: Tasks, ratings: int, seed: int) -> tuple[Tasks, Ratings]:
    """The students that a shuffle puts first, with about so many ratings, and their lecturers."""
    order = torch.randperm(tasks.n_tasks, generator=torch.Generator().manual_seed(seed))
    enough = int((tasks.counts[order].cumsum(0) < ratings).sum()) + 1
    some = tasks[order[:enough].sort().values]
    assert some.flat_y is not None
    labels, position = torch.unique(some.flat_x[:, 1], return_inverse=True)
    x = some.flat_x.clone()
    x[:, 1] = position.to(x)
    found = Tasks.from_flat(
        x, some.flat_y, some.task, some.n_tasks, ids=some.ids, features=some.features
    )
    return found, Ratings(len(labels))
