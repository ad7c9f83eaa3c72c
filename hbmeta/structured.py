"""Gaussians over the weights of networks whose covariance is never written out.

    LowRankPrecision   N(m, D^½ (I + Vᵀ diag(s² − 1) V) D^½), V (rank, size) of orthonormal rows:
                       precision D⁻¹ plus one of low rank, where s ≤ 1
    Kronecker          a block per dense layer, M the (outputs, inputs + 1) matrix of its weights
                       and bias: M = M̂ + Q_g (s ∘ ε) Q_aᵀ D^½, ε standard normal
    Partial            N(m, L Lᵀ) in some entries of φ, a point in the others

A task takes rank · size numbers, or as many as its layers' factors have, in the place of size².
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hbmeta.densities import Delta, Empirical, Gaussian, Transported
from hbmeta.errors import UnsupportedModelError

__all__ = [
    "DENSITIES",
    "Kronecker",
    "Layer",
    "LowRankPrecision",
    "Partial",
    "directions_of",
    "signed",
]


def signed(vectors: Tensor) -> Tensor:
    """Eigenvectors (..., size, count) in columns, each with its largest entry positive."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def directions_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """σ (tasks, rank) and V (tasks, rank, size) of rows = U diag(σ) V, whatever the rows' order.

    Directions without a row to speak of are zero: nothing is known of them, and σ² is none.
    """
    _, sigma, directions = torch.linalg.svd(rows, full_matrices=False)
    least = rows.shape[-1] * torch.finfo(rows.dtype).eps * sigma[..., :1]
    some = (sigma > least).unsqueeze(-1)
    return sigma, torch.where(some, signed(directions.mT).mT, torch.zeros_like(directions))


@dataclass(frozen=True)
class LowRankPrecision(Transported):
    """A Gaussian that differs from one with independent entries in a few directions.

    Attributes:
        loc: m (tasks, size).
        scale: D^½ (tasks, size).
        directions: V (tasks, rank, size), rows orthonormal or zero.
        shrink: s (tasks, rank), standard deviations along them, in units of `scale`.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    shrink: Tensor

    @property
    def noise_size(self) -> int:
        """One per entry of φ."""
        return self.loc.shape[-1]

    @property
    def centre(self) -> Tensor:
        """m (tasks, size)."""
        return self.loc

    @property
    def sd(self) -> Tensor:
        """(tasks, size)."""
        change = (self.directions.square() * (self.shrink.square() - 1).unsqueeze(-1)).sum(-2)
        return self.scale * (1 + change).clamp_min(0).sqrt()

    def _stretched(self, whitened: Tensor, by: Tensor) -> Tensor:
        """whitened + Vᵀ ((by − 1) ∘ V whitened), whitened (..., tasks, size)."""
        along = (self.directions @ whitened.unsqueeze(-1)).squeeze(-1)
        return whitened + (self.directions.mT @ ((by - 1) * along).unsqueeze(-1)).squeeze(-1)

    def draw(self, noise: Tensor) -> Tensor:
        """m + D^½ (I + Vᵀ diag(s − 1) V) ε for noise (draws, tasks, size)."""
        return self.loc + self.scale * self._stretched(noise, self.shrink)

    def log_prob(self, phi: Tensor) -> Tensor:
        """(..., tasks)."""
        whitened = self._stretched((phi - self.loc) / self.scale, 1 / self.shrink)
        log_det = self.scale.log().sum(-1) + self.shrink.log().sum(-1)
        size = self.loc.shape[-1]
        return -0.5 * whitened.square().sum(-1) - log_det - 0.5 * size * math.log(2 * math.pi)

    def detach(self) -> LowRankPrecision:
        """The same numbers without their history."""
        return LowRankPrecision(*(getattr(self, name).detach() for name in _LOW_RANK))

    def select(self, positions: Tensor) -> LowRankPrecision:
        """The density of some of the tasks."""
        return LowRankPrecision(*(getattr(self, name)[positions] for name in _LOW_RANK))


_LOW_RANK = ("loc", "scale", "directions", "shrink")


