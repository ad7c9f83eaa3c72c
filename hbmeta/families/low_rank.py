"""Gaussians whose covariance is a diagonal and a matrix of low rank, never formed.

    φ = loc + d ⊙ ε₁ + W ε₂,   Σ = diag(d²) + W Wᵀ,   W (size, rank)

With V = d⁻¹ W and the capacitance C = I + VᵀV (rank × rank), by the determinant lemma and Woodbury

    log det Σ = 2 Σ_j log d_j + log det C,   rᵀ Σ⁻¹ r = ‖u‖² − ‖chol(C)⁻¹ Vᵀu‖²,   u = r / d.

With rank size − 1 every covariance is one of these (d² its smallest eigenvalue).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbmeta.densities import Transported
from hbmeta.families.family import Family, Frame
from hbmeta.triangular import cholesky, solve_lower

# W starts at this size: W = 0 is a saddle, which no gradient leaves.
_START, _NUDGE = 0.1, 0.3

__all__ = ["LowRank", "LowRankFamily"]


@dataclass(frozen=True)
class LowRank(Transported):
    """N(loc, diag(sd²) + W Wᵀ) per task.

    Attributes:
        loc: (tasks, phi_size).
        scale: (tasks, phi_size) d.
        factor: (tasks, phi_size, rank) W.
    """

    loc: Tensor
    scale: Tensor
    factor: Tensor

    @property
    def noise_size(self) -> int:
        """One per entry of φ, and one per column of W."""
        return self.loc.shape[-1] + self.factor.shape[-1]

    @property
    def centre(self) -> Tensor:
        """loc."""
        return self.loc

    @property
    def mean(self) -> Tensor:
        """(tasks, phi_size)."""
        return self.loc

    @property
    def sd(self) -> Tensor:
        """(tasks, phi_size)."""
        return (self.scale.square() + self.factor.square().sum(-1)).sqrt()

    @property
    def covariance(self) -> Tensor:
        """(tasks, phi_size, phi_size), formed."""
        found: Tensor = torch.diag_embed(self.scale.square()) + self.factor @ self.factor.mT
        return found

    def draw(self, noise: Tensor) -> Tensor:
        """loc + d ε₁ + W ε₂ for noise (draws, tasks, phi_size + rank)."""
        own, shared = noise.split([self.loc.shape[-1], self.factor.shape[-1]], -1)
        spread: Tensor = (self.factor @ shared.unsqueeze(-1)).squeeze(-1)
        found: Tensor = self.loc + self.scale * own + spread
        return found

    def log_prob(self, phi: Tensor) -> Tensor:
        """log q (..., tasks) at φ (..., tasks, phi_size); see the module."""
        size = self.loc.shape[-1]
        whitened = (phi - self.loc) / self.scale
        spread = self.factor / self.scale.unsqueeze(-1)
        identity = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
        root = cholesky(identity + spread.mT @ spread)
        inner = (spread.mT @ whitened.unsqueeze(-1)).squeeze(-1)
        square = whitened.square().sum(-1) - solve_lower(root, inner).square().sum(-1)
        log_root = self.scale.log().sum(-1) + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * square - log_root - 0.5 * size * math.log(2 * math.pi)

    def detach(self) -> LowRank:
        """The same numbers without their history."""
        return LowRank(self.loc.detach(), self.scale.detach(), self.factor.detach())

    def select(self, positions: Tensor) -> LowRank:
        """The density of some of the tasks."""
        return LowRank(self.loc[positions], self.scale[positions], self.factor[positions])


@dataclass(frozen=True)
class LowRankFamily(Family):
    """λ = (m, s, V): loc = c + A m, d = A exp(s), W = A V, with A the frame's sds.

    Attributes:
        rank: columns of W, at most size − 1 (with which every covariance is reached).
    """

    rank: int

    @property
    def parameters(self) -> int:
        """size (2 + rank)."""
        return self.size * (2 + self.rank)

    @property
    def noise_size(self) -> int:
        """size + rank."""
        return self.size + self.rank

    def start(self, frame: Frame, seed: int) -> Tensor:
        """The frame but for V, drawn small with `seed`, alike for all tasks; d makes up for it."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.size, self.rank)
        spread = _START * torch.randn(shape, generator=generator, dtype=torch.float64)
        # Variances stay those of the frame: exp(2s) + Σ_k V_jk² = 1.
        log_scale = 0.5 * (1 - spread.square().sum(-1)).clamp_min(0.5).log()
        row = torch.cat([torch.zeros(self.size).double(), log_scale, spread.flatten()])
        return row.to(frame.loc).repeat(frame.loc.shape[0], 1)

    def density(self, values: Tensor, frame: Frame) -> LowRank:
        """q at λ."""
        sizes: list[Any] = [self.size, self.size, self.size * self.rank]
        shift, log_scale, spread = values.split(sizes, -1)
        factor = frame.scale.unsqueeze(-1) * spread.unflatten(-1, (self.size, self.rank))
        return LowRank(frame.loc + frame.scale * shift, frame.scale * log_scale.exp(), factor)

    def nudged(self, values: Tensor, seed: int) -> Tensor:
        """V moved at random: where V = 0 is a saddle, which signs it must leave with is unknown."""
        generator = torch.Generator().manual_seed(seed)
        spread = self.size * self.rank
        step = torch.randn(spread, generator=generator, dtype=torch.float64).to(values)
        return torch.cat([values[:, :-spread], values[:, -spread:] + _NUDGE * step], -1)

    def reframed(self, values: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        """m = 0, and variances of 1 in the frame of q's own location and sds."""
        density = self.density(values, frame)
        sd = density.sd
        log_scale = (density.scale / sd).log()
        spread = density.factor / sd.unsqueeze(-1)
        return (
            torch.cat([torch.zeros_like(log_scale), log_scale, spread.flatten(-2)], -1),
            Frame(density.loc, sd),
        )
