"""Normalising flows: Gaussian noise bent by splines and shifts, with numbers of its own per task.

    φ = c + A T(ε),   T = T_n ∘ … ∘ T_1,   log q(φ) = log N(ε) − log |det ∂T/∂ε| − log |A|

Every T_k is autoregressive in ε: entry j is moved by a monotone map whose numbers a small masked
network computes from the entries before it, spline (Durkan et al. 2019) and affine (Kingma et al.
2016) in turn, the order of the entries reversed from pair to pair. That direction is the cheap one
for inference: a draw and its density cost one pass, whereas the density of a φ from elsewhere costs
one per entry. The networks are zuko's; their weights stand in one table (tasks, ·), and
`torch.vmap` runs the networks of all tasks at once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hbmeta.densities import Transported
from hbmeta.families.family import Family, Frame
from hbmeta.triangular import solve_lower

_BINS = 8

__all__ = ["Flow", "FlowFamily"]


class _Bend(nn.Module):
    """T of one task, as a module whose weights are replaced."""

    def __init__(self, size: int, width: int, layers: int) -> None:
        # zuko has no types; it is imported where a flow is wanted, and not before.
        from zuko.flows.autoregressive import (  # type: ignore[import-untyped]
            MaskedAutoregressiveTransform,
        )
        from zuko.transforms import MonotonicRQSTransform  # type: ignore[import-untyped]

        super().__init__()
        spline: dict[str, Any] = {
            "univariate": MonotonicRQSTransform,
            "shapes": [(_BINS,), (_BINS,), (_BINS - 1,)],
        }
        # Of one entry there is nothing before it, and no network: the numbers themselves.
        network: dict[str, Any] = {}
        if size > 1:
            network = {"hidden_features": (width, width), "activation": nn.SiLU}
        parts = []
        for layer in range(layers):
            order = torch.arange(size) if layer % 2 == 0 else torch.arange(size).flip(0)
            parts += [
                MaskedAutoregressiveTransform(size, 0, order=order, **kind, **network)
                if size > 1
                else MaskedAutoregressiveTransform(size, 0, **kind)
                for kind in (spline, {})
            ]
        self.parts = nn.ModuleList(parts)
        for part in parts:
            with torch.no_grad():
                last = [p for p in part.parameters() if size == 1] or list(
                    part.hyper[-1].parameters()
                )
                for value in last:
                    value.zero_()

    def forward(self, values: Tensor, backwards: bool) -> tuple[Tensor, Tensor]:
        """T(ε) and log |det ∂T/∂ε| (..., size) and (...), or T⁻¹ and its own."""
        total = values.new_zeros(values.shape[:-1])
        for part in reversed(list(self.parts)) if backwards else self.parts:
            transform = part(None)
            transform = transform.inv if backwards else transform
            values, log_det = transform.call_and_ladj(values)
            total = total + log_det
        return values, total


@functools.lru_cache(maxsize=16)
def _template(size: int, width: int, layers: int, seed: int = 0) -> _Bend:
    """A network to take the weights of each task, in turn; never changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Bend(size, width, layers).double().requires_grad_(False)


