"""Precision matrices of tasks, in the form in which they can be had.

A curvature gives Λ = −∇²f (or an approximation) for every task. With damping δ ≥ 0 it stands for
Λ + δI. `smallest` is the smallest eigenvalue of Λ, or a lower bound of it.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.densities import Gaussian, Transported
from hbmeta.structured import (
    Kronecker,
    Layer,
    LowRankPrecision,
    Partial,
    directions_of,
    signed,
)
from hbmeta.triangular import covariance_factor

# An eigenvalue below so many roundings, for each row of a matrix, is none.
_ROUNDINGS = 8

__all__ = ["Block", "Dense", "Diagonal", "KroneckerFactored", "LayerFactors", "Precision", "Rows"]


class Precision(abc.ABC):
    """Λ of every task."""

    @property
    @abc.abstractmethod
    def smallest(self) -> Tensor:
        """(tasks,) the smallest eigenvalue of Λ, or a bound below it; without history."""

    @property
    @abc.abstractmethod
    def finite(self) -> Tensor:
        """(tasks,) whether Λ holds no NaN and no infinity."""

    @property
    @abc.abstractmethod
    def magnitude(self) -> Tensor:
        """(tasks,) the size of Λ; without history."""

    @abc.abstractmethod
    def positive(self, damping: Tensor) -> Tensor:
        """(tasks,) whether Λ + δI is positive definite to rounding, whatever φ's units are."""

    @abc.abstractmethod
    def log_det(self, damping: Tensor) -> Tensor:
        """(tasks,) log det (Λ + δI), differentiable."""

    @abc.abstractmethod
    def density(self, loc: Tensor, damping: Tensor) -> Transported:
        """N(loc, (Λ + δI)⁻¹)."""


@dataclass(frozen=True)
class Dense(Precision):
    """Λ (tasks, size, size) as it is."""

    matrix: Tensor

    @property
    def smallest(self) -> Tensor:
        """The smallest eigenvalue; NaN where Λ is not finite."""
        matrix = self.matrix.detach()
        safe = torch.where(self.finite[..., None, None], matrix, torch.zeros_like(matrix))
        found = torch.linalg.eigvalsh(safe)[..., 0]
        return torch.where(self.finite, found, torch.full_like(found, torch.nan))

    @property
    def finite(self) -> Tensor:
        """Every entry."""
        return torch.isfinite(self.matrix).flatten(-2).all(-1)

    @property
    def magnitude(self) -> Tensor:
        """Mean of the diagonal, absolute."""
        return self.matrix.detach().diagonal(dim1=-2, dim2=-1).abs().mean(-1)

    def positive(self, damping: Tensor) -> Tensor:
        """By a factor of D^−½ (Λ + δI) D^−½ less a few roundings, D the diagonal."""
        matrix = self.damped(damping).detach()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
        least = _ROUNDINGS * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        _, failed = torch.linalg.cholesky_ex(_scaled(matrix, scale) - least * identity)
        found: Tensor = self.finite & (diagonal > 0).all(-1) & (failed == 0)
        return found

    def damped(self, damping: Tensor) -> Tensor:
        """Λ + δI."""
        return self.matrix + torch.diag_embed(damping.unsqueeze(-1).expand(self.matrix.shape[:-1]))

    def log_det(self, damping: Tensor) -> Tensor:
        """By Cholesky; NaN where there is no factor."""
        factor, failed = torch.linalg.cholesky_ex(self.damped(damping))
        found: Tensor = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(failed == 0, found, torch.full_like(found, torch.nan))

    def density(self, loc: Tensor, damping: Tensor) -> Gaussian:
        """A full Gaussian."""
        return Gaussian(loc, covariance_factor(self.damped(damping)))


@dataclass(frozen=True)
class Block(Precision):
    """Λ of some entries of φ, (tasks, free, free); the others are points.

    Attributes:
        inner: of the entries.
        entries: (free,) positions in φ.
    """

    inner: Dense
    entries: Tensor

    @property
    def smallest(self) -> Tensor:
        """Of the block."""
        return self.inner.smallest

    @property
    def finite(self) -> Tensor:
        """Of the block."""
        return self.inner.finite

    @property
    def magnitude(self) -> Tensor:
        """Of the block."""
        return self.inner.magnitude

    def positive(self, damping: Tensor) -> Tensor:
        """Of the block."""
        return self.inner.positive(damping)

    def log_det(self, damping: Tensor) -> Tensor:
        """Of the block."""
        return self.inner.log_det(damping)

    def density(self, loc: Tensor, damping: Tensor) -> Partial:
        """A Gaussian in the entries of the block."""
        return Partial(loc, covariance_factor(self.inner.damped(damping)), self.entries)


@dataclass(frozen=True)
class Diagonal(Precision):
    """Λ with nothing off its diagonal, (tasks, size)."""

    values: Tensor

    @property
    def smallest(self) -> Tensor:
        """The smallest entry."""
        return self.values.detach().amin(-1)

    @property
    def finite(self) -> Tensor:
        """Every entry."""
        return torch.isfinite(self.values).all(-1)

    @property
    def magnitude(self) -> Tensor:
        """Mean of the diagonal, absolute."""
        return self.values.detach().abs().mean(-1)

    def positive(self, damping: Tensor) -> Tensor:
        """Every entry."""
        return self.smallest + damping > 0

    def log_det(self, damping: Tensor) -> Tensor:
        """Sum of logarithms."""
        return (self.values + damping.unsqueeze(-1)).log().sum(-1)

    def density(self, loc: Tensor, damping: Tensor) -> Gaussian:
        """Independent entries."""
        return Gaussian(loc, (self.values + damping.unsqueeze(-1)).rsqrt())


