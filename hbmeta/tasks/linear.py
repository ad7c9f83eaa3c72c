"""The linear-Gaussian family of tasks, whose truth and whose exact posterior are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.batch import Episode, Tasks
from hbmeta.tasks.families import Family
from hbmeta.tasks.ranges import Rows, check_ends, row_groups, row_range

__all__ = ["LinearTasks"]


@dataclass(frozen=True, eq=False)
class LinearTasks(Family[Tensor]):
    """Linear regressions whose coefficients come from one Gaussian.

    φ_i ~ N(mean, covariance), x_ij uniform on [low, high] in each column,
    y_ij = x_ijᵀ φ_i + ε_ij with ε_ij ~ N(0, noise²), everything independent.
    Hence y_i ~ N(X_i mean, X_i covariance X_iᵀ + noise² I), which is what makes it a test bed:
    every posterior φ_i | S_i and the marginal likelihood have a closed form. Tasks are float64, and
    the truth is φ (tasks, p).

    Args:
        mean: (p,) mean of the coefficients.
        covariance: (p, p) their covariance; symmetric, positive semi-definite.
        noise: standard deviation of ε, in the units of y.
        shots: support rows per task, or a range (fewest, most), both included.
        queries: query rows per task, or a range (fewest, most), both included.
        low: lower end of x.
        high: upper end of x.
        intercept: whether the first coefficient belongs to a constant column named "intercept"
            (then p - 1 columns are uniform), or all p columns are uniform.
    Raises:
        DataError: a covariance that is none, noise <= 0, low >= high, impossible row numbers.
    Example:
        >>> family = LinearTasks([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]], noise=0.2, shots=(2, 6))
        >>> family.sample(3, seed=0).query
        Tasks(3 tasks, 30 points (10 each), features [intercept, x0], y numbers, float64)
    """

    mean: Sequence[float] | Tensor
    covariance: Sequence[Sequence[float]] | Tensor
    noise: float
    shots: Rows = 5
    queries: Rows = 10
    low: float = -2.0
    high: float = 2.0
    intercept: bool = True

    def __post_init__(self) -> None:
        mean = torch.as_tensor(self.mean, dtype=torch.float64)
        covariance = torch.as_tensor(self.covariance, dtype=torch.float64)
        if mean.dim() != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise DataError(
                "LinearTasks",
                needed="a mean of shape (p,) and a covariance of shape (p, p)",
                found=f"shapes {tuple(mean.shape)} and {tuple(covariance.shape)}",
                do="Give one mean, one row and one column per coefficient.",
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise DataError(
                "LinearTasks",
                needed="a finite mean and covariance",
                found=f"mean {mean.tolist()}, covariance {covariance.tolist()}",
                do="Replace the NaN or infinite entries.",
            )
        eigenvalues = torch.linalg.eigvalsh(covariance)
        slack = 1e-12 * float(covariance.abs().max())  # rounding of an exactly singular matrix
        symmetric = torch.allclose(covariance, covariance.T, rtol=1e-12, atol=0.0)
        if not symmetric or float(eigenvalues[0]) < -slack:
            raise DataError(
                "LinearTasks",
                needed="a symmetric positive semi-definite covariance",
                found=f"smallest eigenvalue {float(eigenvalues[0]):.3g}"
                if symmetric
                else f"the asymmetric matrix {covariance.tolist()}",
                do="Build it as A Aᵀ, or from standard deviations and correlations.",
            )
        if not 0 < self.noise < float("inf"):
            raise DataError(
                "LinearTasks",
                needed="noise as a positive standard deviation",
                found=f"{self.noise!r}",
                do="Pass for example noise=0.1.",
            )
        check_ends(self.low, self.high, where="LinearTasks")
        for name in ("shots", "queries"):
            row_range(getattr(self, name), name, where="LinearTasks")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the p columns of x."""
        uniform = len(self.mean) - int(self.intercept)
        return ("intercept",) * int(self.intercept) + tuple(f"x{c}" for c in range(uniform))

    def _draw(self, n_tasks: int, draw: torch.Generator) -> tuple[Episode, Tensor]:
        mean, covariance = torch.as_tensor(self.mean), torch.as_tensor(self.covariance)
        # A square root by eigenvalues: unlike Cholesky it exists for a singular covariance too.
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
        normal = torch.randn(n_tasks, len(mean), generator=draw, dtype=torch.float64)
        phi = mean + normal @ root.T
        return Episode(self._rows(phi, self.shots, draw), self._rows(phi, self.queries, draw)), phi

    def _rows(self, phi: Tensor, rows: Rows, draw: torch.Generator) -> Tasks:
        task = row_groups(row_range(rows, "rows", where="LinearTasks"), len(phi), draw)
        n, p = len(task), phi.shape[1]
        x = torch.ones(n, p, dtype=torch.float64)
        first = int(self.intercept)
        uniform = torch.rand(n, p - first, generator=draw, dtype=torch.float64)
        x[:, first:] = self.low + (self.high - self.low) * uniform
        epsilon = torch.randn(n, generator=draw, dtype=torch.float64)
        y = (x * phi[task]).sum(1) + self.noise * epsilon
        return Tasks.from_flat(x, y, task, len(phi), features=self.features)
