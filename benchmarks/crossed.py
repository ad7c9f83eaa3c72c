"""The crossed linear model of university ratings by dense linear algebra: what is exact about it.

With X = (1, service), Z = (students, lecturers, departments) as 0/1 columns and D the diagonal of
their scales over σ,

    y = X b + σ Z D u + σ e,   u ~ N(0, I),  e ~ N(0, I),

the likelihood with u and b taken out is a function of the three ratios in D alone (Bates et al.
2015, J. Stat. Softw. 67(1), eq. 34): with A = D ZᵀZ D + I,

    −2 log L = log det A + n (1 + log(2π r²/n)),   r² = min_{b,u} ‖y − X b − Z D u‖² + ‖u‖².

The block of the students in A is diagonal, so that one dense factor of the other 1,142 columns is
all the work. Nothing here knows of hbmeta's inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.optimize
import scipy.sparse

from benchmarks.scale_program import Ratings
from hbmeta.tasks import Tasks

__all__ = ["Crossed", "Estimate"]

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Where the likelihood is largest.

    Attributes:
        scales: τ_student, τ_lecturer, τ_department and σ.
        fixed: μ and β.
        log_likelihood: there.
        students: mean of the students' effects given the scales (the effects' own mode).
        students_sd: their standard deviations given the scales, b included under a flat prior.
    """

    scales: Vector
    fixed: Vector
    log_likelihood: float
    students: Vector
    students_sd: Vector


class Crossed:
    """The sums of squares and products that the likelihood needs.

    Args:
        y: (n,).
        x: (n, columns) of the fixed effects, the 1s included.
        groups: of each row: student, lecturer, department, numbered from 0.
        sizes: how many there are of each.
    """

    def __init__(
        self, y: Vector, x: Vector, groups: tuple[Any, Any, Any], sizes: tuple[int, int, int]
    ) -> None:
        n = len(y)
        rows = np.arange(n)
        ones = np.ones(n)
        student, *others = (
            scipy.sparse.csr_matrix((ones, (rows, g)), shape=(n, k))
            for g, k in zip(groups, sizes, strict=True)
        )
        rest = scipy.sparse.hstack([*others, scipy.sparse.csr_matrix(x), y[:, None]]).tocsr()
        self.n, self.sizes, self.columns = n, sizes, x.shape[1]
        self.counts = np.asarray(student.sum(0)).ravel()
        self.across = student.T @ rest
        self.within = (rest.T @ rest).toarray()

    @classmethod
    def of_ratings(cls, program: Ratings, tasks: Tasks) -> Crossed:
        """Those of the ratings of some students."""
        assert tasks.flat_y is not None
        x = tasks.flat_x.numpy()
        return cls(
            tasks.flat_y.numpy(),
            np.column_stack([np.ones(len(x)), x[:, 0]]),
            (tasks.task.numpy(), x[:, 1].astype(int), x[:, 2].astype(int)),
            (tasks.n_tasks, program.lecturers, program.departments),
        )

    def _factor(self, ratios: Vector) -> tuple[Vector, Vector, Vector]:
        """Diagonal of the students' block, and the factor of all else, y last; by Schur."""
        scale = np.concatenate([np.repeat(ratios[1:], self.sizes[1:]), np.ones(self.columns + 1)])
        diagonal = ratios[0] ** 2 * self.counts + 1.0
        across = (ratios[0] / np.sqrt(diagonal))[:, None] * self.across.toarray() * scale
        block = scale[:, None] * self.within * scale
        effects = sum(self.sizes[1:])
        block[np.arange(effects), np.arange(effects)] += 1.0
        return diagonal, across, scipy.linalg.cholesky(block - across.T @ across, lower=True)

    def deviance(self, ratios: Vector) -> float:
        """−2 log L at τ/σ of students, lecturers and departments, b and σ at their best."""
        diagonal, _, factor = self._factor(ratios)
        effects = sum(self.sizes[1:])
        log_det = np.log(diagonal).sum() + 2 * np.log(np.diag(factor)[:effects]).sum()
        squared = factor[-1, -1] ** 2
        return float(log_det + self.n * (1 + math.log(2 * math.pi * squared / self.n)))

    def maximum(self, start: tuple[float, float, float] = (0.3, 0.4, 0.1)) -> Estimate:
        """The maximum of the likelihood, by L-BFGS over the logarithms of the ratios."""
        found = scipy.optimize.minimize(
            lambda logs: self.deviance(np.exp(logs)) / self.n,
            np.log(np.asarray(start)),
            method="L-BFGS-B",
            options={"ftol": 1e-14, "gtol": 1e-8},
        )
        ratios = np.exp(found.x)
        diagonal, across, factor = self._factor(ratios)
        last = len(factor) - 1
        sigma = factor[last, last] / math.sqrt(self.n)
        # The factor's last row is that of y: what solves for all others.
        others = scipy.linalg.solve_triangular(factor[:last, :last].T, factor[last, :last])
        # A student given the rest: y's column less those of the others, over the block's diagonal.
        along = across[:, last] - across[:, :last] @ others
        students = ratios[0] * along / np.sqrt(diagonal)
        effects = sum(self.sizes[1:])
        spread = scipy.linalg.solve_triangular(factor[:last, :last], across[:, :last].T, lower=True)
        variance = (1.0 + (spread**2).sum(0)) / diagonal
        return Estimate(
            scales=np.concatenate([ratios, [1.0]]) * sigma,
            fixed=others[effects:],
            log_likelihood=-0.5 * float(self.deviance(ratios)),
            students=students,
            students_sd=sigma * ratios[0] * np.sqrt(variance),
        )
