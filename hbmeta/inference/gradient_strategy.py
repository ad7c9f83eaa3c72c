"""The base of the gradient lens: q(φ | S) = δ(φ_N), N steps of an inner optimizer on L^S.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: φ_0 the location of p(φ | θ), in unconstrained space; φ_{n+1} one step of the inner
optimizer on L^S_i(φ_n) = −log p(S_i | φ_n, θ), per point or in sum.

What the members differ in is the gradient that θ gets (see their files) and what of the step is
learned. Here is what they share: the step sizes, which sites move, and the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hbmeta.densities import Delta
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference.gradient_descent import one_step
from hbmeta.inference.inner_optimizers import (
    InnerOptimizerName,
    Leaves,
    State,
    inner_optimizer,
)
from hbmeta.inference.moving import moving_sites, site_names
from hbmeta.inference.recomputed import Recomputed
from hbmeta.inference.strategy import Strategy
from hbmeta.inference.work import Work
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import MetaGradient, Options

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

LearnedStep = Literal["scalar", "site", "parameter"]

__all__ = ["GradientStrategy", "LearnedStep", "StepSizes", "step_sizes"]


class StepSizes(nn.Module):
    """Step sizes in units of `step_size`, all 1 before training, one tensor per site that moves.

    A step size may turn negative, as in Meta-SGD; no prior belongs to it then (docs/theory.md).
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], learn: LearnedStep, steps: int | None
    ) -> None:
        super().__init__()
        lead = () if steps is None else (steps,)
        self.n_sites, self.per_step = len(shapes), steps is not None
        if learn == "scalar":
            shapes = [()]
        elif learn == "site":
            shapes = [() for _ in shapes]
        self.sizes = nn.ParameterList(
            [nn.Parameter(torch.ones((*lead, *s), dtype=torch.float64)) for s in shapes]
        )

    def forward(self, number: int | Tensor) -> list[Tensor]:
        """Per site, what broadcasts over (tasks, *shape); after the last learned step, the last."""
        found = [_of_step(size, number) if self.per_step else size for size in self.sizes]
        return found * self.n_sites if len(found) < self.n_sites else found


def _of_step(size: Tensor, number: int | Tensor) -> Tensor:
    last = size.shape[0] - 1
    if isinstance(number, int):
        return size[min(number, last)]
    position = number.clamp_max(last).to(torch.int64).reshape(1)
    return size.index_select(0, position).squeeze(0)


