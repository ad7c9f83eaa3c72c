"""Gaussian clusters in the plane: few-shot classification with a known best classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.batch import Episode, Tasks
from hbmeta.tasks.families import Family
from hbmeta.tasks.ranges import check_dtype, single_number

Placement = Literal["disk", "circle"]

__all__ = ["Clusters", "Placement"]


@dataclass(frozen=True)
class Clusters(Family[dict[str, Tensor]]):
    """Classes that are round Gaussian clusters, their means uniform on a disk or around a circle.

    x_ij | y_ij = k ~ N(c_ik, noise² I₂). Every class has as many rows as every other, shuffled
    within its task, so that the order of the rows says nothing about y.

    On the disk c_ik is uniform, independently of the others (its radius is R √u, u ~ U(0, 1)), so
    that means of a task often lie close together: at the defaults even the classifier that knows
    them is right for only 88.5 % of points. On the circle the means are evenly spaced at radius R,
    turned by a common angle, in random order. (An accuracy of 1.00 belongs to the circle with well
    separated classes; on the disk no classifier reaches it.)

    `hbmeta.oracles.known_clusters` is the classifier that knows the means, and
    `hbmeta.oracles.bayes_clusters` the best one that sees the support only. The features are "x0"
    and "x1", the labels 0..ways-1, and the truth is "means" (tasks, ways, 2), float64.

    Args:
        ways: number of classes, at least 2.
        shots: support rows per class.
        queries: query rows per class.
        radius: R of the disk or the circle, above 0, in the units of x.
        noise: standard deviation of each coordinate within a class, above 0, in the units of x.
        placement: "disk" or "circle".
        dtype: of x, float32 or float64; y is int64.
    Raises:
        DataError: fewer than two classes, a radius or a noise that is not positive and finite,
            impossible row numbers, another dtype.
    Example:
        >>> Clusters(ways=3, shots=1, queries=4).sample(2, seed=0).query
        Tasks(2 tasks, 24 points (12 each), features [x0, x1], y class labels, float32)
    """

    ways: int = 5
    shots: int = 5
    queries: int = 15
    radius: float = 2.5
    noise: float = 0.35
    placement: Placement = "disk"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        where = "Clusters"
        for name, least in (("ways", 2), ("shots", 0), ("queries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                rows = "classes" if name == "ways" else "rows per class"
                raise DataError(
                    where,
                    needed=f"{name} as a number of {rows}, at least {least}",
                    found=f"{value!r}",
                    do=f"Pass for example {name}=5.",
                )
        single_number(self.radius, "radius", where=where, least=0.0, above=True)
        single_number(self.noise, "noise", where=where, least=0.0, above=True)
        check_dtype(self.dtype, where=where)
        if self.placement not in get_args(Placement):
            raise DataError(
                where,
                needed="placement 'disk' or 'circle'",
                found=f"{self.placement!r}",
                do="Choose one.",
            )

    def _draw(self, n_tasks: int, draw: torch.Generator) -> tuple[Episode, dict[str, Tensor]]:
        share, turn = torch.rand(2, n_tasks, self.ways, generator=draw, dtype=torch.float64)
        # A disk of radius r holds (r/R)² of the area: that share is uniform, not r itself.
        r, angle = self.radius * share.sqrt(), 2 * math.pi * turn
        if self.placement == "circle":
            # The ranks of random numbers are a random order of the places on the circle.
            place = share.argsort(1).argsort(1).double()
            angle = 2 * math.pi * (turn[:, :1] + place / self.ways)
            r = torch.full_like(angle, self.radius)
        means = torch.stack([r * angle.cos(), r * angle.sin()], -1)
        support = self._rows(means, self.shots, draw)
        return Episode(support, self._rows(means, self.queries, draw)), {"means": means}

    def _rows(self, means: Tensor, each: int, draw: torch.Generator) -> Tasks:
        n_tasks, rows = len(means), self.ways * each
        keys = torch.rand(n_tasks, rows, generator=draw, dtype=torch.float64)
        y = keys.argsort(1) % self.ways
        epsilon = torch.randn(n_tasks, rows, 2, generator=draw, dtype=torch.float64)
        centres = means.gather(1, y[:, :, None].expand(-1, -1, 2))
        x = (centres + self.noise * epsilon).to(self.dtype)
        task = torch.arange(n_tasks).repeat_interleave(rows)
        return Tasks.from_flat(x.flatten(0, 1), y.flatten(), task, n_tasks)