def _run(
    template: _Bend, values: Tensor, noise: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """T of every task's own weights: noise (draws, tasks, size), weights (tasks, ·)."""
    named = list(template.named_parameters())
    buffers = {k: _like(v, values) for k, v in template.named_buffers()}

    def one(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        parts = weights.split([p.numel() for _, p in named])
        state = {n: part.reshape(p.shape) for (n, p), part in zip(named, parts, strict=True)}
        found: tuple[Tensor, Tensor] = functional_call(
            template, {**state, **buffers}, (points, backwards)
        )
        return found

    found: tuple[Tensor, Tensor] = torch.vmap(one, in_dims=(0, 1), out_dims=1)(values, noise)
    return found


def _like(buffer: Tensor, values: Tensor) -> Tensor:
    return buffer.to(values) if buffer.is_floating_point() else buffer.to(values.device)


@dataclass(frozen=True)
class Flow(Transported):
    """A normalising flow per task.

    Attributes:
        loc: (tasks, phi_size) c.
        scale: sds (tasks, phi_size), or lower-triangular A (tasks, phi_size, phi_size).
        weights: (tasks, ·) of the networks.
        shape: (2,) width and layers of the networks.
    """

    loc: Tensor
    scale: Tensor
    weights: Tensor
    shape: Tensor

    @property
    def noise_size(self) -> int:
        """One per entry of φ."""
        return self.loc.shape[-1]

    @property
    def _template(self) -> _Bend:
        width, layers = self.shape.tolist()
        return _template(self.loc.shape[-1], width, layers)

    @property
    def centre(self) -> Tensor:
        """T(0) in the frame: a point of the bulk, neither mean nor mode."""
        return self.draw(torch.zeros_like(self.loc).unsqueeze(0))[0]

    def draw(self, noise: Tensor) -> Tensor:
        """c + A T(ε) for noise (draws, tasks, phi_size)."""
        return self.push(noise)[0]

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """φ and log q(φ) (draws, tasks), by one pass."""
        bent, log_det = _run(self._template, self.weights, noise)
        if self.scale.ndim == self.loc.ndim:
            phi = self.loc + self.scale * bent
        else:
            phi = self.loc + (self.scale @ bent.unsqueeze(-1)).squeeze(-1)
        return phi, _log_normal(noise) - log_det - self._log_frame()

    def _log_frame(self) -> Tensor:
        diagonal = self.scale
        if self.scale.ndim > self.loc.ndim:
            diagonal = self.scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def log_prob(self, phi: Tensor) -> Tensor:
        """log q (..., tasks) at φ (..., tasks, phi_size), by inverting T: one pass per entry."""
        difference = phi - self.loc
        if self.scale.ndim == self.loc.ndim:
            bent = difference / self.scale
        else:
            bent = solve_lower(self.scale, difference)
        lead = bent.shape[:-2]
        points = bent.reshape(-1, *bent.shape[-2:])
        noise, log_det = _run(self._template, self.weights, points, backwards=True)
        found = _log_normal(noise) + log_det - self._log_frame()
        return found.reshape(*lead, found.shape[-1])

    def detach(self) -> Flow:
        """The same numbers without their history."""
        return Flow(self.loc.detach(), self.scale.detach(), self.weights.detach(), self.shape)

    def select(self, positions: Tensor) -> Flow:
        """The density of some of the tasks."""
        return Flow(self.loc[positions], self.scale[positions], self.weights[positions], self.shape)


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * math.log(2 * math.pi)


@dataclass(frozen=True)
class FlowFamily(Family):
    """λ = the weights of T's networks, in a frame that is a fitted Gaussian.

    Attributes:
        width: of the networks' two hidden layers.
        layers: pairs of a spline and an affine map.
    """

    sticks: ClassVar[bool] = False

    width: int = 16
    layers: int = 2

    @property
    def parameters(self) -> int:
        """Weights of all networks of a task."""
        template = _template(self.size, self.width, self.layers)
        return sum(p.numel() for p in template.parameters())

    def start(self, frame: Frame, seed: int) -> Tensor:
        """T(ε) = ε: last layers of zeros over layers drawn with `seed`, alike for all tasks."""
        template = _template(self.size, self.width, self.layers, seed)
        row = torch.cat([p.flatten() for p in template.parameters()])
        return row.to(frame.loc).repeat(frame.loc.shape[0], 1)

    def density(self, values: Tensor, frame: Frame) -> Flow:
        """q at λ."""
        shape = torch.tensor([self.width, self.layers])
        return Flow(frame.loc, frame.scale, values, shape)

    def draw(
        self, values: Tensor, frame: Frame, noise: Tensor, *, stick: bool
    ) -> tuple[Tensor, Tensor]:
        """φ and log q(φ) by one pass; the score of q stays in a gradient, `stick` or not."""
        template = _template(self.size, self.width, self.layers)
        bent, log_det = _run(template, values, noise)
        framed = Frame(frame.loc, frame.scale)
        phi = framed.draw(bent)
        return phi, framed.log_prob(phi) - _log_normal(bent) + _log_normal(noise) - log_det