@dataclass(frozen=True)
class GradientStrategy(Strategy):
    """q(φ | S) = δ(φ_N); see the module's docstring.

    Args:
        steps: N, inner steps.
        step_size: α, in units of φ² per unit of loss.
        reduction: "mean" (the published form: the loss of a task is the mean over its support
            points, so that α fits any number of them) or "sum" (the Bayesian one: the implied prior
            weakens as points come in).
        optimizer: of the inner steps: "descent", "momentum" or "adam". What the first two imply for
            the prior is in `theory.residual`; "adam" implies none.
        momentum: μ of "momentum".
        sites: local sites that move, by name or by a prefix of names up to a dot ("layer3"); the
            others stay at the location of their prior. None for all.
        learned_step: what has a step size of its own, learned with θ: None (α is given), "scalar",
            "site", or "parameter" (Meta-SGD).
        per_step: whether each inner step has its own.
        batches: inner step n uses every `batches`-th point of the support, from point n on, so that
            the order of the points matters; a task without such a point stands still that step
            (momentum coasts).
        recompute: keep φ_n alone and take each inner step again in the backward pass. Memory then
            grows with N by one φ per step in place of one graph, and compiling does not grow with
            N; it costs one more gradient per step, and small programs, whose steps are called one
            by one, take about twice as long. None: from 10 steps on.
    """

    steps: int = 5
    step_size: float = 0.01
    reduction: Literal["mean", "sum"] = "mean"
    optimizer: InnerOptimizerName = "descent"
    momentum: float = 0.9
    sites: tuple[str, ...] | None = None
    learned_step: LearnedStep | None = None
    per_step: bool = False
    batches: int = 1
    recompute: bool | None = None

    seeks_mode: ClassVar[bool] = True
    first_order: ClassVar[bool] = False
    """Whether the inner gradients are taken as constants."""

    def __post_init__(self) -> None:
        whole = type(self.steps) is int and self.steps >= 0
        if not whole or not _is_number(self.step_size) or not 0 <= self.step_size < math.inf:
            raise DataError(
                self.name,
                needed="whole steps of 0 or more and a finite step_size of 0 or more",
                found=f"steps={self.steps!r}, step_size={self.step_size!r}",
                do="The published values are steps=1 to 10 and step_size=0.01.",
            )
        dealt = type(self.batches) is int and self.batches >= 1
        if not dealt or not _is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise DataError(
                self.name,
                needed="0 ≤ momentum < 1 and a whole number of batches, 1 or more",
                found=f"momentum={self.momentum!r}, batches={self.batches!r}",
                do="Leave them out for 0.9 and 1.",
            )
        for setting, known in (
            ("reduction", ("mean", "sum")),
            ("optimizer", ("descent", "momentum", "adam")),
            ("learned_step", (None, "scalar", "site", "parameter")),
            ("recompute", (None, True, False)),
            ("per_step", (True, False)),
        ):
            # By repr: 1 is no True, and a tensor has no truth.
            if repr(getattr(self, setting)) not in map(repr, known):
                raise DataError(
                    self.name,
                    needed=f"{setting} among {', '.join(map(repr, known))}",
                    found=repr(getattr(self, setting)),
                    do="Choose one.",
                )
        if self.per_step and (self.learned_step is None or self.steps < 1):
            raise DataError(
                self.name,
                needed="learned_step= and steps of 1 or more, with per_step",
                found=f"per_step=True, learned_step={self.learned_step!r}, steps={self.steps}",
                do="Pass for example learned_step='scalar'.",
            )
        if self.sites is not None:
            object.__setattr__(self, "sites", site_names(self.sites, self.name))

    # -- which sites, and how far -----------------------------------------------------------------

    def moving(self, problem: Problem) -> tuple[str, ...]:
        """Names of the local sites that move."""
        return moving_sites(problem, self.sites, self.name)

    def adaptable(self) -> tuple[str, ...]:
        """All but what training alone uses, and what learned step sizes belong to."""
        names = ("steps", "step_size", "reduction", "optimizer", "momentum", "batches")
        return names if self.learned_step in ("site", "parameter") else (*names, "sites")

    def check(self, problem: Problem) -> None:
        """Refuses sites that the program does not have."""
        self.moving(problem)

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module | None:
        """The learned step sizes, if there are any."""
        if self.learned_step is None:
            return None
        names = self.moving(problem)
        shapes = [s.unconstrained_shape for s in problem.sites.locals if s.name in names]
        return StepSizes(shapes, self.learned_step, self.steps if self.per_step else None)

    def rates(self, own: Any, n_sites: int, number: int | Tensor) -> Sequence[Tensor | float]:
        """α of step `number`, per site that moves."""
        if own is None:
            return [self.step_size] * n_sites
        scales = own(number)
        if self.learned_step == "scalar":
            # Also where other sites move than in training.
            scales = scales[:1] * n_sites
        return [self.step_size * scale for scale in scales]

    # -- the loop ---------------------------------------------------------------------------------

    def inner_loss(
        self, problem: Problem, theta: Theta, phi: Phi, support: Batch, number: int | Tensor
    ) -> Tensor:
        """(tasks,) L^S at step `number`."""
        if self.batches > 1:
            support = _batch_of(support, self.batches, number)
        points = support.counts.clamp_min(1.0) if self.reduction == "mean" else 1.0
        return -problem.log_likelihood(theta, phi, support) / points

    def inner_step(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        start: Phi,
        state: State,
        number: int | Tensor,
        *,
        history: bool,
    ) -> State:
        """One step of the sites that move; the others are those of `start`."""
        names = self.moving(problem)

        def loss(values: Leaves) -> Tensor:
            phi = {**start, **dict(zip(names, values, strict=True))}
            return self.inner_loss(problem, theta, phi, support, number)

        return one_step(
            loss,
            state,
            self.rates(own, len(names), number),
            number,
            optimizer=inner_optimizer(self.optimizer, self.momentum),
            first_order=self.first_order,
            history=history,
        )

    def adapted(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Phi:
        """φ_N by site; differentiable where gradients are on."""
        start = problem.location_by_site(theta, support)
        names, history = self.moving(problem), torch.is_grad_enabled()
        state = inner_optimizer(self.optimizer, self.momentum).start([start[n] for n in names])
        for number in range(self.steps):
            state = self.inner_step(
                problem, theta, own, support, start, state, number, history=history
            )
        return {**start, **dict(zip(names, state[0], strict=True))}

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Delta:
        """δ(φ_N) per task; the location of the task prior for a task without support."""
        return Delta(problem.sites.to_vector(self.adapted(problem, theta, own, support)))

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) −log p(Q | φ_N, S, θ) per query point."""
        found = self.adapted(problem, theta, own, support)
        return self.end(problem, theta, {}, found, support, query)

    def inner_batch(self, support: Batch, query: Batch) -> Batch:
        """The rows that the inner loop sees in training."""
        return support

    def end(
        self,
        problem: Problem,
        theta: Theta,
        start: Phi,
        found: Phi,
        support: Batch,
        query: Batch,
    ) -> Tensor:
        """(tasks,) what training minimises, given φ_0 and φ_N by site; θ may enter it besides."""
        log_predictive = problem.log_predictive(theta, found, support, query)
        return -log_predictive / query.counts.clamp_min(1.0)

    def meta_gradient(
        self, problem: Problem, own: nn.Module | None, options: Options
    ) -> MetaGradient | None:
        """The chain of inner steps that keeps φ_n alone, where `recompute` asks for it."""
        return Recomputed.of(self, problem, own, options)

    def work(self) -> Work:
        """Gradients and Hessian-vector products of one meta-step.

        N + 1 gradients, and N products where they are not cut; recomputed, N gradients more
        wherever there is something to carry back.
        """
        products = 0 if self.first_order else self.steps
        carries_back = products > 0 or self.learned_step is not None
        again = self.steps if carries_back and Recomputed.wanted(self) else 0
        return Work(self.steps + 1 + again, products, graph_kept=products > 0)


def step_sizes(fitted: Fitted) -> dict[str, Tensor]:
    """The step sizes of a fit by site that moves, as given or learned; (steps, ...) if per step.

    What prior they imply for a curvature says `theory.residual`.

    Raises:
        UnsupportedModelError: the fit has no inner loop of gradient steps.
    """
    strategy, problem = fitted.strategy, fitted.problem
    if not isinstance(strategy, GradientStrategy):
        raise UnsupportedModelError(
            "step_sizes",
            needed="a fit with an inner loop of gradient steps",
            found=strategy.name,
            do="Pass a fit of MAML, FOMAML, Reptile, MetaSGD or ANIL.",
        )
    names = strategy.moving(problem)
    if fitted.own is None:
        given = torch.tensor(strategy.step_size, dtype=problem.dtype, device=problem.device)
        return dict.fromkeys(names, given)
    sizes: list[Tensor] = list(fitted.own.get_submodule("sizes").parameters())
    sizes = sizes * len(names) if len(sizes) < len(names) else sizes
    return {n: strategy.step_size * s.detach() for n, s in zip(names, sizes, strict=True)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _batch_of(support: Batch, batches: int, number: int | Tensor) -> Batch:
    """Every `batches`-th point of each task, from point `number` on."""
    if support.task is None:
        rank = torch.arange(support.weight.shape[1], device=support.x.device)
    else:
        # Rows of a task stand together: their rank is the position less that of the first.
        rows = torch.arange(support.task.shape[0], device=support.x.device)
        first = torch.full_like(rows[:1].expand(support.n_tasks), rows.shape[0])
        first = first.scatter_reduce(0, support.task, rows, "amin")
        rank = rows - first[support.task]
    chosen = rank % batches == number % batches
    weight = torch.where(chosen, support.weight, torch.zeros_like(support.weight))
    return support.where(weight > 0)
