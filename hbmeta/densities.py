"""The shapes that an approximation q(φ_i | S_i) can take, over tasks side by side.

φ_i stands as one unconstrained vector; a density holds one per task, (tasks, phi_size). Random
numbers come in as arguments, so that a density can be drawn from inside a traced graph.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.errors import UnsupportedModelError
from hbmeta.triangular import solve_lower

__all__ = ["Delta", "Density", "Empirical", "Gaussian", "Transported", "equal_draws"]


class Transported(abc.ABC):
    """A density that is a smooth map of standard normal noise, one per task.

    What a strategy brings beyond the shapes below (a flow, a structured covariance) is a frozen
    dataclass of tensors with this base.
    """

    @property
    @abc.abstractmethod
    def noise_size(self) -> int:
        """Standard normal numbers per draw and task."""

    @abc.abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """φ (draws, tasks, phi_size) for standard normal noise (draws, tasks, noise_size)."""

    @abc.abstractmethod
    def log_prob(self, phi: Tensor) -> Tensor:
        """log q(φ) (..., tasks) for φ (..., tasks, phi_size)."""

    @property
    @abc.abstractmethod
    def centre(self) -> Tensor:
        """(tasks, phi_size) where the noise is zero."""

    @abc.abstractmethod
    def detach(self) -> Transported:
        """The same numbers without their history."""

    @abc.abstractmethod
    def select(self, positions: Tensor) -> Transported:
        """The density of some of the tasks."""


@dataclass(frozen=True)
class Delta:
    """All mass at one point per task: loc (tasks, phi_size)."""

    loc: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """The point, repeated for noise (draws, tasks, phi_size)."""
        return self.loc.expand(noise.shape)

    @property
    def mean(self) -> Tensor:
        """(tasks, phi_size)."""
        return self.loc

    @property
    def sd(self) -> Tensor:
        """(tasks, phi_size) of zeros."""
        return torch.zeros_like(self.loc)

    def log_prob(self, phi: Tensor) -> Tensor:
        """Refuses: a point mass has no density."""
        raise UnsupportedModelError(
            "log_prob of a point mass",
            needed="a posterior with a density",
            found="a point estimate (Delta)",
            do="Use a Gaussian strategy such as AmortizedGuide, or draws.",
        )

    def select(self, positions: Tensor) -> Delta:
        """The density of some of the tasks."""
        return Delta(self.loc[positions])


@dataclass(frozen=True)
class Gaussian(Transported):
    """N(loc, L Lᵀ) per task.

    Attributes:
        loc: (tasks, phi_size).
        scale: (tasks, phi_size) standard deviations, or lower-triangular L (tasks, phi_size,
            phi_size).
    """

    loc: Tensor
    scale: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether `scale` holds standard deviations."""
        return self.scale.ndim == self.loc.ndim

    @property
    def noise_size(self) -> int:
        """One per entry of φ."""
        return self.loc.shape[-1]

    @property
    def centre(self) -> Tensor:
        """loc (tasks, phi_size)."""
        return self.loc

    def draw(self, noise: Tensor) -> Tensor:
        """loc + L ε for standard normal noise (draws, tasks, phi_size)."""
        if self.diagonal:
            return self.loc + self.scale * noise
        return self.loc + (self.scale @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, phi: Tensor) -> Tensor:
        """log N(φ; loc, L Lᵀ), (..., tasks) for φ (..., tasks, phi_size)."""
        difference = phi - self.loc
        if self.diagonal:
            whitened = difference / self.scale
            log_det = self.scale.log().sum(-1)
        else:
            whitened = solve_lower(self.scale, difference)
            log_det = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        size = self.loc.shape[-1]
        return -0.5 * whitened.square().sum(-1) - log_det - 0.5 * size * math.log(2 * math.pi)

    def kl(self, other: Gaussian) -> Tensor:
        """(tasks,) KL(self ‖ other) in nats.

        With L₁, L₂ the factors and d the size of φ:
        ½ (‖L₂⁻¹ L₁‖² + ‖L₂⁻¹ (m₂ − m₁)‖² − d) + log |L₂| − log |L₁|.
        """
        shift = other.loc - self.loc
        size = shift.shape[-1]
        if self.diagonal and other.diagonal:
            ratio = self.scale / other.scale
            parts = ratio.square() + (shift / other.scale).square() - 1.0 - 2.0 * ratio.log()
            return 0.5 * parts.sum(-1)
        left, right = (torch.diag_embed(g.scale) if g.diagonal else g.scale for g in (self, other))
        ratios: Tensor = torch.linalg.solve_triangular(right, left, upper=False)
        spread = ratios.square().sum((-2, -1))
        logs = (g.diagonal(dim1=-2, dim2=-1).log().sum(-1) for g in (right, left))
        log_ratio = next(logs) - next(logs)
        return 0.5 * (spread + solve_lower(right, shift).square().sum(-1) - size) + log_ratio

    @property
    def mean(self) -> Tensor:
        """(tasks, phi_size)."""
        return self.loc

    @property
    def sd(self) -> Tensor:
        """(tasks, phi_size)."""
        return self.scale if self.diagonal else self.scale.square().sum(-1).sqrt()

    @property
    def covariance(self) -> Tensor:
        """(tasks, phi_size, phi_size)."""
        return (
            torch.diag_embed(self.scale.square()) if self.diagonal else self.scale @ self.scale.mT
        )

    def detach(self) -> Gaussian:
        """The same numbers without their history."""
        return Gaussian(self.loc.detach(), self.scale.detach())

    def select(self, positions: Tensor) -> Gaussian:
        """The density of some of the tasks."""
        return Gaussian(self.loc[positions], self.scale[positions])


