"""Modes of all tasks at one θ after another, as a search for θ asks for them.

Newton's method starts at the modes of the θ before, or at the location of the task prior where the
log joint is higher there. δ, where a curvature needs damping, is chosen at the first θ and held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian, log_joint
from hbmeta.curvatures import precision_of
from hbmeta.damping import choose_damping, warn_of_damping
from hbmeta.laplace_evidence import kind_for_evidence
from hbmeta.modes import Modes, find_modes
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Staged
from hbmeta.training import Options

__all__ = ["ModeSearch"]


class ModeSearch:
    """θ to the modes of all tasks and their damping, from the modes of the call before; staged.

    Args:
        strategy: with the settings `curvature`, `damping`, `tolerance` and `iterations`.
        problem: the program.
        batch: the rows of the tasks.
        ids: of the tasks, for messages.
        options: of the fit.
    """

    def __init__(
        self,
        strategy: Any,
        problem: Problem,
        batch: Batch,
        ids: tuple[Any, ...],
        options: Options,
    ) -> None:
        self.strategy, self.problem, self.batch, self.ids = strategy, problem, batch, ids
        self.seed = options.seed
        self.latest: Modes | None = None
        self.damping: Tensor | None = None

        def derivatives(theta: Theta, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return gradient_and_hessian(lambda p: log_joint(problem, theta, p, batch), phi)

        self.staged = Staged(derivatives, tier=options.tier, expected_calls=800)

    @property
    def seconds_staging(self) -> float:
        """Of the Hessians."""
        return self.staged.seconds_staging

    def __call__(self, theta: Theta) -> tuple[Tensor, Tensor]:
        """φ̂ (tasks, phi_size) and δ (tasks,) at θ, constants."""
        theta = {name: value.detach() for name, value in theta.items()}
        with torch.no_grad():
            start = self.problem.location(theta, self.batch)
            if self.latest is not None:
                before = self.latest.point
                there, here = (
                    log_joint(self.problem, theta, p, self.batch) for p in (before, start)
                )
                start = torch.where((there > here).unsqueeze(-1), before, start)
        strategy = self.strategy
        found = find_modes(
            self.problem,
            theta,
            self.batch,
            start,
            tolerance=strategy.tolerance,
            iterations=strategy.iterations,
            seed=self.seed,
            derivatives=lambda phi: self.staged(theta, phi),
        )
        if bool(torch.isfinite(found.point).all()):
            self.latest = found
        if self.damping is None:
            self.damping = self._first_damping(theta, found.point)
        return found.point, self.damping

    def _first_damping(self, theta: Theta, phi: Tensor) -> Tensor:
        """δ where the search for θ starts: held throughout, so that the evidence is smooth."""
        strategy = self.strategy
        kind = kind_for_evidence(strategy.curvature)
        precision = precision_of(kind, self.problem, theta, phi, self.batch)
        where = f"{strategy.name}.fit"
        chosen = choose_damping(
            precision, strategy.damping, self.problem, theta, phi, self.batch, ids=self.ids,
            where=where,
        )  # fmt: skip
        warn_of_damping(chosen, strategy.damping, self.ids, where, stacklevel=10)
        return chosen.value

    def missed(self) -> list[str]:
        """Tasks whose mode was not found at the last θ."""
        if self.latest is None:
            return []
        return [str(self.ids[i]) for i in (~self.latest.met).nonzero().flatten().tolist()]
