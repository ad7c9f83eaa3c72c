"""Mixtures over draws of (φ, θ) on flat rows, in the units of the model, evaluated in chunks.

    p(y_r) = Σ_s w_s p(y_r | φ_s, θ_s)      for row r; Σ_s w_s = 1 within each task

`Predictive` gives them the shape and the units of the person's data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hbmeta.errors import ConvergenceError, ProgramError
from hbmeta.likelihoods import (
    Components,
    component_cdf,
    component_log_prob,
    dtype_of,
    evaluating,
    has_cdf,
    has_inverse_cdf,
    has_moments,
    largest_parameter,
    not_finite,
    ranks,
    seeded,
    unmasked,
)
from hbmeta.scores import weighted_quantile
from hbmeta.tasks import Tasks

__all__ = ["Mixture"]

_CELLS = 4_000_000
"""Numbers evaluated at once: draws × rows × numbers per row."""
_HELD = 32_000_000
"""Numbers kept for the length of one call (256 MB in float64)."""
_DRAWS = 4_000
"""Draws of y per row, at least, where no closed form is known."""

_Parts = Callable[[], Iterable[tuple[Tensor, Any]]]
"""Weights (draws, n or 1) and their components, again at every call."""


class Mixture:
    """One mixture per row; the draws of a task weigh the same in all of its rows.

    Args:
        components: one likelihood per draw and row.
        tasks: which row belongs to which task.
        log_weights: (draws, tasks), normalised within each task; None weighs all alike.
        row_log_weights: (draws, rows), normalised, to use instead for what is asked of one row.
    Raises:
        ConvergenceError: parameters or densities that are not finite; names the task.
    """

    def __init__(
        self,
        components: Components,
        tasks: Tasks,
        log_weights: Tensor | None,
        row_log_weights: Tensor | None = None,
    ) -> None:
        self.components, self.tasks = components, tasks
        self.n_draws, self.n_rows = int(components.n_draws), tasks.n_points
        self._log_weights, self._by_row = log_weights, row_log_weights

    # Pieces

    @cached_property
    def first(self) -> Any:
        """The component of the first draw, (1, rows): stands for the family. Needs a row."""
        with evaluating():
            return self._family(0, 1)

    @cached_property
    def event(self) -> tuple[int, ...]:
        """() for numbers and labels, (k,) for vectors."""
        if self.n_rows == 0:
            y = self.tasks.flat_y
            return () if y is None else tuple(y.shape[1:])
        return tuple(self.first.event_shape)

    @cached_property
    def exact_cdf(self) -> bool:
        """Whether the distribution function is known rather than read off draws."""
        with evaluating():
            return self.n_rows > 0 and has_cdf(self.first)

    @property
    def weighted(self) -> bool:
        """Whether the draws weigh differently."""
        return self._log_weights is not None

    @cached_property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the densities are computed in."""
        return self.tasks.dtype if self.n_rows == 0 else dtype_of(self.first, self.tasks.dtype)

    def per_row(self, value: float) -> Tensor:
        """(n, *event) of one value."""
        shape = (self.n_rows, *self.event)
        return torch.full(shape, value, dtype=torch.float64, device=self.tasks.device)

    def chunks(self) -> Iterator[tuple[int, int, Any]]:
        """All components as (start, stop, distribution)."""
        if self.n_rows == 0:
            return  # Pyro refuses plates of size 0, so the program is not asked.
        width = max(1, _CELLS // largest_parameter(self.first))
        for start in range(0, self.n_draws, width):
            stop = min(start + width, self.n_draws)
            yield start, stop, self._family(start, stop)

    def log_weights(self, start: int, stop: int, like: Tensor | None = None) -> Tensor:
        """(draws, n or 1), with as many dimensions as `like`."""
        if self._by_row is not None:
            found = self._by_row[start:stop]
        elif self._log_weights is None:
            shape, value = (stop - start, 1), -math.log(self.n_draws)
            found = torch.full(shape, value, dtype=torch.float64, device=self.tasks.device)
        else:
            found = self._log_weights[start:stop][:, self.tasks.task]
        missing = 0 if like is None else like.dim() - 2
        return found.reshape(*found.shape, *[1] * missing)

    def _family(self, start: int, stop: int) -> Any:
        family = unmasked(self.components.distribution(start, stop))
        shape = (stop - start, self.n_rows)
        if tuple(family.batch_shape) != shape or len(family.event_shape) > 1:
            raise ProgramError(
                "Predictive",
                needed=f"a likelihood of batch shape {shape} with numbers or vectors as events",
                found=f"{type(family).__name__} of batch shape {tuple(family.batch_shape)}, "
                f"event shape {tuple(family.event_shape)}",
                do="Check the plate `point`, and to_event(1) for vectors.",
            )
        bad = not_finite(family)
        if bad is not None:
            name, places = bad
            raise ConvergenceError(
                "Predictive",
                needed="finite parameters of the likelihood",
                found=f"a {name} of {type(family).__name__} that is not, "
                f"for {self.task_of(places.any(0))}",
                do="Look at that task's posterior; lower the step size, or run longer.",
            )
        return family

    def task_of(self, rows: Tensor) -> str:
        """The name, for a message, of the first task with a True among its rows (n,)."""
        return f"task {self.tasks.ids[int(self.tasks.task[rows.nonzero()[0, 0]])]!r}"

    # Moments

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (n, *event), by the law of total variance."""
        mean, second = self.per_row(0.0), self.per_row(0.0)
        if self.n_rows == 0:
            return mean, second
        with evaluating():
            if not has_moments(self.first):
                return self._moments_of_draws()
            # Var = Σ w (v_s + (m_s − c)²) − (Σ w (m_s − c))² for any c. With c one of the m_s the
            # difference loses no digits, and one pass is enough.
            centre = self.first.mean[0].detach().double()
            for start, stop, family in self.chunks():
                offset = family.mean.double() - centre
                weights = self.log_weights(start, stop, offset).exp()
                mean += _weighted(weights, offset)
                second += _weighted(weights, family.variance.double() + offset.square())
        return centre + mean, (second - mean.square()).clamp(min=0.0)

    def _moments_of_draws(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.per_row(0.0), self.per_row(0.0)
        for rows, draws, log_weights in self.draws(seed=0):
            weights = log_weights.reshape(*log_weights.shape, *[1] * len(self.event)).exp()
            mean[rows] = (weights * draws).sum(0)
            variance[rows] = (weights * (draws - mean[rows]).square()).sum(0)
        return mean, variance

    def average(self, name: str) -> Tensor:
        """Σ_s w_s of a parameter of the components, (n, ...)."""
        total: Tensor | None = None
        with evaluating():
            for start, stop, family in self.chunks():
                values = getattr(family, name).double()
                part = _weighted(self.log_weights(start, stop, values).exp(), values)
                total = part if total is None else total + part
        return self.per_row(0.0) if total is None else total

    # Densities

    def log_prob(self, y: Tensor) -> Tensor:
        """(n,) log Σ_s w_s p(y_r | s)."""
        device = self.tasks.device
        total = torch.full((self.n_rows,), -torch.inf, dtype=torch.float64, device=device)
        with evaluating():
            for start, stop, family in self.chunks():
                values = self._log_density(family, y) + self.log_weights(start, stop)
                total = torch.logaddexp(total, values.logsumexp(0))
        return total

    def joint_log_prob(self, y: Tensor) -> Tensor:
        """(tasks,) log Σ_s w_s Π_r p(y_r | s); 0 for a task without rows."""
        n_tasks, task = self.tasks.n_tasks, self.tasks.task
        total = torch.full((n_tasks,), -torch.inf, dtype=torch.float64, device=task.device)
        with evaluating():
            for start, stop, family in self.chunks():
                values = self._log_density(family, y)
                products = values.new_zeros(len(values), n_tasks).index_add(1, task, values)
                if self._log_weights is None:
                    products = products - math.log(self.n_draws)
                else:
                    products = products + self._log_weights[start:stop]
                total = torch.logaddexp(total, products.logsumexp(0))
        return torch.where(self.tasks.counts == 0, 0.0, total)

    def _log_density(self, family: Any, y: Tensor) -> Tensor:
        values = component_log_prob(family, y)
        bad = values.isnan().any(0)
        if bool(bad.any()):
            raise ConvergenceError(
                "Predictive.log_prob",
                needed="a log density at every y",
                found=f"NaN from {type(family).__name__} for {self.task_of(bad)}",
                do="Look at that task's y and posterior.",
            )
        return values

    def cdf(self, y: Tensor, seed: int) -> Tensor:
        """(n, *event) P(Y ≤ y), of each coordinate for vectors."""
        total = self.per_row(0.0)
        if self.exact_cdf:
            with evaluating():
                for start, stop, family in self.chunks():
                    weights = self.log_weights(start, stop).exp()
                    total += (weights * component_cdf(family, y)).sum(0)
            return total.clamp(0.0, 1.0)
        for rows, draws, log_weights in self.draws(seed):
            weights = log_weights.reshape(*log_weights.shape, *[1] * len(self.event)).exp()
            total[rows] = (weights * (draws <= y[rows])).sum(0)
        return total.clamp(0.0, 1.0)

    # Quantiles

    def quantiles(self, levels: Sequence[float], seed: int) -> Tensor:
        """(levels, n, *event), of each coordinate for vectors."""
        quantiles = torch.stack([self.per_row(0.0) for _ in levels])
        with evaluating():
            if self.exact_cdf and self._bracketed:
                parts = self._held()
                return torch.stack([self._solve(level, parts) for level in levels])
        for rows, draws, log_weights in self.draws(seed):
            # Equal weights need no sum, and no second sort.
            weights = None if self._log_weights is None else log_weights
            quantiles[:, rows] = weighted_quantile(draws, levels, weights)
        return quantiles

    @property
    def _bracketed(self) -> bool:
        """Whether bounds on the quantiles are known before looking for them."""
        if has_inverse_cdf(self.first):
            return True
        return has_moments(self.first) and bool(self.moments[1].isfinite().all())

    def _held(self) -> _Parts:
        """Weights and components, kept between steps where they fit."""

        def parts() -> Iterator[tuple[Tensor, Any]]:
            for start, stop, family in self.chunks():
                yield self.log_weights(start, stop).exp(), family

        if self.n_draws * largest_parameter(self.first) > _HELD:
            return parts
        kept = list(parts())
        return lambda: kept

    def _bracket(self, level: float, parts: _Parts) -> tuple[Tensor, Tensor, Tensor]:
        """Start, lower and upper bound (n,) of a quantile."""
        if not has_inverse_cdf(self.first):
            # The one-sided Chebyshev (Cantelli) inequality bounds every quantile.
            mean, sd = self.moments[0], self.moments[1].sqrt()
            below, above = math.sqrt((1.0 - level) / level), math.sqrt(level / (1.0 - level))
            least = getattr(self.first.support, "lower_bound", -math.inf)
            lower = (mean - below * sd).clamp(min=least)
            return mean, lower, mean + above * sd
        # The quantile of a mixture lies between the least and the greatest of its components.
        start_at, lower, upper = (self.per_row(value) for value in (0.0, math.inf, -math.inf))
        at = lower.new_tensor(level)
        for weights, family in parts():
            values = family.icdf(at).double()
            start_at += _weighted(weights, values)
            lower = torch.minimum(lower, values.amin(0))
            upper = torch.maximum(upper, values.amax(0))
        return start_at.clamp(lower, upper), lower, upper

    def _solve(self, level: float, parts: _Parts) -> Tensor:
        """(n,) root of F(x) = level, to 1e-12 of x or of the bracket: Newton's method."""
        x, lower, upper = self._bracket(level, parts)
        # Where the root is near 0, a step that corrects F by 1e-10 of the tail is small enough.
        slight, least = 1e-10 * min(level, 1.0 - level), 1e-12 * (upper - lower)
        done, before = upper <= lower, self.per_row(math.inf)
        for _ in range(200):
            if bool(done.all()):
                return x
            excess, density = self.per_row(-level), self.per_row(0.0)
            for weights, family in parts():
                excess += (weights * component_cdf(family, x)).sum(0)
                density += (weights * component_log_prob(family, x).exp()).sum(0)
            lower = torch.where(excess <= 0.0, x, lower)
            upper = torch.where(excess >= 0.0, x, upper)
            newton = x - excess / density
            inside = (newton >= lower) & (newton <= upper)
            close = inside & (((newton - x).abs() <= 1e-12 * x.abs()) | (excess.abs() <= slight))
            # Newton's steps can crawl or leave the bracket; then the bracket is halved.
            follow = close | (inside & (excess.abs() <= 0.5 * before))
            before = excess.abs()
            x = torch.where(done, x, torch.where(follow, newton, 0.5 * (lower + upper)))
            done = done | close | (upper - lower <= 1e-12 * x.abs() + least)
        raise ConvergenceError(
            "Predictive.quantile",
            needed=f"the quantile at {level}",
            found=f"no convergence for {self.task_of(~done)}",
            do="Look for draws with extreme parameters.",
        )

    # Draws

    def draws(self, seed: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of rows: their draws (draws, rows, *event) and log weights (draws, rows or 1).

        Every component is drawn from equally often, at least `_DRAWS` times together.
        """
        if self.n_rows == 0:
            return
        repeats = -(-_DRAWS // self.n_draws)
        size = largest_parameter(self.first)
        width = max(1, _HELD // (repeats * self.n_draws * math.prod(self.event)))
        for begin in range(0, self.n_rows, width):
            rows, values, log_weights = slice(begin, begin + width), [], []
            with seeded(seed, self.tasks.device), evaluating():
                for start, stop, family in self.chunks():
                    at_once = max(1, _CELLS // ((stop - start) * size))
                    weights = self.log_weights(start, stop) - math.log(repeats)
                    weights = weights if weights.shape[1] == 1 else weights[:, rows]
                    for done in range(0, repeats, at_once):
                        k = min(at_once, repeats - done)
                        values.append(family.sample((k,))[:, :, rows].flatten(0, 1).contiguous())
                        log_weights.append(weights.repeat(k, 1))
            yield rows, torch.cat(values), torch.cat(log_weights)

    def sample(self, n: int, seed: int) -> Tensor:
        """(n, rows, *event), all rows of a task from the same component."""
        count, n_tasks, device = self.n_draws, self.tasks.n_tasks, self.tasks.device
        if self.n_rows == 0:
            return self.per_row(0.0).expand(n, *self.per_row(0.0).shape)
        with seeded(seed, device), evaluating():
            if self._log_weights is None:
                rounds = [torch.randperm(count, device=device) for _ in range(-(-n // count))]
                chosen = torch.cat(rounds)[:n, None].expand(n, n_tasks)
            else:
                chosen = torch.multinomial(self._log_weights.exp().T, n, replacement=True).T
            out: Tensor = self.first.sample().new_empty(n, self.n_rows, *self.event)
            self._fill(out, chosen, ranks(chosen), 0, count)
        return out

    def _fill(self, out: Tensor, chosen: Tensor, rank: Tensor, start: int, stop: int) -> None:
        """Draw what components start to stop were chosen for; chosen and rank are (n, tasks).

        The k-th choice of a component by a task takes the component's k-th draw, so that a range
        costs (greatest rank) × (components) × (rows); a range that costs too much is halved.
        """
        wanted = (chosen >= start) & (chosen < stop)
        if not bool(wanted.any()):
            return
        repeats, size = int(rank[wanted].max()) + 1, largest_parameter(self.first)
        if stop - start > 1 and repeats * (stop - start) * size > _CELLS:
            middle = (start + stop) // 2
            self._fill(out, chosen, rank, start, middle)
            self._fill(out, chosen, rank, middle, stop)
            return
        family, task = self._family(start, stop), self.tasks.task
        at_once = max(1, _CELLS // ((stop - start) * size))
        for begin in range(0, repeats, at_once):
            draws = family.sample((min(at_once, repeats - begin),))
            now = wanted & (rank >= begin) & (rank < begin + at_once)
            which, row = now[:, task].nonzero(as_tuple=True)
            of = task[row]
            out[which, row] = draws[rank[which, of] - begin, chosen[which, of] - start, row]


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Σ_s w_s v_s; a weight of 0 silences an infinite value."""
    return torch.where(weights > 0.0, weights * values, 0.0).sum(0)
