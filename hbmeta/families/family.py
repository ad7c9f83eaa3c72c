"""What a family of variational densities must say of itself; see `hbmeta.families`."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hbmeta.densities import Gaussian, Transported

Frame = Gaussian
"""c (tasks, phi_size) and A: sds (tasks, phi_size) or lower-triangular (tasks, phi_size, ·)."""

__all__ = ["Family", "Frame"]


@dataclass(frozen=True)
class Family(abc.ABC):
    """Densities over φ of one task, by a vector λ of numbers without units.

    Attributes:
        size: entries of φ.
    """

    full_frame: ClassVar[bool] = False
    """Whether the frame's A is a triangular matrix, or the family stays diagonal with sds."""
    sticks: ClassVar[bool] = True
    """Whether log q at a given φ is cheap, so that gradients can leave out the score of q."""

    size: int

    @property
    @abc.abstractmethod
    def parameters(self) -> int:
        """Numbers in λ."""

    @property
    def noise_size(self) -> int:
        """Standard normal numbers per draw."""
        return self.size

    @abc.abstractmethod
    def start(self, frame: Frame, seed: int) -> Tensor:
        """λ (tasks, parameters) at which q is the frame, or as near as the family can start."""

    @abc.abstractmethod
    def density(self, values: Tensor, frame: Frame) -> Transported:
        """q at λ (tasks, parameters); differentiable in λ."""

    def draw(
        self, values: Tensor, frame: Frame, noise: Tensor, *, stick: bool
    ) -> tuple[Tensor, Tensor]:
        """φ (draws, tasks, size) and log q(φ) (draws, tasks).

        Args:
            values: λ.
            frame: of each task.
            noise: (draws, tasks, noise_size) standard normal.
            stick: take λ in log q as a constant, so that a gradient reaches it through φ alone
                (Roeder et al. 2017: what is left out is a score, whose mean is zero).
        """
        density = self.density(values, frame)
        phi = density.draw(noise)
        held = density.detach() if stick else density
        return phi, held.log_prob(phi)

    def nudged(self, values: Tensor, seed: int) -> Tensor | None:
        """λ beside a saddle that a search may have ended at; None for a family without saddles."""
        return None

    def reframed(self, values: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        """The same densities in a frame near to them: λ in their own units from here on."""
        return values, frame
