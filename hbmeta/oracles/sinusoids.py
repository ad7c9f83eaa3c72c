"""The predictive of a sine wave whose amplitude and phase are averaged over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from hbmeta.errors import ConvergenceError, DataError
from hbmeta.likelihoods import seeded
from hbmeta.oracles.checks import check_episode
from hbmeta.oracles.quadrature import DEPTH, gauss_legendre, mass_interval
from hbmeta.predictive import Predictive
from hbmeta.tasks import Episode, Sinusoids, Tasks
from hbmeta.tasks.ranges import number_range

__all__ = ["bayes_sinusoid"]

_TOLERANCE = 1e-4
"""How much half as many nodes may change a log density, in nats."""
_MOST_NODES = 2**25
"""Nodes × tasks that are held at once; three numbers each (800 MB)."""


def bayes_sinusoid(
    family: Sinusoids, episode: Episode, *, nodes: tuple[int, int] | None = None
) -> Predictive:
    """Average over the posterior of amplitude and phase, given the support of each task.

    p(y | x, S) = ∫∫ N(y; A sin(x − b), noise²) p(A, b | S) dA db, the prior uniform on the family's
    box: a mixture of Normals over the nodes of Gauss-Legendre quadrature in A and b. They lie
    where each task's posterior lives (A given b within 8 of its standard deviations, b where its
    profile likelihood is within e⁻³² of the best), so a posterior is resolved however narrow it is.
    A wide one takes the more nodes the smaller the noise is: about 3 · max(A) · range(b) / noise
    where the support leaves the phase open, such as a support of one row.

    The answer is compared with those of half as many nodes in A and in b: the log evidence of
    every task, and the log density of a draw from the predictive of every row, in nats.

    Args:
        family: its ranges are the prior, its noise is known.
        episode: the support to condition on; of the query only x is read.
        nodes: nodes of A and of b, at least 4 each; None doubles them from (16, 32) on until
            the comparison agrees to 1e-4.
    Raises:
        DataError: noise 0, whose posterior has no density; an episode that is none of the family.
        ConvergenceError: half as many nodes change a log density by more than 1e-4; names the task.
    Example:
        >>> family = Sinusoids(noise=0.3, shots=5, queries=2)
        >>> bayes_sinusoid(family, family.sample(3, seed=0)).mean.shape
        torch.Size([3, 2])
    """
    where = "bayes_sinusoid"
    y = check_episode(family, Sinusoids, episode, 1, where=where)
    if family.noise == 0.0:
        raise DataError(
            where,
            needed="noise above 0",
            found=f"noise={family.noise!r}",
            do="Two rows determine a noiseless wave; give the family a little noise, say 0.05.",
        )
    if nodes is not None:
        _check_nodes(nodes, where=where)
    posterior = _WavePosterior(family, episode.support, y)
    of_a, of_b = (16, 32) if nodes is None else nodes
    while True:
        fine = posterior.grid(of_a, of_b, episode.query)
        # Each of the two directions by itself: the waves need more nodes in phase than amplitude.
        halved = (of_a // 2, of_b), (of_a, of_b // 2)
        coarse = [posterior.grid(*counts, episode.query) for counts in halved]
        # The evidence costs nothing beside densities; where it is not there yet, neither are they.
        changes = [_evidence_change(fine, grid) for grid in coarse]
        if max(float(change.max()) for change in changes) <= _TOLERANCE:
            changes = _density_changes(fine, coarse)
        wanted = [not float(change.max()) <= _TOLERANCE for change in changes]  # also a NaN
        if not any(wanted):
            return fine.predictive
        more = tuple(n * 2 if w else n for n, w in zip((of_a, of_b), wanted, strict=True))
        if nodes is not None or posterior.size(*more) > _MOST_NODES:
            change = torch.maximum(*changes)
            raise ConvergenceError(
                where,
                needed=f"{of_a} × {of_b} nodes whose halves change log densities by {_TOLERANCE:g}",
                found=f"a change of {float(change.max()):.2g} for task "
                f"{episode.ids[int(change.argmax())]!r}",
                do="Pass nodes=None or more nodes, fewer tasks at a time, or more noise.",
            )
        of_a, of_b = more


class _WavePosterior:
    """log p(y_S | A, b) of every task from six sums over its rows, and where its mass lies."""

    def __init__(self, family: Sinusoids, support: Tasks, y: Tensor) -> None:
        x = support.flat_x[:, 0].double()
        sin, cos = x.sin(), x.cos()
        terms = torch.stack([sin * sin, sin * cos, cos * cos, y * sin, y * cos, y * y])
        zeros = terms.new_zeros(len(terms), support.n_tasks)
        self.sums = zeros.index_add(1, support.task, terms)
        self.noise, self.n_tasks = float(family.noise), support.n_tasks
        self.amplitude = number_range(family.amplitude, "amplitude", where="bayes_sinusoid")
        self.phase = number_range(family.phase, "phase", where="bayes_sinusoid")
        self.lower, self.upper = self._phases()

    def _quadratic(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """c and G of Σ (y − A sin(x − b))² = Σy² − 2 A c + A² G, for phases (..., tasks)."""
        sin, cos = b.sin(), b.cos()
        ss, sc, cc, ys, yc, _ = self.sums
        gram = ss * cos**2 - 2 * sc * sin * cos + cc * sin**2
        return ys * cos - yc * sin, gram.clamp(min=1e-30)

    def log_likelihood(self, a: Tensor, b: Tensor) -> Tensor:
        """log p(y_S | A, b) (..., tasks), up to a constant."""
        c, gram = self._quadratic(b)
        return -(self.sums[5] - 2 * a * c + a**2 * gram) / (2 * self.noise**2)

    def amplitudes(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest A in its range given b, and the ends of the interval that holds its mass.

        A | b, S is N(c/G, noise²/G) cut to the range of A.
        """
        c, gram = self._quadratic(b)
        mean, variance = c / gram, self.noise**2 / gram
        best = mean.clamp(*self.amplitude)
        return best, *mass_interval(mean, best, variance, *self.amplitude)

    def _phases(self) -> tuple[Tensor, Tensor]:
        """Ends (tasks,) of the phases that hold the mass, found by zooming in."""
        low, high = (self.sums.new_full((self.n_tasks,), end) for end in self.phase)
        steps = torch.linspace(0, 1, 257, dtype=torch.float64, device=low.device)[:, None]
        turns = (self.phase[1] - self.phase[0]) / (2 * math.pi)
        if round(turns) >= 1 and abs(turns - round(turns)) < 1e-9:
            # On a full circle, cut opposite of the mass: a posterior around 0 is one piece then.
            grid = low + 2 * math.pi * steps
            best = self._profile(grid).argmax(0, keepdim=True)
            low = grid.gather(0, best)[0] - math.pi
            high = low + 2 * math.pi
        for _ in range(5):
            grid = low + (high - low) * steps
            value = self._profile(grid)
            kept = (value >= value.amax(0) - DEPTH).to(torch.int8)
            first = (kept.argmax(0, keepdim=True) - 1).clamp(min=0)
            last = (len(grid) - kept.flip(0).argmax(0, keepdim=True)).clamp(max=len(grid) - 1)
            low, high = grid.gather(0, first)[0], grid.gather(0, last)[0]
        return low, high

    def _profile(self, b: Tensor) -> Tensor:
        return self.log_likelihood(self.amplitudes(b)[0], b)

    def _counts(self, of_a: int, of_b: int) -> tuple[int, int]:
        """Nodes of A and of b: one for what is fixed."""
        (a0, a1), (b0, b1) = self.amplitude, self.phase
        return of_a if a0 < a1 else 1, of_b if b0 < b1 else 1

    def size(self, of_a: int, of_b: int) -> int:
        """Nodes × tasks of a grid."""
        return math.prod(self._counts(of_a, of_b)) * self.n_tasks

    def grid(self, of_a: int, of_b: int, query: Tasks) -> _Waves:
        """The posterior on a grid of nodes of each task."""
        (t_a, w_a), (t_b, w_b) = (gauss_legendre(k, self.sums) for k in self._counts(of_a, of_b))
        half = 0.5 * (self.upper - self.lower)
        b = 0.5 * (self.lower + self.upper) + half * t_b[:, None]  # (nodes, tasks)
        _, low, high = self.amplitudes(b)
        a = 0.5 * (low + high)[:, None] + 0.5 * (high - low)[:, None] * t_a[:, None]
        b = b[:, None].expand_as(a)  # (nodes of b, nodes of A, tasks)
        # A fixed amplitude or phase has an interval of length 0, and a weight of 1.
        length_a = torch.where(high > low, high - low, 1.0)[:, None]
        length_b = torch.where(half > 0, half, 1.0)
        log_weights = self.log_likelihood(a, b) + w_b.log()[:, None, None] + w_a.log()[:, None]
        log_weights = log_weights + length_a.log() + length_b.log()
        a, b, log_weights = (v.flatten(0, 1) for v in (a, b, log_weights))
        return _Waves(a, b, log_weights, self.noise, query)


