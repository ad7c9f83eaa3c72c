"""A bound over tasks, as functions of what training by it moves.

F(R̂, K, K_H) of `hbmeta.bounds.objectives` has a gradient that is a sum over tasks with weights. A
table holds R̂_i and K_i of all T tasks as they were last seen. With the derivatives a_i, b_i, c of F
at the table,

    (T/|B|) Σ_{i∈B} (a_i R̂_i + b_i K_i) + c K_H

is an unbiased estimate of the tangent there, from the tasks B of a step. K_H is not estimated. The
expectation over θ ~ 𝒬 is that over θ̂ ± κ_Q ε: in a pair, what is odd in ε cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hbmeta.bounds.objectives import Tangent, tangent
from hbmeta.errors import DataError
from hbmeta.feeding import taken, training_tasks
from hbmeta.inference.prior_expansion import expanded_prior
from hbmeta.movement import Moving
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Episode, Tasks, TaskSet
from hbmeta.training import Options, prior_scales, standard_normal

if TYPE_CHECKING:
    from hbmeta.inference.pac_bayes import PACBayes

__all__ = ["BoundProblem", "Part", "Terms"]


class Terms(NamedTuple):
    """What a bound is made of, per task: risks (tasks,) and kls (tasks,)."""

    risks: Tensor
    kls: Tensor


class Part(NamedTuple):
    """Some tasks of a fit.

    Attributes:
        rows: (tasks, 2 size) u and raw; None where Q_i is a map of the support.
        frame: m_0 and s_0 (tasks, size) of the first prior.
        support: all their rows, or their supports.
        query: their queries, where they are split.
    """

    rows: Tensor | None
    frame: tuple[Tensor, Tensor]
    support: Batch
    query: Batch | None


class BoundProblem:
    """A bound of a program on its data, as functions of what moves.

    Args:
        strategy: the settings.
        problem: the program.
        data: what `fit` was given.
        options: of the fit.
    Attributes:
        moving: θ̂.
        rows: (tasks, 2 size) u and raw of every Q_i in units of the first prior; None where Q_i is
            a map of the support.
        table: risks and kls of all tasks when they were last seen.
    Raises:
        DataError: data that the theorem does not cover.
    """

    def __init__(self, strategy: PACBayes, problem: Problem, data: Any, options: Options) -> None:
        self.strategy, self.problem = strategy, problem
        self.loss = strategy.bounded_loss(problem)
        self.tasks = _checked(strategy, data, options)
        self.query: Batch | None = None
        support = self.tasks
        if strategy.splits:
            assert isinstance(data, Episode)
            support, self.query = data.support, problem.batch(_there(data.query, problem))
        self.support = problem.batch(_there(support, problem))
        self.n_tasks = self.tasks.n_tasks
        self.each = options.tasks_per_step or self.n_tasks
        self.samples = self.support.counts.double()
        start = problem.theta(self.support)
        self.moving = Moving(start, prior_scales(problem, start, self.support), None)
        self.rows: Tensor | None = None
        with torch.no_grad():
            prior = expanded_prior(problem, start, self.support)
        self.frame = prior.loc.detach(), prior.scale.detach()
        if not strategy.splits:
            self.rows = torch.zeros_like(torch.cat(self.frame, -1))
        zero = torch.zeros(self.n_tasks, dtype=torch.float64, device=problem.device)
        self.table = Terms(zero, zero.clone())
        found = strategy.search_noise(torch.cat(self.frame, -1)) if strategy.splits else []
        # Traced as one input, so that a graph does not hold the numbers.
        self.search_noise = torch.stack(found) if found else None

    def fix_untouched(self) -> list[str]:
        """Leaves θ where it starts that neither risks nor divergences are functions of."""
        if not self.moving.free:
            return []
        leaves = {k: v.detach().clone().requires_grad_() for k, v in self.moving.free.items()}
        generator = torch.Generator().manual_seed(0)
        terms = self.terms(leaves, self.part(None), self.draw(generator, self.n_tasks))
        total = terms.risks.sum() + terms.kls.sum()
        found: list[Any] = [None] * len(leaves)
        if total.requires_grad:
            found = list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
        names = [key for key, gradient in zip(leaves, found, strict=True) if gradient is None]
        self.moving.fix(names)
        return [key.removeprefix("theta/") for key in names]

    @property
    def dimension(self) -> int:
        """D, the number of hyperparameters."""
        return sum(value.numel() for value in self.moving.free.values())

    def noise_shapes(self, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Of the random numbers of a step of so many tasks."""
        shapes = self.strategy.noise(self.problem, n_tasks)
        return shapes | {key: tuple(value.shape) for key, value in self.moving.free.items()}

    def hyper_kl(self, free: Mapping[str, Tensor]) -> Tensor:
        """() K_H."""
        prior, own = self.strategy.hyperprior_scale, self.strategy.hyperposterior_scale
        theta, start = self.moving.unpack(free)[0], self.moving.start
        names = [key.removeprefix("theta/") for key in free]
        squares = [(theta[name] - start[name]).square().sum() for name in names]
        ratio = (own / prior) ** 2
        spread = 0.5 * self.dimension * (ratio - 1 - math.log(ratio))
        return torch.stack(squares).sum() / (2 * prior**2) + spread

    def terms(
        self,
        free: Mapping[str, Tensor],
        part: Part,
        noise: Mapping[str, Tensor],
    ) -> Terms:
        """Risks and divergences of some tasks, averaged over a pair of draws of θ.

        Args:
            free: what moves of θ̂.
            part: the tasks.
            noise: of θ by the names of `free`; "phi" (draws, tasks, size), and "search".
        """
        theta = self.moving.unpack(free)[0]
        found: list[Terms] = []
        for sign in (1.0, -1.0):
            spread = sign * self.strategy.hyperposterior_scale
            drawn: Theta = dict(theta)
            for key in free:
                name = key.removeprefix("theta/")
                drawn[name] = theta[name] + spread * noise[key].to(theta[name])
            phi = sign * noise["phi"]
            if part.query is not None:
                more = {**noise, "phi": phi}
                found.append(
                    self.strategy.split_terms(
                        self.problem, self.loss, drawn, part.support, part.query, more
                    )
                )
            else:
                assert part.rows is not None
                found.append(
                    self.strategy.free_terms(
                        self.problem, self.loss, drawn, part.frame, part.rows, part.support, phi
                    )
                )
        first, second = found
        return Terms((first.risks + second.risks) / 2, (first.kls + second.kls) / 2)

    def gradient(
        self,
        free: dict[str, Tensor],
        part: Part,
        noise: dict[str, Tensor],
        weights: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Terms, list[Tensor]]:
        """Terms, and the gradient of Σ (w_r R̂_i + w_k K_i) + w_h K_H in `free`, then `rows`."""
        free = {k: v.detach().requires_grad_() for k, v in free.items()}
        leaves = list(free.values())
        if part.rows is not None:
            part = part._replace(rows=part.rows.detach().requires_grad_())
            leaves += [rows for rows in (part.rows,) if rows is not None]
        terms = self.terms(free, part, noise)
        loss = (weights[0] * terms.risks + weights[1] * terms.kls).sum()
        loss = loss + weights[2] * self.hyper_kl(free)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = [
            torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)
        ]
        return Terms(terms.risks.detach(), terms.kls.detach()), gradients

    def tangent(self) -> Tangent:
        """F and its derivatives at the table and at θ̂."""
        with torch.no_grad():
            hyper_kl = self.hyper_kl(self.moving.free)
        return tangent(
            self.strategy.objective,
            risks=self.table.risks,
            kls=self.table.kls,
            hyper_kl=hyper_kl,
            n_samples=self.samples,
            delta=self.strategy.delta,
        )

    def part(self, chosen: Tensor | None) -> Part:
        """Some tasks; all for None."""
        if chosen is None:
            return Part(self.rows, self.frame, self.support, self.query)
        loc, scale = self.frame
        return Part(
            None if self.rows is None else self.rows[chosen],
            (loc[chosen], scale[chosen]),
            taken(self.support, chosen),
            None if self.query is None else taken(self.query, chosen),
        )

    def draw(self, generator: torch.Generator, n_tasks: int | None = None) -> dict[str, Tensor]:
        """The random numbers of a step, or of so many tasks."""
        shapes = self.noise_shapes(self.each if n_tasks is None else n_tasks)
        found = standard_normal(shapes, generator, self.support.x)
        return found if self.search_noise is None else found | {"search": self.search_noise}

    def weights(self, at: Tangent, chosen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a step: T/|B| times the derivatives of its tasks, and that of K_H."""
        some: Any = slice(None) if chosen is None else chosen
        share = self.n_tasks / self.each
        parts = share * at.risks[some], share * at.kls[some], at.hyper_kl
        risks, kls, hyper_kl = (value.to(self.problem.dtype) for value in parts)
        return risks, kls, hyper_kl

    def fill(self, generator: torch.Generator) -> None:
        """The table where training starts."""
        for start in range(0, self.n_tasks, self.each):
            # The last part overlaps the one before: all are of one size.
            first = min(start, self.n_tasks - self.each)
            chosen = torch.arange(first, first + self.each, device=self.support.x.device)
            with torch.no_grad():
                self.note(
                    chosen, self.terms(self.moving.free, self.part(chosen), self.draw(generator))
                )

    def note(self, chosen: Tensor | None, terms: Terms) -> None:
        """Writes what a step saw into the table."""
        some: Any = slice(None) if chosen is None else chosen
        self.table.risks[some] = terms.risks.double()
        self.table.kls[some] = terms.kls.double()


def _there(tasks: Tasks, problem: Problem) -> Tasks:
    return tasks.to(device=problem.device, dtype=problem.dtype)


def _checked(strategy: PACBayes, data: Any, options: Options) -> Tasks:
    """The tasks of a fit, where the theorem covers them."""
    where = f"{strategy.name}.fit"
    if not isinstance(data, Tasks | Episode | TaskSet):
        raise DataError(
            where,
            needed="the T tasks that the bound is about",
            found=f"{type(data).__name__}, which draws new ones without end",
            do="Pass source.sample(n, seed=0).",
        )
    if strategy.splits and (not isinstance(data, Episode) or data.without_query):
        found = type(data).__name__
        if isinstance(data, Episode):
            found = f"none in task {data.without_query[0]!r}"
        raise DataError(
            where,
            needed="an Episode, with support and query of every task, for query_split",
            found=found,
            do="Cut the tasks once: Episode, or tasks.split(..., seed=0).episode_of_all.",
        )
    tasks = training_tasks(data, options.seed)
    least = 2 if strategy.objective == "amit_meir" else 1
    few = int(tasks.counts.min())
    if few < least:
        raise DataError(
            where,
            needed=f"{least} row{'s' * (least > 1)} or more in every task for {strategy.objective}",
            found=f"{few} in task {tasks.ids[int(tasks.counts.argmin())]!r}",
            do="Leave such tasks out" + (', or use objective="joint_kl".' if least > 1 else "."),
        )
    if tasks.n_tasks < 2:
        raise DataError(
            where,
            needed="two tasks or more: the bound is about new ones",
            found="one",
            do="Use adapt for a single task.",
        )
    wanted = options.tasks_per_step
    if wanted is not None and (type(wanted) is not int or not 1 <= wanted <= tasks.n_tasks):
        raise DataError(
            where,
            needed=f"tasks_per_step between 1 and {tasks.n_tasks}",
            found=str(wanted),
            do="Leave it out to use all tasks at every step.",
        )
    return tasks
