"""The posterior of one task's φ by strategy: marginal densities of coordinates, and their joint.

A Gaussian posterior is drawn exactly where the site is linear in φ: N(m, A Aᵀ) with the columns A_j
of `hbmeta.components.linear_columns`. Draws are smoothed by a Gaussian kernel (Scott's rule, for
the effective number of draws), which widens their standard deviation by a factor √(1 + n^(−2/5)),
2 % at n = 2,000, and smears over the edge of a bounded site. A point mass is a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import PchipInterpolator
from scipy.stats import gaussian_kde

from hbmeta.components import linear_columns, probes
from hbmeta.densities import Empirical, Gaussian
from hbmeta.drawing import View, common_site, coordinate_name, coordinate_values, view_of
from hbmeta.errors import DataError
from hbmeta.posterior import TaskPosterior
from hbmeta.styles import styled, styles_of

__all__ = ["densities"]

_MASSES = (0.5, 0.9)
_SMOOTHED = 2000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Shape:
    """One posterior over the chosen coordinates.

    Attributes:
        mean: (c,).
        covariance: (c, c); zero for a point.
        draws: (n, c), or None where the two above say all.
        weights: (n,) of the draws, summing to 1.
        nodes: whether the draws are all nodes of a grid in one dimension.
    """

    mean: Floats
    covariance: Floats
    draws: Floats | None = None
    weights: Floats | None = None
    nodes: bool = False

    def sd(self, i: int) -> float:
        return math.sqrt(self.covariance[i, i])

    def is_point(self, i: int) -> bool:
        return self.sd(i) <= 1e-9 * max(1.0, abs(float(self.mean[i])))

    def reach(self, i: int) -> View:
        """Where nearly all of a coordinate lies."""
        if self.draws is None:
            return self.mean[i] - 3.3 * self.sd(i), self.mean[i] + 3.3 * self.sd(i)
        order = np.argsort(self.draws[:, i])
        mass = np.cumsum(self.weights[order]) if self.weights is not None else np.ones(0)
        places = np.searchsorted(mass, [0.001, 0.999]).clip(0, len(order) - 1)
        low, high = self.draws[order[places], i]
        return float(low), float(high)

    def density(self, i: int, view: View) -> tuple[Floats, Floats]:
        """Places and the marginal density there."""
        around = self.mean[i] + self.sd(i) * np.linspace(-4.0, 4.0, 81)
        x = np.sort(np.concatenate([np.linspace(*view, 300), around]))
        if self.draws is None:
            z = (x - self.mean[i]) / self.sd(i)
            return x, np.exp(-0.5 * z**2) / (self.sd(i) * math.sqrt(2 * math.pi))
        if self.nodes and self.weights is not None:
            # The mass of a node over the width of its cell, which ends halfway to its neighbours.
            order = np.argsort(self.draws[:, i])
            at, mass = self.draws[order, i], self.weights[order]
            ends = np.concatenate([at[:1], 0.5 * (at[1:] + at[:-1]), at[-1:]])
            height = PchipInterpolator(at, mass / np.diff(ends), extrapolate=False)(x)
            return x, np.nan_to_num(height)
        return x, gaussian_kde(self.draws[:, i], weights=self.weights)(x)


@styled
def densities(
    posteriors: Mapping[str, TaskPosterior],
    *,
    task: Any = None,
    site: str | None = None,
    coordinates: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> Figure:
    """Posteriors of one φ by strategy: a panel for each of one or two coordinates, and the joint.

    The joint shows the smallest regions of probability 50 and 90 %. The axes show the bulk of the
    posteriors that have a spread; an arrow at the edge stands for a point that lies beyond.

    Args:
        posteriors: of (among others) this task, by strategy.
        task: id of the task; the first by default.
        site: local site; by default the first that all have in common, computed ones first.
        coordinates: one or two indices into the flattened site; by default the first two.
        labels: what the coordinates are called on the axes.
        draws: draws of a posterior that is not Gaussian in this site.
        seed: of those draws.
    Raises:
        DataError: no posterior, an unknown task, site or coordinate, other than one or two of them.
    """
    if not posteriors:
        raise DataError("densities", needed="a posterior or more", found="none", do="Pass one.")
    first = next(iter(posteriors.values()))
    task = first.ids[0] if task is None else task
    site = common_site(posteriors.values(), site, "densities")
    size = _size(first, site)
    chosen = tuple(range(min(2, size)) if coordinates is None else coordinates)
    named = [coordinate_name(site, c, first) for c in chosen] if labels is None else [*labels]
    if not 1 <= len(set(chosen)) == len(chosen) == len(named) <= 2 or not all(
        0 <= c < size for c in chosen
    ):
        raise DataError(
            "densities",
            needed=f"one or two coordinates of {site!r}, from 0 to {size - 1}, and their labels",
            found=f"coordinates {chosen}, labels {named}",
            do="Correct coordinates.",
        )
    shapes = {
        name: _shape_of(p.select([task]), site, chosen, draws, seed)
        for name, p in posteriors.items()
    }
    panels = 1 if len(chosen) == 1 else 3
    figure = Figure(figsize=(2.3 * panels + 0.6, 2.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    views = [_view(shapes.values(), i) for i in range(len(chosen))]
    for i, view in enumerate(views):
        _marginal(axes[i], shapes, i, view)
        axes[i].set_xlabel(named[i])
    axes[0].set_ylabel("posterior density")
    if panels == 3:
        _joint(axes[2], shapes, views)
        axes[2].set_xlabel(named[0])
        axes[2].set_ylabel(named[1])
    handles = []
    for name, (colour, marker) in styles_of(shapes).items():
        point = all(shapes[name].is_point(i) for i in range(len(chosen)))
        shown: Any = {"marker": marker if point else "", "ms": 3.5, "mew": 0}
        handles.append(Line2D([], [], color=colour, lw=1.4, label=name, **shown))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 1 + 2 * panels),
        columnspacing=1.0,
        handlelength=1.4,
        title=f"task {task}" + ("; joint: 50 and 90 % regions" if panels == 3 else ""),
    )
    return figure


def _marginal(axis: Axes, shapes: Mapping[str, _Shape], i: int, view: View) -> None:
    colours, peaks = styles_of(shapes), []
    for name, shape in shapes.items():
        if not shape.is_point(i):
            x, density = shape.density(i, view)
            axis.plot(x, density, color=colours[name][0], lw=1.2, zorder=3)
            axis.fill_between(x, density, color=colours[name][0], alpha=0.10, lw=0)
            peaks.append(float(density.max()))
    # One that is nearly a point would flatten all others.
    top = 1.08 * min(max(peaks), 3.0 * sorted(peaks)[(len(peaks) - 1) // 2]) if peaks else 1.0
    for name, shape in shapes.items():
        if shape.is_point(i):
            value, (colour, marker) = float(shape.mean[i]), colours[name]
            if view[0] <= value <= view[1]:
                axis.vlines(value, 0.0, 0.92 * top, color=colour, lw=1.2, zorder=4)
                axis.plot([value], [0.92 * top], marker, color=colour, ms=3.5, mew=0, zorder=5)
            else:
                _arrow(axis, value > view[1], 0.92, colour)
    axis.set_xlim(*view)
    axis.set_ylim(0.0, top)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _arrow(axis: Axes, right: bool, height: float, colour: str) -> None:
    axis.plot(
        [0.99 if right else 0.01], [height], ">" if right else "<", color=colour, ms=5, mew=0,
        transform=axis.transAxes, clip_on=False, zorder=5,
    )  # fmt: skip


def _joint(axis: Axes, shapes: Mapping[str, _Shape], views: Sequence[View]) -> None:
    """Regions of probability 50 and 90 % of two coordinates; a point as a marker."""
    colours = styles_of(shapes)
    angle = np.linspace(0.0, 2 * math.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for name, shape in shapes.items():
        colour, marker = colours[name]
        if shape.is_point(0) or shape.is_point(1):
            # A point in one coordinate alone is a line; both ends of it say so.
            spread = np.array([shape.sd(0), shape.sd(1)])
            ends = np.stack([shape.mean - 1.645 * spread, shape.mean + 1.645 * spread])
            axis.plot(*ends.T, color=colour, lw=1.2)
            _spot(axis, shape.mean, views, colour, marker)
        elif shape.draws is None or abs(_correlation(shape)) > 0.9999:
            values, vectors = np.linalg.eigh(shape.covariance)
            root = vectors * np.sqrt(values.clip(0.0))
            for mass in _MASSES:  # P(|ε|² ≤ r²) = 1 − e^(−r²/2) in two dimensions
                ring = shape.mean[:, None] + math.sqrt(-2 * math.log1p(-mass)) * (root @ circle)
                axis.plot(*ring, color=colour, lw=1.0, zorder=3)
        else:
            _contours(axis, shape, views, colour)
    axis.set_xlim(*views[0])
    axis.set_ylim(*views[1])
    for dimension in (axis.xaxis, axis.yaxis):
        dimension.set_major_locator(MaxNLocator(4))


def _spot(axis: Axes, at: Floats, views: Sequence[View], colour: str, marker: str) -> None:
    """A point, or an arrow at the edge where it lies beyond."""
    inside = [min(max(value, low), high) for value, (low, high) in zip(at, views, strict=True)]
    if inside[0] != at[0]:
        marker = ">" if at[0] > inside[0] else "<"
    elif inside[1] != at[1]:
        marker = "^" if at[1] > inside[1] else "v"
    axis.plot(
        [inside[0]], [inside[1]], marker, color=colour, ms=4.5, mec="white", mew=0.4,
        clip_on=False, zorder=5,
    )  # fmt: skip


def _correlation(shape: _Shape) -> float:
    return float(shape.covariance[0, 1] / (shape.sd(0) * shape.sd(1)))


def _contours(axis: Axes, shape: _Shape, views: Sequence[View], colour: str) -> None:
    """Contours of smoothed draws; the levels are those that so many of the draws lie above."""
    assert shape.draws is not None
    assert shape.weights is not None
    smooth = gaussian_kde(shape.draws.T, weights=shape.weights)
    at_draws = smooth(shape.draws.T)
    order = np.argsort(at_draws)
    below = np.cumsum(shape.weights[order])
    levels = sorted({float(at_draws[order[np.searchsorted(below, 1 - m)]]) for m in _MASSES})
    x, y = (np.linspace(*view, 70) for view in views)
    grid = np.stack(np.meshgrid(x, y)).reshape(2, -1)
    axis.contour(x, y, smooth(grid).reshape(len(y), len(x)), levels=levels, colors=[colour],
                 linewidths=1.0, zorder=3)  # fmt: skip


def _view(shapes: Any, i: int) -> View:
    """The bulk of what has a spread, and the points within half its width of it."""
    every = list(shapes)
    spread = [shape.reach(i) for shape in every if not shape.is_point(i)]
    points = [float(shape.mean[i]) for shape in every if shape.is_point(i)]
    if not spread:
        return view_of([(value, value) for value in points])
    low, high = view_of(spread)
    near = [v for v in points if low - (high - low) / 2 <= v <= high + (high - low) / 2]
    room = 0.05 * (high - low)
    return min([low, *(v - room for v in near)]), max([high, *(v + room for v in near)])


def _size(posterior: TaskPosterior, site: str) -> int:
    sites = (*posterior.problem.sites.locals, *posterior.problem.sites.deterministic_local)
    return next(math.prod(s.shape) for s in sites if s.name == site)


def _shape_of(
    one: TaskPosterior, site: str, coordinates: Sequence[int], draws: int, seed: int
) -> _Shape:
    """The posterior of a single task: exact where it can be, else draws."""
    if isinstance(one.density, Gaussian):
        phi, steps = probes(one.density)
        with torch.no_grad():
            batch = one.problem.batch(one.support)
            found = one.problem.particle_values(one.theta, False, phi, batch)[site]
        value = found.expand(len(phi), *found.shape[1:]).reshape(len(phi), -1)[:, [*coordinates]]
        columns = linear_columns(value, steps)
        if columns is not None:
            a = columns.double().cpu().numpy()
            return _Shape(value[0].double().cpu().numpy(), a.T @ a)
    parts = [coordinate_values(one, site, c, draws, seed) for c in coordinates]
    values = np.stack([part[0][:, 0].numpy() for part in parts], -1)
    log_weights = parts[0][1]
    n = len(values)
    if log_weights is None:
        weights = np.full(n, 1.0 / n)
    else:
        weights = log_weights[:, 0].double().softmax(0).numpy()
    mean = weights @ values
    centred = values - mean
    covariance = (weights[:, None] * centred).T @ centred
    if n > _SMOOTHED and log_weights is None:  # thinned evenly; weighted draws carry too little
        kept = np.linspace(0, n - 1, _SMOOTHED).round().astype(int)
        values, weights = values[kept], np.full(_SMOOTHED, 1.0 / _SMOOTHED)
    density = one.density
    nodes = isinstance(density, Empirical) and density.nodes and density.phi.shape[-1] == 1
    return _Shape(mean, covariance, values, weights, nodes)
