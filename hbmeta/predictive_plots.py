"""Figures of predictions against what was observed: predictive checks and reliability.

Rows of one task share its φ, so that they are no independent trials: with few tasks and many rows a
right model leaves the bands more often than they say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy import stats

from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.predictive import Predictive
from hbmeta.styles import GREY, styled, styles_of

__all__ = ["predictive_checks", "reliability"]

Floats = npt.NDArray[np.float64]

_REPLICATES = 200
_MOST_BINS, _LEVELS, _CLASSES_BINS = 30, 19, 10


@styled
def predictive_checks(
    predictives: Mapping[str, Predictive], y: Any, *, alpha: float = 0.05, seed: int = 0
) -> Figure:
    """What was observed beside what each predictive produces, and how far out each row lies.

    Above: the share of rows by value, observed and in 200 data sets drawn from the predictive (the
    band holds the central 90 % of these in each bin). Below: the distribution function of the
    u_r = P(Y_r ≤ y_r), for whole numbers drawn uniformly between P(Y_r < y_r) and P(Y_r ≤ y_r),
    less the diagonal. Where rows are predicted rightly u_r is uniform; the band holds a uniform
    sample of as many independent rows wholly with probability 1 − alpha at least (Massart 1990,
    Ann. Probab. 18). A curve like an S upside down (first above, then below the line) means
    predictions that are too narrow.

    Predictions of the rows that a fit was adapted to are better than those of new rows: take the
    query, or read the figure as the usual posterior predictive check with that in mind.

    Args:
        predictives: of the same rows, by name: `posterior.predict(episode.query)`.
        y: observed, as the rows of the predictives; in the units of the data.
        alpha: false-alarm rate of the whole lower band.
        seed: of the data sets, and of the uniforms.
    Raises:
        DataError: no predictive, or y of another shape.
        UnsupportedModelError: y is a class label or a vector; see `reliability` for classes.
    """
    observed = {name: _observed(name, p, y) for name, p in _some(predictives).items()}
    pits = {name: _pit(p, observed[name], seed) for name, p in predictives.items()}
    styles = styles_of(predictives)
    figure = Figure(figsize=(2.3 * len(predictives) + 0.6, 3.6), layout="constrained")
    axes = figure.subplots(2, len(predictives), squeeze=False, sharex="row", sharey="row")
    replicated = {name: _replicated(p, seed) for name, p in predictives.items()}
    edges = _edges(next(iter(observed.values())), replicated.values())
    for column, name in enumerate(predictives):
        _shares(axes[0, column], observed[name], replicated[name], edges, styles[name][0])
        _distribution(axes[1, column], pits[name], alpha, styles[name][0])
        axes[0, column].set_title(name)
    axes[0, 0].set_ylabel("share of rows")
    axes[1, 0].set_ylabel("ECDF of $u$ − uniform")
    handles = [
        Patch(color=GREY, label="predicted, central 90 %"),
        Line2D([], [], color="black", lw=0.9, label="observed"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


@styled
def reliability(predictives: Mapping[str, Predictive], y: Any, *, seed: int = 0) -> Figure:
    """How often what was predicted with a probability came true.

    Of numbers: the share of rows within the central interval of each probability, against that
    probability; the grey band holds the share of as many independent rows with probability 0.9 at
    each. Of two classes: the share of ones against the predicted probability of one, in ten bins;
    of more: the share of rows where the most probable class was right, against its probability.
    Bars are Wilson's 90 % intervals, and areas of marks grow with the number of rows. Below the
    diagonal predictions are too sure of themselves.

    Args:
        predictives: of the same rows, by name.
        y: observed, as the rows of the predictives; in the units of the data.
        seed: of the uniforms that break ties of whole numbers.
    Raises:
        DataError: no predictive, y of another shape, or classes beside numbers.
        UnsupportedModelError: y is a vector.
    """
    curves = {name: _curve(name, p, y, seed) for name, p in _some(predictives).items()}
    if len({curve.label for curve in curves.values()}) > 1:
        raise DataError(
            "reliability",
            needed="predictives of the same response",
            found=", ".join(f"{name}: {curve.label}" for name, curve in curves.items()),
            do="Make one figure for each.",
        )
    styles = styles_of(predictives)
    figure = Figure(figsize=(3.4, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="black", lw=0.6, ls=(0, (3, 2)), zorder=1)
    first = next(iter(curves.values()))
    if first.low is None:
        low, high = stats.binom(first.rows, first.at).interval(0.9)
        axis.fill_between(
            first.at, low / first.rows, high / first.rows, color=GREY, alpha=0.5, lw=0, zorder=0
        )
    for name, curve in curves.items():
        colour, marker = styles[name]
        axis.plot(curve.at, curve.share, color=colour, lw=1.0, label=name, marker=marker,
                  ms=3.0 if curve.low is None else 0.0, mew=0, zorder=3)  # fmt: skip
        if curve.low is not None and curve.high is not None:
            axis.vlines(curve.at, curve.low, curve.high, color=colour, lw=0.7, alpha=0.7)
            size = 6.0 + 60.0 * curve.counts / curve.counts.max()
            axis.scatter(curve.at, curve.share, s=size, color=colour, marker=marker, lw=0, zorder=3)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=first.label, ylabel=first.result)
    figure.legend(loc="outside upper center", ncols=min(len(curves), 3))
    return figure


class _Curve(NamedTuple):
    """Predicted probabilities and what came of them; ends of intervals of classes."""

    label: str
    result: str
    rows: int
    at: Floats
    share: Floats
    counts: Floats
    low: Floats | None
    high: Floats | None


def _curve(name: str, predictive: Predictive, y: Any, seed: int) -> _Curve:
    observed = _observed(name, predictive, y)
    try:
        cells = predictive.probabilities
    except UnsupportedModelError:
        u = _pit(predictive, observed, seed)
        at = np.linspace(0, 1, _LEVELS + 2)[1:-1]
        share = (np.abs(2.0 * u - 1.0)[:, None] <= at).mean(0)
        label = "probability of the central interval"
        return _Curve(label, "share of rows within it", len(u), at, share, at, None, None)
    p = _numbers(_flat(predictive, cells))
    if p.ndim != 2:
        raise UnsupportedModelError(
            "reliability",
            needed="one class per row",
            found=f"several in {name!r}",
            do="Predict one column.",
        )
    if p.shape[1] == 2:
        chance, hit = p[:, 1], observed == 1
        label, result = "predicted probability of 1", "share of ones"
    else:
        chance, hit = p.max(1), p.argmax(1) == observed
        label, result = "probability of the predicted class", "share that it was right"
    place = np.minimum((chance * _CLASSES_BINS).astype(int), _CLASSES_BINS - 1)
    found = []
    for b in np.unique(place):
        inside = place == b
        interval = stats.binomtest(int(hit[inside].sum()), int(inside.sum())).proportion_ci(
            0.9, method="wilson"
        )
        row = chance[inside].mean(), hit[inside].mean(), inside.sum(), interval.low, interval.high
        found.append(row)
    at, share, counts, low, high = np.array(found, dtype=float).T
    return _Curve(label, result, len(p), at, share, counts, low, high)


def _replicated(predictive: Predictive, seed: int) -> Floats:
    """(data sets, rows) drawn from the predictive."""
    draws = predictive.sample(_REPLICATES, seed)
    return _numbers(torch.stack([_flat(predictive, draw) for draw in draws]))


def _shares(axis: Axes, observed: Floats, replicated: Floats, edges: Floats, colour: str) -> None:
    """Histogram of what was observed, and the band of those of the data sets."""
    shares = np.stack([np.histogram(row, edges)[0] for row in replicated]) / len(observed)
    low, high = np.quantile(shares, [0.05, 0.95], axis=0)
    # A step needs the last value twice.
    low, high = (np.append(one, one[-1]) for one in (low, high))
    axis.fill_between(edges, low, high, step="post", color=colour, alpha=0.35, lw=0)
    axis.stairs(np.histogram(observed, edges)[0] / len(observed), edges, color="black", lw=0.9)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("y")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=bool((edges % 1 == 0.5).all())))


def _edges(observed: Floats, replicated: Iterable[Floats]) -> Floats:
    """Bins from the observed to half their range beyond, where predictions reach so far."""
    drawn = np.stack([[one.min(), one.max()] for one in replicated])
    whole = (observed % 1 == 0).all() and (drawn % 1 == 0).all()
    room = 0.5 * float(np.ptp(observed)) or 1.0
    low, high = float(observed.min()), float(observed.max())
    low = max(low - room, min(float(drawn.min()), low))
    high = min(high + room, max(float(drawn.max()), high))
    if whole:
        low, high = math.ceil(low), math.floor(high)
        width = math.ceil((high - low + 1) / _MOST_BINS)
        bins = math.ceil((high - low + 1) / width)
        return low - 0.5 + width * np.arange(bins + 1, dtype=float)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    number = int(np.clip(2.0 * len(observed) ** (1 / 3), 5, _MOST_BINS))
    return np.linspace(low, high, number + 1)


def _distribution(axis: Axes, u: Floats, alpha: float, colour: str) -> None:
    """The distribution function of u less the diagonal, and where uniform ones stay."""
    if not 0.0 < alpha < 1.0:
        raise DataError(
            "predictive_checks", needed="alpha between 0 and 1", found=f"{alpha}", do="Pass 0.05."
        )
    n = len(u)
    reach = math.sqrt(math.log(2.0 / alpha) / (2.0 * n))
    at = np.linspace(0, 1, 201)
    # A distribution function lies in [0, 1].
    low, high = np.maximum(-reach, -at), np.minimum(reach, 1.0 - at)
    axis.fill_between(at, low, high, color=GREY, alpha=0.5, lw=0)
    u = np.sort(u)
    steps = np.arange(1, n + 1) / n
    x, f = np.repeat(u, 2), np.stack([steps - 1.0 / n, steps], 1).ravel()
    axis.plot([0, *x, 1], [0, *(f - x), 0], color=colour, lw=1.0)
    axis.set(xlim=(0, 1), xticks=(0, 0.5, 1), xlabel="$u$ = P(Y ≤ y)")


def _pit(predictive: Predictive, observed: Floats, seed: int) -> Floats:
    """(rows,) P(Y ≤ y), drawn between the ends of a step."""
    upper = _numbers(_flat(predictive, predictive.cdf(observed)))
    if not (observed % 1 == 0).all() or not _whole(predictive, seed):
        return upper
    lower = _numbers(_flat(predictive, predictive.cdf(observed - 1.0)))
    return lower + np.random.default_rng(seed).random(len(upper)) * (upper - lower)


def _whole(predictive: Predictive, seed: int) -> bool:
    return bool((predictive.sample(2, seed) % 1 == 0).all())


def _observed(name: str, predictive: Predictive, y: Any) -> Floats:
    """(rows,) y, once its shape is known to be that of the predictive."""
    values = torch.as_tensor(y, device=predictive.tasks.device)
    tasks = predictive.tasks
    if tuple(values.shape) == (tasks.n_tasks, tasks.max_points):
        values = tasks.unpad(values)
    if tuple(values.shape) != (tasks.n_points,) or not tasks.n_points:
        raise DataError(
            "a figure of predictions",
            needed=f"y of the {tasks.n_points} rows of {name!r}, a number each",
            found=f"shape {tuple(values.shape)}",
            do="Pass y of the tasks that were predicted, such as episode.query.y.",
        )
    return _numbers(values)


def _some(predictives: Mapping[str, Predictive]) -> Mapping[str, Predictive]:
    good = isinstance(predictives, Mapping) and all(
        isinstance(p, Predictive) for p in predictives.values()
    )
    if not good or not predictives:
        raise DataError(
            "a figure of predictions",
            needed="predictives by name",
            found=type(predictives).__name__ if not good else "none",
            do='Pass {"NUTS": posterior.predict(episode.query)}.',
        )
    return predictives


def _flat(predictive: Predictive, values: torch.Tensor) -> torch.Tensor:
    return predictive.tasks.unpad(values) if predictive.padded else values


def _numbers(values: torch.Tensor) -> Floats:
    found: Floats = values.detach().double().cpu().numpy()
    return found