@dataclass(frozen=True)
class Rows(Precision):
    """Λ = diag(base) + Σ_r row_r row_rᵀ, fewer rows than entries of φ.

    Attributes:
        base: (tasks, size).
        rows: (tasks, rank, size).
    """

    base: Tensor
    rows: Tensor

    @property
    def smallest(self) -> Tensor:
        """The smallest entry of the base, a bound below Λ's eigenvalues: rows only add."""
        return self.base.detach().amin(-1)

    @property
    def finite(self) -> Tensor:
        """Base and rows."""
        return torch.isfinite(self.base).all(-1) & torch.isfinite(self.rows).flatten(-2).all(-1)

    @property
    def magnitude(self) -> Tensor:
        """Mean of the base's entries, absolute."""
        return self.base.detach().abs().mean(-1)

    def positive(self, damping: Tensor) -> Tensor:
        """Every entry of the base."""
        return self.smallest + damping > 0

    def log_det(self, damping: Tensor) -> Tensor:
        """log det B + log det (I + R B⁻¹ Rᵀ), a determinant of size rank."""
        base = self.base + damping.unsqueeze(-1)
        white = self.rows * base.rsqrt().unsqueeze(-2)
        inner = white @ white.mT
        identity = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        factor, _ = torch.linalg.cholesky_ex(identity + inner)
        inner_log_det: Tensor = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return base.log().sum(-1) + inner_log_det

    def density(self, loc: Tensor, damping: Tensor) -> LowRankPrecision:
        """With R B^−½ = U diag(σ) V: Λ = B^½ (I + Vᵀ diag(σ²) V) B^½."""
        base = self.base + damping.unsqueeze(-1)
        sigma, directions = directions_of(self.rows * base.rsqrt().unsqueeze(-2))
        return LowRankPrecision(loc, base.rsqrt(), directions, (1 + sigma.square()).rsqrt())


@dataclass(frozen=True)
class LayerFactors:
    """G ⊗ A of a dense layer, and the prior's precision D by input.

    Attributes:
        entries: (outputs, inputs + 1) positions in φ.
        outputs: G (tasks, outputs, outputs).
        inputs: A (tasks, inputs + 1, inputs + 1).
        prior: D (tasks, inputs + 1), the same for every output.
    """

    entries: Tensor
    outputs: Tensor
    inputs: Tensor
    prior: Tensor


@dataclass(frozen=True)
class KroneckerFactored(Precision):
    """A block G ⊗ A + I ⊗ D for every layer.

    With D^−½ A D^−½ = Q a Qᵀ and G = P g Pᵀ its eigenvalues are 1 + g_i a_j, once D is taken out on
    both sides.
    """

    layers: tuple[LayerFactors, ...]

    @property
    def smallest(self) -> Tensor:
        """The smallest entry of the priors' precisions, a bound below Λ's eigenvalues."""
        return torch.stack([layer.prior.detach().amin(-1) for layer in self.layers]).amin(0)

    @property
    def finite(self) -> Tensor:
        """All factors."""
        parts = [
            torch.isfinite(matrix).flatten(1).all(-1)
            for layer in self.layers
            for matrix in (layer.outputs, layer.inputs, layer.prior)
        ]
        return torch.stack(parts).all(0)

    @property
    def magnitude(self) -> Tensor:
        """Mean of the priors' precisions, absolute."""
        return torch.stack([layer.prior.detach().abs().mean(-1) for layer in self.layers]).mean(0)

    def positive(self, damping: Tensor) -> Tensor:
        """Every entry of the priors' precisions."""
        return self.smallest + damping > 0

    def log_det(self, damping: Tensor) -> Tensor:
        """Σ log (1 + g_i a_j) + outputs · Σ log D, over layers."""
        total = torch.zeros_like(damping)
        for layer in self.layers:
            prior = layer.prior + damping.unsqueeze(-1)
            g = torch.linalg.eigvalsh(layer.outputs)
            a = torch.linalg.eigvalsh(_scaled(layer.inputs, prior.rsqrt()))
            values = _products(g, a)
            outputs = layer.entries.shape[0]
            total = total + values.log1p().sum((-2, -1)) + outputs * prior.log().sum(-1)
        return total

    def density(self, loc: Tensor, damping: Tensor) -> Kronecker:
        """Its covariance has the eigenvalues 1 / (1 + g_i a_j), D put back on both sides."""
        found = []
        for layer in self.layers:
            scale = (layer.prior + damping.unsqueeze(-1)).rsqrt()
            g, outputs = torch.linalg.eigh(layer.outputs)
            a, inputs = torch.linalg.eigh(_scaled(layer.inputs, scale))
            sd = (1 + _products(g, a)).rsqrt()
            found.append(Layer(layer.entries, signed(outputs), signed(inputs), sd, scale))
        return Kronecker.of(loc, found)


def _scaled(matrix: Tensor, by: Tensor) -> Tensor:
    return by.unsqueeze(-1) * matrix * by.unsqueeze(-2)


def _products(g: Tensor, a: Tensor) -> Tensor:
    """g_i a_j; what rounding made negative is zero."""
    return g.clamp_min(0).unsqueeze(-1) * a.clamp_min(0).unsqueeze(-2)