@dataclass(frozen=True, eq=False)
class _Waves:
    """Normals around the waves of the nodes; amplitude, phase and weight are (nodes, tasks)."""

    amplitude: Tensor
    phase: Tensor
    log_weights: Tensor
    noise: float
    tasks: Tasks

    @property
    def n_draws(self) -> int:
        """Number of nodes."""
        return len(self.amplitude)

    def distribution(self, start: int, stop: int) -> Any:
        """The likelihoods of nodes start to stop, batch shape (stop − start, n)."""
        task, x = self.tasks.task, self.tasks.flat_x[:, 0].double()
        loc = self.amplitude[start:stop, task] * torch.sin(x - self.phase[start:stop, task])
        return Normal(loc, loc.new_full((), self.noise).expand_as(loc), validate_args=False)

    @property
    def predictive(self) -> Predictive:
        """The mixture."""
        return Predictive(self, self.tasks, log_weights=self.log_weights)

    def draws(self, n: int) -> Tensor:
        """(n, rows) draws of y to compare densities at."""
        with seeded(0, self.phase.device):
            weights = self.log_weights.softmax(0).T
            node = torch.multinomial(weights, n, replacement=True).T[:, self.tasks.task]
            normal = torch.randn(node.shape, dtype=torch.float64, device=node.device)
        a, b = (
            values[:, self.tasks.task].gather(0, node) for values in (self.amplitude, self.phase)
        )
        return a * torch.sin(self.tasks.flat_x[:, 0].double() - b) + self.noise * normal


def _evidence_change(fine: _Waves, coarse: _Waves) -> Tensor:
    """(tasks,) how much the log evidence differs between two grids, in nats."""
    return (fine.log_weights.logsumexp(0) - coarse.log_weights.logsumexp(0)).abs()


def _density_changes(fine: _Waves, others: list[_Waves]) -> list[Tensor]:
    """(tasks,) the largest difference of a log density to each of the other grids, in nats."""
    y, tasks = fine.draws(1)[0], fine.tasks
    exact = fine.predictive.log_prob(y)
    changes = [(exact - other.predictive.log_prob(y)).abs().amax(1) for other in others]
    # An empty task has one padding cell, which stands for a row of another task.
    return [torch.where(tasks.counts > 0, change, 0.0) for change in changes]


def _check_nodes(nodes: Any, *, where: str) -> None:
    pair = tuple(nodes) if isinstance(nodes, tuple | list) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not whole or min(pair) < 4:
        raise DataError(
            where,
            needed="nodes as two whole numbers of at least 4, or None",
            found=f"{nodes!r}",
            do="Pass nodes=(64, 128), or None for as many as are needed.",
        )
