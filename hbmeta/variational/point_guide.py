"""q(φ_i) of every task with numbers of its own, θ held at a point.

    Σ_i L(λ_i, θ) + log p(θ),   L a bound of log p(S_i | θ)

is maximised over θ and all λ_i; the tasks of a minibatch are an unbiased T/|B| of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hbmeta.families import Family, Frame
from hbmeta.movement import Moving
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.variational.noise import matched_noise
from hbmeta.variational.objectives import Bound

__all__ = ["PointGuide"]


class PointGuide:
    """The bound of every task as a function of θ and of the task's λ.

    Args:
        problem: the program.
        family: of q.
        bound: L.
        moving: turns what moves into θ; None where θ itself is handed in and held.
    """

    def __init__(
        self, problem: Problem, family: Family, bound: Bound, moving: Moving | None = None
    ) -> None:
        self.problem, self.family, self.bound, self.moving = problem, family, bound, moving

    @property
    def row_size(self) -> int:
        """Numbers per task."""
        return self.family.parameters

    def theta(self, shared: Mapping[str, Tensor]) -> Theta:
        """θ from what tasks share."""
        return dict(shared) if self.moving is None else self.moving.unpack(shared)[0]

    def noise_shapes(self, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Of one estimate of the bound; pairs of opposite sign are made of them for the ELBO."""
        # A gradient of the other bounds wants draws that are independent of each other.
        draws = (self.bound.draws + 1) // 2 if self.bound.is_elbo else self.bound.draws
        return {"phi": (draws, n_tasks, self.family.noise_size)}

    def fixed_noise(self, draws: int, seed: int, like: Tensor) -> dict[str, Tensor]:
        """Noise of a bound that is searched, the same for all tasks; see `matched_noise`."""
        wanted = max(draws, 2 * self.family.noise_size if self.family.full_frame else 2)
        if not self.bound.is_elbo:
            # Whole groups of K.
            unit = self.bound.draws * (1 if self.bound.draws % 2 == 0 else 2)
            wanted = -(-wanted // unit) * unit
        found = matched_noise(wanted + wanted % 2, self.family.noise_size, seed)
        return {"phi": found.to(like).unsqueeze(1)}

    def terms(
        self,
        shared: Mapping[str, Tensor],
        rows: Tensor,
        frame: Frame,
        batch: Batch,
        noise: Mapping[str, Tensor],
        *,
        fixed: bool,
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) −L and () −log p(θ).

        Args:
            shared: what moves besides the tasks' own numbers.
            rows: (tasks, row_size) λ.
            frame: of each task.
            batch: the rows of the tasks.
            noise: standard normal.
            fixed: the noise is fixed, so that the gradient must be that of the value, score
                included; otherwise gradients are those of `Bound.estimate`.
        """
        theta, problem = self.theta(shared), self.problem
        prior: list[Tensor] = []

        def log_joint(phi: Tensor) -> Tensor:
            def one(point: Tensor) -> tuple[Tensor, Tensor]:
                likelihood, local, global_ = problem.terms(theta, point, batch)
                return likelihood + local, global_

            values, globals_ = torch.vmap(one)(phi)
            prior.append(globals_.mean())
            return values

        eps = noise["phi"]
        if fixed:
            eps = eps.expand(-1, batch.n_tasks, -1)
        elif self.bound.is_elbo:
            # ε and −ε: what is odd in ε, most of the noise of a gradient, cancels.
            eps = torch.cat([eps, -eps])
        if fixed or not self.family.sticks:
            phi, log_q = self.family.draw(rows, frame, eps, stick=False)
            value = self.bound.average(log_joint(phi) - log_q)
        else:
            density = self.family.density(rows, frame)
            held = density.detach()
            value = self.bound.estimate(density.draw(eps), log_joint, held.log_prob)
        return -value, -prior[-1]