@dataclass(frozen=True)
class Empirical:
    """Draws, equal or weighted per task.

    Attributes:
        phi: (draws, tasks, phi_size).
        log_weights: (draws, tasks), normalised or not; None for equal weights.
        nodes: whether they are nodes of a grid, of which none may be left out.
    """

    phi: Tensor
    log_weights: Tensor | None = None
    nodes: bool = False

    @property
    def weights(self) -> Tensor:
        """(draws, tasks), each task's summing to one."""
        if self.log_weights is None:
            return self.phi.new_full(self.phi.shape[:2], 1.0 / self.phi.shape[0])
        return torch.softmax(self.log_weights, 0)

    @property
    def mean(self) -> Tensor:
        """(tasks, phi_size), weighted."""
        return (self.weights.unsqueeze(-1) * self.phi).sum(0)

    @property
    def sd(self) -> Tensor:
        """(tasks, phi_size), weighted."""
        spread = self.weights.unsqueeze(-1) * (self.phi - self.mean).square()
        return spread.sum(0).sqrt()

    @property
    def effective_draws(self) -> Tensor:
        """(tasks,) Kish's effective number of draws, 1 / Σ w²."""
        return 1.0 / self.weights.square().sum(0)

    def log_prob(self, phi: Tensor) -> Tensor:
        """Refuses: draws have no density."""
        raise UnsupportedModelError(
            "log_prob of draws",
            needed="a posterior with a density",
            found="draws",
            do="Use the program's own log density (Problem.terms), or a Gaussian strategy.",
        )

    def select(self, positions: Tensor) -> Empirical:
        """The draws of some of the tasks."""
        weights = None if self.log_weights is None else self.log_weights[:, positions]
        return Empirical(self.phi[:, positions], weights, self.nodes)


Density = Delta | Transported | Empirical


def equal_draws(log_weights: Tensor, n: int, seed: int) -> Tensor:
    """(n, tasks) positions of n draws with equal weights, taken with replacement by their weights.

    Args:
        log_weights: (draws, tasks), normalised or not.
        n: how many to take for each task; tasks are independent of each other.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(log_weights.detach().double().cpu(), 0).T
    return torch.multinomial(probabilities, n, True, generator=generator).T.to(log_weights.device)
