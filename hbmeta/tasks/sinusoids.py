"""Sine waves of random amplitude and phase: the regression tasks of the MAML paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.tasks.batch import Episode, Tasks
from hbmeta.tasks.families import Family
from hbmeta.tasks.ranges import (
    Range,
    Rows,
    check_dtype,
    check_ends,
    number_range,
    row_groups,
    row_range,
    single_number,
    uniform,
)

__all__ = ["Sinusoids"]


@dataclass(frozen=True)
class Sinusoids(Family[dict[str, Tensor]]):
    """Sine waves y = A sin(x − b) + ε, one amplitude and one phase per task.

    A_i ~ U(amplitude), b_i ~ U(phase), x_ij ~ U(low, high), ε_ij ~ N(0, noise²), everything
    independent. The defaults are those of Finn, Abbeel & Levine (2017, §5.1).

    With their phase in [0, π] the mean function is E[y | x] = −(2/π) E[A] cos x, so that a learner
    who never adapts still predicts something. With phase in [0, 2π], which is often used, the mean
    function is 0. The two are different benchmarks: their losses do not compare.

    The wave is α sin x − β cos x with α = A cos b and β = A sin b, which two noiseless rows
    determine. `hbmeta.oracles.bayes_sinusoid` is the exact predictive, for noise > 0. The feature
    is "x", and the truth "amplitude" and "phase", (tasks,) each, float64.

    Args:
        amplitude: A, at least 0, in the units of y; a number, or a range (low, high).
        phase: b in radians; a number, or a range (low, high).
        low: lower end of x, in radians.
        high: upper end of x, in radians.
        noise: standard deviation of ε, in the units of y; 0 for none.
        shots: support rows per task, or a range (fewest, most), both included.
        queries: query rows per task, or a range (fewest, most), both included.
        dtype: of x and y, float32 or float64; y is computed in float64 from the x that is returned.
    Raises:
        DataError: a negative amplitude or noise, a range whose ends are the wrong way round, a
            number that is not finite, impossible row numbers, another dtype.
    Example:
        >>> Sinusoids(shots=5).sample(3, seed=0).support
        Tasks(3 tasks, 15 points (5 each), features [x], y numbers, float32)
    """

    amplitude: Range = (0.1, 5.0)
    phase: Range = (0.0, math.pi)
    low: float = -5.0
    high: float = 5.0
    noise: float = 0.0
    shots: Rows = 10
    queries: Rows = 10
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        where = "Sinusoids"
        number_range(self.amplitude, "amplitude", where=where, least=0.0)
        number_range(self.phase, "phase", where=where)
        check_ends(self.low, self.high, where=where)
        single_number(self.noise, "noise", where=where, least=0.0)
        row_range(self.shots, "shots", where=where)
        row_range(self.queries, "queries", where=where)
        check_dtype(self.dtype, where=where)

    def _draw(self, n_tasks: int, draw: torch.Generator) -> tuple[Episode, dict[str, Tensor]]:
        truth = {
            name: uniform(number_range(getattr(self, name), name, where="Sinusoids"), n_tasks, draw)
            for name in ("amplitude", "phase")
        }
        support = self._rows(self.shots, truth, draw)
        return Episode(support, self._rows(self.queries, truth, draw)), truth

    def _rows(self, rows: Rows, truth: dict[str, Tensor], draw: torch.Generator) -> Tasks:
        n_tasks = len(truth["phase"])
        task = row_groups(row_range(rows, "rows", where="Sinusoids"), n_tasks, draw)
        x = uniform((self.low, self.high), len(task), draw).to(self.dtype)
        epsilon = torch.randn(len(task), generator=draw, dtype=torch.float64)
        wave = truth["amplitude"][task] * torch.sin(x.double() - truth["phase"][task])
        y = (wave + self.noise * epsilon).to(self.dtype)
        return Tasks.from_flat(x[:, None], y, task, n_tasks, features=("x",))
