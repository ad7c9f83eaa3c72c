"""Gaussian families: independent entries, and any covariance.

    diagonal:   φ = c + A (m + exp(s) ε),   A the frame's sds
    full:       φ = c + A (m + R ε),        R lower triangular with diagonal exp(s)

where A is lower triangular in the second, so that A R is the Cholesky factor of q. The best
diagonal q of a Gaussian with precision Λ has its mean, and the variances 1/Λ_jj, which are those of
φ_j given all others: too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hbmeta.densities import Gaussian
from hbmeta.families.family import Family, Frame

__all__ = ["Diagonal", "FullRank", "lower_triangular"]


def lower_triangular(log_diagonal: Tensor, below: Tensor) -> Tensor:
    """(..., n, n) with diagonal exp(log_diagonal) (..., n) and entries below it by rows."""
    size = log_diagonal.shape[-1]
    if size == 1:
        return log_diagonal.exp().unsqueeze(-1)
    # Gathered, not written into: one kernel, forwards and backwards.
    entries = torch.cat([below, log_diagonal.exp(), torch.zeros_like(below[..., :1])], -1)
    count = below.shape[-1]
    index = torch.full((size, size), count + size, dtype=torch.int64)
    rows, columns = torch.tril_indices(size, size, -1)
    index[rows, columns] = torch.arange(count)
    index.diagonal().copy_(torch.arange(size) + count)
    picked = entries[..., index.flatten().to(entries.device)]
    square: Tensor = picked.unflatten(-1, (size, size))
    return square


@dataclass(frozen=True)
class Diagonal(Family):
    """Independent entries of φ (mean field): λ = (m, s), 2 · size numbers."""

    @property
    def parameters(self) -> int:
        """2 · size."""
        return 2 * self.size

    def start(self, frame: Frame, seed: int) -> Tensor:
        """Zeros: the frame."""
        return frame.loc.new_zeros(frame.loc.shape[0], self.parameters)

    def density(self, values: Tensor, frame: Frame) -> Gaussian:
        """N(c + A m, (A exp s)²)."""
        shift, log_scale = values.split(self.size, -1)
        return Gaussian(frame.loc + frame.scale * shift, frame.scale * log_scale.exp())

    def reframed(self, values: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        """λ = 0 in the frame that is q."""
        density = self.density(values, frame)
        return torch.zeros_like(values), density


@dataclass(frozen=True)
class FullRank(Family):
    """Any Gaussian: λ = (m, s, entries of R below its diagonal by rows)."""

    full_frame: ClassVar[bool] = True

    @property
    def parameters(self) -> int:
        """size + size (size + 1) / 2."""
        return self.size + self.size * (self.size + 1) // 2

    def start(self, frame: Frame, seed: int) -> Tensor:
        """Zeros: the frame."""
        return frame.loc.new_zeros(frame.loc.shape[0], self.parameters)

    def density(self, values: Tensor, frame: Frame) -> Gaussian:
        """N(c + A m, A R Rᵀ Aᵀ)."""
        below = self.parameters - 2 * self.size
        shift, log_scale, entries = values.split([self.size, self.size, below], -1)
        loc = frame.loc + (frame.scale @ shift.unsqueeze(-1)).squeeze(-1)
        return Gaussian(loc, frame.scale @ lower_triangular(log_scale, entries))

    def reframed(self, values: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        """λ = 0 in the frame that is q."""
        density = self.density(values, frame)
        return torch.zeros_like(values), density
