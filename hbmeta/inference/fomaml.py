"""FOMAML: MAML with the trajectory detached, and how far its gradient is from MAML's.

Model and estimator: those of MAML. The gradient of φ_0 is ∇L^Q(φ_N), where MAML's is
A_0 ⋯ A_{N−1} ∇L^Q(φ_N) with A_n = I − α∇²L^S(φ_n). The bias, exact for any N, is

    (A_0 ⋯ A_{N−1} − I) ∇L^Q(φ_N)   =   −α Σ_n ∇²L^S(φ_n) ∇L^Q(φ_N) + O(α²)

(the form −α∇²L^S(φ_0)∇L^Q(φ_1) that is often given is that of N = 1). Its norm is at most
((1 + αL)^N − 1) ‖∇L^Q(φ_N)‖, L the largest |curvature| on the path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference.gradient_strategy import GradientStrategy, step_sizes
from hbmeta.inference.inner_optimizers import inner_optimizer
from hbmeta.inference.maml import MAML
from hbmeta.tasks import Episode, TaskSet

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

_DENSE_LIMIT = 64

__all__ = ["FOMAML", "FirstOrderBias"]


@dataclass(frozen=True)
class FirstOrderBias:
    """What the first-order gradient leaves out, per task, in the coordinates of φ.

    Attributes:
        ids: of the tasks.
        gradient: (tasks, phi_size) of L^Q(φ_N) in φ_0, through the steps.
        first_order: (tasks, phi_size) the same with the trajectory detached.
        curvature: (tasks,) L, the largest ‖∇²L^S‖ on the path, of the rows of sites that move.
        bound: (tasks,) ((1 + αL)^N − 1) ‖first_order‖, which no bias exceeds; NaN where L is.
    """

    ids: tuple[Any, ...]
    gradient: Tensor
    first_order: Tensor
    curvature: Tensor
    bound: Tensor

    @property
    def bias(self) -> Tensor:
        """(tasks, phi_size) MAML's gradient less FOMAML's."""
        return self.gradient - self.first_order

    @property
    def relative(self) -> Tensor:
        """(tasks,) ‖bias‖ / ‖gradient‖."""
        found: Tensor = self.bias.norm(dim=-1) / self.gradient.norm(dim=-1)
        return found

    @property
    def cosine(self) -> Tensor:
        """(tasks,) of the angle between the two gradients."""
        found: Tensor = torch.nn.functional.cosine_similarity(
            self.gradient, self.first_order, dim=-1
        )
        return found


@dataclass(frozen=True)
class FOMAML(GradientStrategy):
    """First-order MAML: q(φ | S) = δ(φ_N), θ trained as if φ_N − φ_0 were a constant.

    Keeps and replaces what MAML does, at N + 1 gradients per step and no Hessian-vector product.
    Its fixed points are not those of MAML where curvatures differ between tasks: two tasks of
    curvature 1 and 4 with minima 0 and 1 at α = 0.1 give 0.727 in place of 0.64. Learned step sizes
    get their first-order gradient. `FOMAML.bias` says what is left out.

    Args: those of `GradientStrategy`.

    References:
        Finn, Abbeel, Levine (2017), ICML, §5.2. Nichol, Achiam, Schulman (2018), arXiv:1803.02999.
    """

    first_order: ClassVar[bool] = True

    @staticmethod
    def bias(fitted: Fitted, episode: Episode | TaskSet) -> FirstOrderBias:
        """How far the first-order gradient of each task is from the full one, at a fit's θ.

        Args:
            fitted: a fit of any gradient strategy, whose inner loop is taken.
            episode: support and query of the tasks; a split TaskSet is its groups with a query.
        Raises:
            DataError: the data are none, or have other features than those of the fit.
            UnsupportedModelError: the fit has no inner loop.
        """
        strategy = getattr(fitted, "strategy", None)
        if not isinstance(strategy, GradientStrategy):
            raise UnsupportedModelError(
                "FOMAML.bias",
                needed="a fit with an inner loop of gradient steps",
                found=f"{type(fitted).__name__}, no fit" if strategy is None else strategy.name,
                do="Pass a fit of MAML, FOMAML, Reptile, MetaSGD or ANIL.",
            )
        problem, episode = fitted.problem, _episode_for(fitted, episode)
        support, query = (
            problem.batch(part.to(device=problem.device, dtype=problem.dtype))
            for part in (episode.support, episode.query)
        )
        theta = {name: value.detach() for name, value in fitted.theta.items()}
        with torch.no_grad():
            start = problem.location(theta, support)
        start = start.requires_grad_()
        names = strategy.moving(problem)
        # The loop of MAML, whatever the strategy's own gradient.
        whole = MAML(**{**strategy.settings(), "sites": names})
        rule = inner_optimizer(strategy.optimizer, strategy.momentum)
        path = []
        with torch.enable_grad():
            by_site = problem.sites.from_vector(start)
            state = rule.start([by_site[n] for n in names])
            for number in range(strategy.steps):
                phi = {**by_site, **dict(zip(names, state[0], strict=True))}
                path.append(problem.sites.to_vector(phi).detach())
                state = whole.inner_step(
                    problem, theta, fitted.own, support, by_site, state, number, history=True
                )
            phi = {**by_site, **dict(zip(names, state[0], strict=True))}
            end = problem.sites.to_vector(phi)
            last = problem.sites.from_vector(end)
            loss = whole.end(problem, theta, {}, last, support, query).sum()
            gradient, first = torch.autograd.grad(loss, [start, end])
        curvature = _largest_curvature(strategy, problem, theta, support, path)
        grown = (1 + _largest_rate(fitted) * curvature) ** strategy.steps - 1
        return FirstOrderBias(
            episode.support.ids, gradient, first, curvature, grown * first.norm(dim=-1)
        )


def _episode_for(fitted: Fitted, data: Episode | TaskSet) -> Episode:
    if not isinstance(data, Episode | TaskSet):
        raise DataError(
            "FOMAML.bias",
            needed="tasks with support and query (a split TaskSet, an Episode)",
            found=type(data).__name__,
            do="Call tasks.split(seed=...), or pass an Episode.",
        )
    episode = data.episode if isinstance(data, TaskSet) else data
    if episode.support.features != fitted.tasks.features:
        raise DataError(
            "FOMAML.bias",
            needed=f"the features of the fit, {list(fitted.tasks.features)}",
            found=str(list(episode.support.features)),
            do="Build the tasks from the same columns in the same order.",
        )
    return episode


def _largest_rate(fitted: Fitted) -> float:
    return max(float(size.abs().max()) for size in step_sizes(fitted).values())


def _largest_curvature(
    strategy: GradientStrategy, problem: Any, theta: Any, support: Any, path: list[Tensor]
) -> Tensor:
    """(tasks,) the largest ‖P ∇²L^S‖ on the path; NaN where it is too large to be had.

    P keeps the rows of the sites that move: φ_{n+1} = φ_n − α P ∇L^S.
    """
    counts = support.counts
    if problem.sites.phi_size > _DENSE_LIMIT or strategy.optimizer != "descent":
        return torch.full_like(counts, torch.nan)
    found = torch.zeros_like(counts)
    names = strategy.moving(problem)
    moves = torch.cat(
        [torch.full((s.size,), s.name in names, device=counts.device) for s in problem.sites.locals]
    )
    for number, point in enumerate(path):

        def loss(phi: Tensor, number: int = number) -> Tensor:
            sites = problem.sites.from_vector(phi)
            return strategy.inner_loss(problem, theta, sites, support, number)

        hessian = gradient_and_hessian(loss, point)[2]
        found = torch.maximum(found, torch.linalg.matrix_norm(hessian[:, moves], 2))
    return found
