"""Networks that read a set of rows (x, y) of each task and do not see their order.

A row j contributes one Gaussian factor N(t_j; r_jᵀ u, 1) · exp(d_jᵀ u) in the space u that the task
prior whitens. Their product with N(0, I) has

    precision Λ = I + Σ_j r_j r_jᵀ,   Λ m = η = Σ_j e_j,   e_j = r_j t_j + d_j,

which is Bayes' rule where y = r(x)ᵀ u + noise. (r_j, t_j, d_j) = network(x_j, y_j, c) with a
summary c = mean_j h(x_j, y_j), log(1 + n) of the whole set. Where φ is small d_j alone learns as
well (t_j = 0); where r(x) is a curve, t_j saves d_j from learning its product with y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hbmeta.program import Batch
from hbmeta.tasks import Tasks

_FACTORS_UP_TO = 64
_PRODUCTS_UP_TO = 8
_WRITTEN_OUT = 4

__all__ = ["RowFeatures", "SetEncoder", "waves"]


def waves(u: Tensor, frequencies: int) -> Tensor:
    """(u, sin(k π u / 2), cos(k π u / 2), k = 1..frequencies), (..., columns (1 + 2 frequencies)).

    On u in [-1, 1] the slowest wave makes half a turn.
    """
    if not frequencies:
        return u
    k = torch.arange(1, frequencies + 1, dtype=u.dtype, device=u.device) * (math.pi / 2)
    turns = (u.unsqueeze(-1) * k).flatten(-2)
    return torch.cat([u, turns.sin(), turns.cos()], -1)


class RowFeatures(nn.Module):
    """What the networks see of a row: (x, y) standardised, products of its entries, waves of x.

    Products (up to width 8) are there because their sums are the sufficient statistics of a
    linear-Gaussian task. Class labels enter as one indicator per class.

    Args:
        tasks: the training tasks, whose rows give locations, scales and ranges.
        classes: number of classes of y, 0 where y is a number or a vector.
        frequencies: see `waves`; x of more than 8 columns gets none.
    """

    location: Tensor
    scale: Tensor
    middle: Tensor
    half_range: Tensor
    labels: Tensor

    def __init__(self, tasks: Tasks, classes: int, frequencies: int) -> None:
        super().__init__()
        assert tasks.flat_y is not None
        self.classes = classes
        self.register_buffer("labels", torch.arange(classes, device=tasks.device))
        rows = self._joined(tasks.flat_x, tasks.flat_y)
        columns = tasks.flat_x.shape[-1]
        location = rows.mean(0)
        spread = rows.std(0) if rows.shape[0] > 1 else torch.ones_like(rows[0])
        if classes:
            location[columns:], spread[columns:] = 0.0, 1.0
        spread = torch.where(spread > 1e-12, spread, torch.ones_like(spread))
        low, high = tasks.flat_x.amin(0), tasks.flat_x.amax(0)
        half = (high - low) / 2
        self.register_buffer("location", location)
        self.register_buffer("scale", spread)
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("half_range", torch.where(half > 1e-12, half, torch.ones_like(half)))
        width = rows.shape[-1]
        self.products = width <= _PRODUCTS_UP_TO
        self.frequencies = frequencies if columns <= _PRODUCTS_UP_TO else 0
        self.columns = columns
        self.width = width + 2 * columns * self.frequencies
        self.width += width * (width + 1) // 2 if self.products else 0

    def forward(self, batch: Batch) -> Tensor:
        """(*cells, width)."""
        y = batch.y if batch.y is not None else batch.x[..., :0]
        rows = (self._joined(batch.x, y) - self.location) / self.scale
        parts = [rows]
        if self.products:
            first, second = torch.triu_indices(rows.shape[-1], rows.shape[-1], device=rows.device)
            parts.append(rows[..., first] * rows[..., second])
        if self.frequencies:
            u = (batch.x - self.middle) / self.half_range
            parts.append(waves(u, self.frequencies)[..., self.columns :])
        return torch.cat(parts, -1) if len(parts) > 1 else rows

    def _joined(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.unsqueeze(-1) if y.ndim < x.ndim else y
        if self.classes:
            # A comparison: `one_hot` looks at the values, which a traced graph cannot.
            y = y == self.labels
        return torch.cat([x, y.to(x.dtype)], -1)


class SetEncoder(nn.Module):
    """Permutation-invariant map from a masked set of rows (x, y) to a Gaussian in whitened space.

    Where φ has more than 64 entries there are no factors per row, only the summary's shift and
    scale.

    Args:
        features: what is seen of a row.
        hidden: width of the networks.
        layers: hidden layers of the network of a row.
        size: entries of φ.
        located: whether rows have a t_j.
    """

    def __init__(
        self, features: RowFeatures, hidden: int, layers: int, size: int, *, located: bool = False
    ) -> None:
        super().__init__()
        self.features = features
        width = features.width
        self.size, self.by_row, self.located = size, size <= _FACTORS_UP_TO, located
        self.summary = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        context = hidden + width + 1
        self.whole = nn.Sequential(
            nn.Linear(context, hidden), nn.SiLU(), nn.Linear(hidden, 2 * size)
        )
        _start_at(self.whole[-1], 0.0)
        if self.by_row:
            self.context = nn.Linear(context, hidden)
            self.row = nn.Linear(width, hidden)
            deeper: list[nn.Module] = []
            for _ in range(layers - 1):
                deeper += [nn.SiLU(), nn.Linear(hidden, hidden)]
            self.deeper = nn.Sequential(*deeper, nn.SiLU())
            self.factor = nn.Linear(hidden, 2 * size + located)
            self.skip = nn.Linear(width, 2 * size + located)
            # Factors r start small but not at zero, where r rᵀ has no gradient.
            _start_at(self.factor, 0.1)
            _start_at(self.skip, 0.1, but_last=located)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """η (tasks, size), Σ_j r_j r_jᵀ (tasks, size, size) or None, a and b (tasks, size).

        The second is in float64 where φ has more than 4 entries.
        """
        rows = self.features(batch)
        counts = batch.counts.unsqueeze(-1)
        mean = _sum(torch.cat([self.summary(rows), rows], -1), batch) / counts.clamp_min(1.0)
        context = torch.cat([mean, counts.log1p()], -1)
        shift, log_scale = (self.whole(context) * (counts > 0)).chunk(2, -1)
        if not self.by_row:
            return torch.zeros_like(shift), None, shift, log_scale
        inner = self.context(context)
        inner = inner.unsqueeze(-2) if batch.task is None else inner[batch.task]
        out = self.factor(self.deeper(self.row(rows) + inner)) + self.skip(rows)
        eta, root, place = out.split([self.size, self.size, int(self.located)], -1)
        eta = eta + root * place if self.located else eta
        return _sum(eta, batch), self._precision(root, batch), shift, log_scale

    def _precision(self, root: Tensor, batch: Batch) -> Tensor:
        if batch.task is None and self.size > _WRITTEN_OUT:
            # In double precision: what float32 rounds off grows with the condition of Λ.
            root = root.double()
            product: Tensor = root.mT @ (root * batch.weight.unsqueeze(-1))
            return product
        squares = root.unsqueeze(-1) * root.unsqueeze(-2)
        total = _sum(squares.flatten(-2), batch)
        square: Tensor = total.unflatten(-1, (self.size, self.size))
        return square


def _sum(rows: Tensor, batch: Batch) -> Tensor:
    weighted = rows * batch.weight.unsqueeze(-1)
    if batch.task is None:
        return weighted.sum(-2)
    empty = weighted.new_zeros(batch.n_tasks, weighted.shape[-1])
    return empty.index_add(0, batch.task, weighted)


def _start_at(layer: nn.Module, factor: float, *, but_last: bool = False) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        stop = layer.out_features - int(but_last)
        layer.weight[:stop].mul_(factor)
        layer.bias[:stop].mul_(factor)
