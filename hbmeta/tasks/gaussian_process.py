"""Functions drawn from Gaussian processes whose hyperparameters differ from task to task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.tasks.batch import Episode, Tasks
from hbmeta.tasks.families import Family
from hbmeta.tasks.kernels import (
    KernelName,
    check_kernel,
    cholesky_factor,
    correlation,
    noise_variance,
)
from hbmeta.tasks.layout import RaggedLayout
from hbmeta.tasks.ranges import (
    Range,
    Rows,
    check_dtype,
    check_ends,
    number_range,
    row_groups,
    row_range,
    uniform,
)

__all__ = ["GaussianProcessTasks"]


@dataclass(frozen=True)
class GaussianProcessTasks(Family[dict[str, Tensor]]):
    """Regressions on functions from a Gaussian process: the tasks of the neural-process papers.

    f_i ~ GP(0, scale_i² k(·, ·; lengthscale_i, period_i)), x_ij ~ U(low, high),
    y_ij = f_i(x_ij) + noise_i ε_ij, ε_ij ~ N(0, 1). Support and query share the function f_i. Each
    hyperparameter is a number, or a range from which every task draws its own, uniformly.

    Hence y_i ~ N(0, scale_i² K_i + noise_i² I), which `hbmeta.oracles.known_kernel` conditions on
    the support. y is drawn from that covariance by one batched Cholesky factor over the tasks,
    padded to the longest, in float64. Where noise < 1e-4 scale, the variance noise² is raised
    to 1e-8 scale² (jitter), in the draw and in the oracle alike: without it, two equal inputs make
    the covariance singular.

    The kernels are parametrised as in gpytorch. That matters for "periodic", whose lengthscale is
    not squared: exp(−2 sin²(π d / period) / lengthscale). See `hbmeta.tasks.kernels`.

    The feature is "x", and the truth "lengthscale", "scale", "noise" and for the periodic kernel
    "period", (tasks,) each, float64.

    Args:
        kernel: "rbf", "matern12", "matern32", "matern52" or "periodic".
        lengthscale: above 0, in the units of x (without a unit for "periodic").
        scale: standard deviation of f, above 0, in the units of y.
        noise: standard deviation of y given f, at least 0, in the units of y.
        period: above 0, in the units of x; read by "periodic" only.
        low: lower end of x.
        high: upper end of x.
        shots: support rows per task, or a range (fewest, most), both included.
        queries: query rows per task, or a range (fewest, most), both included.
        dtype: of x and y, float32 or float64; y is computed in float64 from the x that is returned.
    Raises:
        DataError: an unknown kernel, a hyperparameter that is not finite or not positive, a range
            whose ends are the wrong way round, impossible row numbers, another dtype.
        CurvatureError: when tasks are drawn, so many rows that a covariance is singular to
            rounding.
    Example:
        >>> GaussianProcessTasks(kernel="matern52", shots=(3, 8)).sample(2, seed=0).query
        Tasks(2 tasks, 40 points (20 each), features [x], y numbers, float64)
    """

    kernel: KernelName = "rbf"
    lengthscale: Range = (0.25, 1.0)
    scale: Range = 1.0
    noise: Range = 0.1
    period: Range = 1.0
    low: float = -2.0
    high: float = 2.0
    shots: Rows = (3, 20)
    queries: Rows = 20
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        where = "GaussianProcessTasks"
        check_kernel(self.kernel, where=where)
        for name in ("lengthscale", "scale", "noise", "period"):
            positive = name != "noise"
            number_range(getattr(self, name), name, where=where, least=0.0, above=positive)
        check_ends(self.low, self.high, where=where)
        row_range(self.shots, "shots", where=where)
        row_range(self.queries, "queries", where=where)
        check_dtype(self.dtype, where=where)

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of what differs between tasks; "period" only where the kernel has one."""
        own = ("period",) if self.kernel == "periodic" else ()
        return ("lengthscale", "scale", "noise", *own)

    def covariance(self, truth: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
        """(tasks, n, m) covariance of f at two sets of inputs (tasks, n) and (tasks, m); float64.

        Args:
            truth: the hyperparameters, (tasks,) each.
            first: (tasks, n).
            second: (tasks, m).
        """
        distance = (first.double()[:, :, None] - second.double()[:, None, :]).abs()
        return truth["scale"][:, None, None] ** 2 * correlation(self.kernel, distance, truth)

    def _draw(self, n_tasks: int, draw: torch.Generator) -> tuple[Episode, dict[str, Tensor]]:
        where = "GaussianProcessTasks.sample"
        truth = {
            name: uniform(number_range(getattr(self, name), name, where=where), n_tasks, draw)
            for name in self.hyperparameters
        }
        groups = [
            row_groups(row_range(rows, "rows", where=where), n_tasks, draw)
            for rows in (self.shots, self.queries)
        ]
        # One function per task: its support rows, then its query rows, in one layout.
        task, order = torch.cat(groups).sort(stable=True)
        in_query = order >= len(groups[0])
        x = uniform((self.low, self.high), len(task), draw).to(self.dtype)
        normal = torch.randn(len(task), generator=draw, dtype=torch.float64)
        layout = RaggedLayout(task, n_tasks)
        at = layout.pad(x)
        variance = noise_variance(truth["noise"], truth["scale"])
        identity = torch.eye(at.shape[1], dtype=torch.float64)
        covariance = self.covariance(truth, at, at) + variance[:, None, None] * identity
        factor = cholesky_factor(covariance, layout.mask, where=where)
        # Padding stands last and L is lower triangular: no real row sees what pads z.
        y = layout.unpad((factor @ layout.pad(normal)[:, :, None])[..., 0]).to(self.dtype)
        all_rows = Tasks.from_flat(x[:, None], y, task, n_tasks, features=("x",))
        return Episode(all_rows.keep(~in_query), all_rows.keep(in_query)), truth