class Layer(NamedTuple):
    """A dense layer's part of a `Kronecker` density.

    Attributes:
        entries: (outputs, inputs + 1) positions in φ of the weights, and of the bias at the end.
        outputs: Q_g (tasks, outputs, outputs).
        inputs: Q_a (tasks, inputs + 1, inputs + 1).
        sd: s (tasks, outputs, inputs + 1).
        scale: D^½ (tasks, inputs + 1).
    """

    entries: Tensor
    outputs: Tensor
    inputs: Tensor
    sd: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Kronecker(Transported):
    """A Gaussian with a block (A ⊗ G + prior)⁻¹ for each dense layer of a network.

    Attributes:
        loc: (tasks, size).
        shapes: (layers, 2) outputs and inputs + 1 of each layer.
        entries: positions in φ of all layers' weights and biases, one layer after the other.
        outputs, inputs, sd, scale: see `Layer`; all layers flat, one after the other.
    """

    loc: Tensor
    shapes: Tensor
    entries: Tensor
    outputs: Tensor
    inputs: Tensor
    sd: Tensor
    scale: Tensor

    @staticmethod
    def of(loc: Tensor, layers: list[Layer]) -> Kronecker:
        """From its layers, which together cover φ."""
        shapes = torch.tensor([list(layer.entries.shape) for layer in layers])
        flat = [[t.flatten(1) for t in layer[1:]] for layer in layers]
        return Kronecker(
            loc,
            shapes.to(loc.device),
            torch.cat([layer.entries.flatten() for layer in layers]),
            *(torch.cat(parts, 1) for parts in zip(*flat, strict=True)),
        )

    @property
    def layers(self) -> Iterator[Layer]:
        """The layers."""
        shapes = [(int(o), int(i)) for o, i in self.shapes.tolist()]
        entries = self.entries.split([o * i for o, i in shapes])
        outputs = self.outputs.split([o * o for o, _ in shapes], 1)
        inputs = self.inputs.split([i * i for _, i in shapes], 1)
        sd = self.sd.split([o * i for o, i in shapes], 1)
        scale = self.scale.split([i for _, i in shapes], 1)
        for k, (o, i) in enumerate(shapes):
            yield Layer(
                entries[k].reshape(o, i),
                outputs[k].reshape(-1, o, o),
                inputs[k].reshape(-1, i, i),
                sd[k].reshape(-1, o, i),
                scale[k],
            )

    @property
    def noise_size(self) -> int:
        """One per entry of φ."""
        return self.loc.shape[-1]

    @property
    def centre(self) -> Tensor:
        """(tasks, size)."""
        return self.loc

    def draw(self, noise: Tensor) -> Tensor:
        """φ for noise (draws, tasks, size)."""
        steps = torch.empty_like(noise)
        for layer in self.layers:
            epsilon = noise[..., layer.entries]
            moved = layer.outputs @ (layer.sd * epsilon) @ layer.inputs.mT
            steps[..., layer.entries] = moved * layer.scale.unsqueeze(-2)
        return self.loc + steps

    def log_prob(self, phi: Tensor) -> Tensor:
        """(..., tasks)."""
        total: Tensor = phi.new_zeros(())
        away = phi - self.loc
        for layer in self.layers:
            block = away[..., layer.entries] / layer.scale.unsqueeze(-2)
            whitened = layer.outputs.mT @ block @ layer.inputs / layer.sd
            # D^½ stands once for each output.
            log_det = layer.sd.log().sum((-2, -1))
            log_det = log_det + layer.entries.shape[0] * layer.scale.log().sum(-1)
            total = total - 0.5 * whitened.square().sum((-2, -1)) - log_det
        return total - 0.5 * self.loc.shape[-1] * math.log(2 * math.pi)

    def detach(self) -> Kronecker:
        """The same numbers without their history."""
        return replace(self, **{name: getattr(self, name).detach() for name in _BY_TASK})

    def select(self, positions: Tensor) -> Kronecker:
        """The density of some of the tasks."""
        return replace(self, **{name: getattr(self, name)[positions] for name in _BY_TASK})


_BY_TASK = ("loc", "outputs", "inputs", "sd", "scale")


@dataclass(frozen=True)
class Partial(Transported):
    """A Gaussian in some entries of φ; the others stand at a point.

    Attributes:
        loc: (tasks, size).
        scale: L (tasks, free, free), lower triangular.
        entries: (free,) positions in φ.
    """

    loc: Tensor
    scale: Tensor
    entries: Tensor

    @property
    def noise_size(self) -> int:
        """One per entry that is not a point."""
        return self.entries.shape[0]

    @property
    def centre(self) -> Tensor:
        """(tasks, size)."""
        return self.loc

    def draw(self, noise: Tensor) -> Tensor:
        """φ for noise (draws, tasks, free)."""
        step = (self.scale @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc.expand(*noise.shape[:-1], -1).index_add(-1, self.entries, step)

    def log_prob(self, phi: Tensor) -> Tensor:
        """Refuses: with a point in it, φ has no density."""
        raise UnsupportedModelError(
            "log_prob",
            needed="a posterior with a density over all of φ",
            found=f"{self.loc.shape[-1] - self.entries.shape[0]} entries of φ at a point",
            do='Use curvature="kronecker", "diagonal" or "ggn".',
        )

    def detach(self) -> Partial:
        """The same numbers without their history."""
        return Partial(self.loc.detach(), self.scale.detach(), self.entries)

    def select(self, positions: Tensor) -> Partial:
        """The density of some of the tasks."""
        return Partial(self.loc[positions], self.scale[positions], self.entries)


DENSITIES = (Delta, Gaussian, Empirical, LowRankPrecision, Kronecker, Partial)
"""What a file of a fit may hold, by the names of the classes."""
