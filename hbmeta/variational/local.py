"""q of every task at a θ that is held: Newton for the ELBO of a Gaussian, from there on Adam.

Newton needs fixed noise, and fixed noise needs a bound that a finite sample cannot fool. The ELBO
of a Gaussian is one: its entropy is exact, and −E log p is an average over points that spread as q
does. Of a flow it is not, which can put each of M draws where it likes. Nor is any bound with
α < 1: with q = N(m, s²) and m = −s ε_k, draw k stays at 0 for every s, and its weight
w_k = p(0) s √(2π) exp(ε_k²/2) grows with s without bound. These are maximised by Adam with fresh
noise, from the best Gaussian on; a task for which that did not pay keeps the Gaussian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hbmeta.densities import Transported
from hbmeta.families import Family, FlowFamily, Frame
from hbmeta.newton import Minima
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Tier
from hbmeta.training import Options
from hbmeta.variational.objectives import Bound
from hbmeta.variational.point_guide import PointGuide
from hbmeta.variational.search import search_tasks, starting_frame
from hbmeta.variational.training import TINY, train_guide

# Newton steps for λ where the caller does not say how many, and Adam's for a flow.
_NEWTON, _ADAM = 60, 600
# Searches from beside a saddle, for a family that has one.
_ATTEMPTS = 4

__all__ = ["LocalSearch"]


@dataclass(frozen=True)
class LocalSearch:
    """How q of a task is found.

    Attributes:
        name: of the strategy, for messages.
        problem: the program.
        family: of q.
        gaussian: the family itself, or the one that a flow starts from.
        bound: what is maximised.
        draws: of the fixed noise.
        tolerance: on the gradient's norm.
        steps: at most so many; None for 60 of Newton, 600 of Adam.
        step_size: Adam's.
    """

    name: str
    problem: Problem
    family: Family
    gaussian: Family
    bound: Bound
    draws: int
    tolerance: float
    steps: int | None
    step_size: float

    @property
    def ends_with_adam(self) -> bool:
        """Whether Newton's answer is only where the search starts."""
        return isinstance(self.family, FlowFamily) or not self.bound.is_elbo

    @property
    def floor(self) -> float:
        """`row_floor` of training: a flow's weights have no units that q gives them."""
        return TINY if isinstance(self.family, FlowFamily) else self.step_size

    def find(
        self, theta: Theta, frame: Frame, batch: Batch, seed: int
    ) -> tuple[Transported, dict[str, Tensor]]:
        """q of every task from its frame on, and info: bound, residual and met, each (tasks,)."""
        theta = {name: value.detach() for name, value in theta.items()}
        steps = None if self.ends_with_adam else self.steps
        rows, frame, info = self.newton(theta, None, frame, batch, seed, steps)
        if steps is None:
            # Once more in units of q itself: the tolerance is relative to a first gradient.
            rows, frame = self.gaussian.reframed(rows, frame)
            rows, frame, info = self.newton(theta, rows, frame, batch, seed)
        if not self.ends_with_adam:
            return self.gaussian.density(rows, frame).detach(), info
        rows, frame = self.gaussian.reframed(rows, frame)
        return self._by_adam(theta, self.start(rows, frame, seed), frame, batch, seed, info)

    def start(self, rows: Tensor, frame: Frame, seed: int) -> Tensor:
        """λ of the family at the Gaussian that Newton found."""
        return self.family.start(frame, seed) if self.family is not self.gaussian else rows

    def newton(
        self,
        theta: Theta,
        rows: Tensor | None,
        frame: Frame,
        batch: Batch,
        seed: int,
        steps: int | None = None,
        tier: Tier | Literal["auto"] | None = None,
    ) -> tuple[Tensor, Frame, dict[str, Tensor]]:
        """λ of the Gaussian family, the frame in use, and info.

        Args:
            theta: θ.
            rows: λ to start from; None for the frame, drawn closer where the bound overflows.
            frame: of each task.
            batch: rows of the tasks.
            seed: of the fixed noise.
            steps: at most so many.
            tier: how to run; None for that of the problem.
        """
        tier = tier or self.problem.tier
        guide = PointGuide(self.problem, self.gaussian, Bound(1.0, 1))
        noise = guide.fixed_noise(self.draws, seed, frame.loc)
        if rows is None:

            def start(found: Frame) -> Tensor:
                return self.gaussian.start(found, seed)

            frame = starting_frame(guide, theta, frame, start, batch, noise)
            rows = start(frame)
        found = self._newton(guide, theta, rows, frame, batch, noise, steps, tier)
        best = found
        for attempt in range(_ATTEMPTS if steps is None else 0):
            beside = self.gaussian.nudged(best.point, seed + attempt)
            if beside is None:
                break
            found = self._newton(guide, theta, beside, frame, batch, noise, steps, tier)
            best = _better(best, found)
        info = {"bound": -best.value, "residual": best.residual, "met": best.met}
        return best.point, frame, info

    def _newton(
        self,
        guide: PointGuide,
        theta: Theta,
        rows: Tensor,
        frame: Frame,
        batch: Batch,
        noise: Mapping[str, Tensor],
        steps: int | None,
        tier: Tier | Literal["auto"],
    ) -> Minima:
        most = _NEWTON if steps is None else steps
        return search_tasks(
            guide, theta, rows, frame, batch, noise,
            steps=most, tolerance=self.tolerance, tier=tier,
        )  # fmt: skip

    def _by_adam(
        self,
        theta: Theta,
        rows: Tensor,
        frame: Frame,
        batch: Batch,
        seed: int,
        info: dict[str, Tensor],
    ) -> tuple[Transported, dict[str, Tensor]]:
        """The rest of the search, judged by draws that it did not see."""
        before = self.value(theta, rows, frame, batch, seed)
        steps = _ADAM if self.steps is None else self.steps
        found = rows
        if steps:
            found = train_guide(
                self.name,
                PointGuide(self.problem, self.family, self.bound),
                theta,
                rows,
                frame,
                batch,
                Options(steps=steps, seed=seed, progress=False, tier=self.problem.tier),
                rates={},
                row_rate=self.step_size,
                row_floor=self.floor,
                watched={},
            ).rows
        after = self.value(theta, found, frame, batch, seed)
        paid = after > before
        rows = torch.where(paid.unsqueeze(-1), found, rows)
        info = {**info, "bound": torch.where(paid, after, before)}
        return self.family.density(rows, frame).detach(), info

    def value(self, theta: Theta, rows: Tensor, frame: Frame, batch: Batch, seed: int) -> Tensor:
        """(tasks,) the bound at draws that no search saw."""
        guide = PointGuide(self.problem, self.family, self.bound)
        noise = guide.fixed_noise(self.draws, seed + 1, frame.loc)
        with torch.no_grad():
            return -guide.terms(theta, rows, frame, batch, noise, fixed=True)[0]


def _better(first: Minima, second: Minima) -> Minima:
    """For each task the lower of two minima that were both met, or the one that was."""
    gain = first.value - second.value > 1e-9 * first.value.abs().clamp_min(1.0)
    take = second.met & (gain | ~first.met)
    return first._replace(
        point=torch.where(take.unsqueeze(-1), second.point, first.point),
        value=torch.where(take, second.value, first.value),
        residual=torch.where(take, second.residual, first.residual),
        met=first.met | take,
    )
