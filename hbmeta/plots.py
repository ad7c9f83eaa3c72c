"""Figures of posteriors, comparisons and fits; records in, figure out, nothing is fitted.

Each function returns a `matplotlib.figure.Figure`, made without pyplot and its global state. To
save one: `with hbmeta.files.atomic("forest.png") as path: figure.savefig(path)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hbmeta.drawing import common_site, coordinate_name, coordinate_values, draw_loss
from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior
from hbmeta.records import Comparison
from hbmeta.scores import weighted_quantile
from hbmeta.styles import GREY, STYLES, styled, styles_of

__all__ = ["forest", "loss", "scores", "shrinkage"]

_ROWS_PER_COLUMN = 45
# Tasks that have room for their names below an axis.
_NAMED = 30

Floats = npt.NDArray[np.float64]


@styled
def forest(
    posteriors: Mapping[str, TaskPosterior],
    site: str | None = None,
    coordinate: int = 0,
    ids: Iterable[Any] | None = None,
    interval: float = 0.9,
    *,
    reference: str | None = None,
    label: str | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> Figure:
    """Posterior mean and central interval of one coordinate, per task, approximations side by side.

    Tasks stand in the order of the reference's mean. Lists of more than 45 go into columns.

    Args:
        posteriors: posteriors of the same tasks, by name.
        site: local site; by default the first that all have in common, computed ones first.
        coordinate: index into the flattened site.
        ids: tasks to show; all by default.
        interval: probability of the interval; posteriors that are points have none.
        reference: the posterior that sets the order; the first by default.
        label: what the coordinate is called on the axis.
        draws: draws behind each interval.
        seed: of those draws.
    Raises:
        DataError: no posterior, an unknown site, coordinate, reference or task.
    """
    if not posteriors:
        raise DataError("forest", needed="a posterior or more", found="none", do="Pass a mapping.")
    first = next(iter(posteriors)) if reference is None else reference
    if first not in posteriors:
        raise DataError(
            "forest",
            needed=f"reference as one of {', '.join(map(repr, posteriors))}",
            found=repr(first),
            do="Correct the name.",
        )
    chosen = tuple(posteriors[first].ids if ids is None else ids)
    site = common_site(posteriors.values(), site, "forest")
    summaries = {
        name: _summary(posterior.select(chosen), site, coordinate, interval, draws, seed)
        for name, posterior in posteriors.items()
    }
    order = np.argsort(summaries[first][0], kind="stable")
    n_columns = math.ceil(len(chosen) / _ROWS_PER_COLUMN)
    per_column = math.ceil(len(chosen) / n_columns)
    row_height = max(0.16, 0.045 * (len(posteriors) + 1))
    figure = Figure(
        figsize=(3.6 * n_columns + 0.4, row_height * per_column + 1.0), layout="constrained"
    )
    axes = figure.subplots(1, n_columns, sharex=True, squeeze=False)[0]
    styles = styles_of(posteriors)
    for column, axis in enumerate(axes):
        # The last task of the order stands at the top of the first column.
        rows = order[::-1][column * per_column : (column + 1) * per_column]
        place = np.arange(len(rows))[::-1].astype(float)
        for y in place[::2]:  # bands tie the marks of a task to its label
            axis.axhspan(y - 0.5, y + 0.5, color="#F3F3F3", lw=0, zorder=0)
        for number, (name, (mean, low, high)) in enumerate(summaries.items()):
            colour, marker = styles[name]
            # Spread over 0.7 of a row, the first approximation on top.
            shift = 0.7 * (0.5 - (number + 0.5) / len(summaries))
            y = place + shift
            if (high > low).any():
                axis.hlines(y, low[rows], high[rows], color=colour, lw=0.8, alpha=0.9)
            axis.plot(mean[rows], y, marker, color=colour, ms=2.6, mew=0.0, label=name)
        axis.set_yticks(place, [str(chosen[row]) for row in rows])
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(-0.7 - (per_column - len(rows)), len(rows) - 0.3)
        axis.set_xlabel(label or coordinate_name(site, coordinate, posteriors[first]))
        axis.xaxis.set_major_locator(MaxNLocator(5))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=min(len(names), 3 * n_columns),
        title=f"mean and central {100 * interval:g} % interval",
        markerscale=1.6,
    )
    return figure


@styled
def shrinkage(
    no_pooling: TaskPosterior,
    complete_pooling: TaskPosterior | None,
    pooled: TaskPosterior,
    site: str | None = None,
    coordinate: int | Sequence[int] = 0,
    interval: float = 0.9,
    *,
    label: str | Sequence[str] | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> Figure:
    """Partial pooling: how far each task's estimate moves from its own towards that of all.

    A thin line leads from each task's own estimate to the partially pooled one. Tasks stand in the
    order of their number of support points and, within it, of the pooled mean of the first
    coordinate. Own estimates that run away (a task of one point) do not squeeze the axis: an arrow
    at its edge stands for each. Tasks without support are left out. The effect of columns that are
    constant within tasks is part of a task's own estimate.

    Args:
        no_pooling: each task alone (`NoPooling`).
        complete_pooling: one φ for all (`CompletePooling`), drawn as a line; None leaves it out.
        pooled: the hierarchical posterior, of the same tasks.
        site: local site; by default the first that all have in common, computed ones first.
        coordinate: index into the flattened site; several have a panel each.
        interval: probability of the central intervals of `pooled`.
        label: what the coordinate is called on the axis; one for each of several.
        draws: draws behind each interval.
        seed: of those draws.
    Raises:
        DataError: posteriors of different tasks, an unknown site or coordinate, no support.
    """
    every = [no_pooling, pooled, *([] if complete_pooling is None else [complete_pooling])]
    if any(set(p.ids) != set(pooled.ids) for p in every):
        raise DataError(
            "shrinkage",
            needed="posteriors of the same tasks",
            found=" and ".join(f"{len(p.ids)} tasks" for p in every),
            do="Use posterior.select(ids).",
        )
    site = common_site(every, site, "shrinkage")
    chosen = [coordinate] if isinstance(coordinate, int) else list(coordinate)
    named = [label] if label is None or isinstance(label, str) else list(label)
    counts = pooled.support.counts.cpu().numpy()
    used = np.flatnonzero(counts > 0)
    if not len(used) or not chosen:
        raise DataError(
            "shrinkage",
            needed="a task with support, and a coordinate",
            found=f"{len(used)} tasks with support, {len(chosen)} coordinates",
            do="Adapt to data first; leave coordinate out for the first.",
        )
    alone, found = no_pooling.select(pooled.ids), list[tuple[Floats, Floats, Floats]]()
    for c in chosen:
        found.append(_summary(pooled, site, c, interval, draws, seed))
    order = used[np.lexsort((found[0][0][used], counts[used]))]
    height = 3.4 if len(chosen) == 1 else 2.1 * len(chosen) + 0.9
    figure = Figure(figsize=(6.0, height), layout="constrained")
    axes = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axis, c) in enumerate(zip(axes, chosen, strict=True)):
        own = _summary(alone, site, c, interval, draws, seed)[0]
        mean, low, high = found[number]
        _pooling(axis, own[order], mean[order], low[order], high[order], interval)
        if complete_pooling is not None:
            same = _summary(complete_pooling, site, c, interval, draws, seed)[0].mean()
            colour, _ = STYLES["completepooling"]
            axis.axhline(
                same, color=colour, lw=1.0, ls=(0, (4, 2)), label="complete pooling", zorder=1
            )
        axis.set_ylabel(named[number] if number < len(named) and named[number] else
                        coordinate_name(site, c, pooled))  # fmt: skip
    _name_tasks(axes[-1], [str(pooled.ids[i]) for i in order], counts[order])
    handles = {one.get_label(): one for axis in axes for one in axis.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=4,
        markerscale=1 / _size_of_marks(len(order)),
    )
    return figure


@styled
def scores(comparison: Comparison) -> Figure:
    """NLL, its paired difference and the distance to the reference, by fit; bars are ± 1 s.e."""
    rows = comparison.rows
    shown = ["nll"] + ["difference"] * (comparison.baseline is not None)
    shown += ["distance"] * any(row.distance is not None for row in rows)
    figure = Figure(figsize=(2.5 * len(shown) + 0.6, 0.24 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    panel = dict(zip(shown, axes, strict=True))
    styles = styles_of([row.name for row in rows])
    place = np.arange(len(rows))[::-1]
    for y, row in zip(place, rows, strict=True):
        colour, marker = styles[row.name]
        nll = row.scores["nll"]
        _dot(panel["nll"], nll.value, y, nll.standard_error, colour, marker)
        if nll.difference is not None and nll.difference_error is not None:
            _dot(panel["difference"], nll.difference, y, nll.difference_error, colour, marker)
        if row.distance is not None:
            _dot(panel["distance"], row.distance.mean_difference, y, math.nan, colour, marker)
        if row.distance_given_theta is not None and "distance" in panel:
            d = row.distance_given_theta.mean_difference
            panel["distance"].plot(d, y, marker, mfc="white", mec=colour, mew=0.8, ms=4, zorder=2)
    panel["nll"].set_xlabel("NLL per held-out point (nats)")
    if "difference" in panel:
        panel["difference"].axvline(0.0, color=GREY, lw=0.8, zorder=0)
        panel["difference"].set_xlabel(f"NLL − NLL of {comparison.baseline}")
    if "distance" in panel:
        axis = panel["distance"]
        axis.set_xlabel(
            f"mean |difference| to {comparison.reference} (sd)\nopen: given the fit's θ"
        )
        axis.set_xlim(left=min(0.0, -0.03 * axis.get_xlim()[1]))
    axes[0].set_yticks(place, [row.name for row in rows])
    axes[0].set_ylim(-0.6, len(rows) - 0.4)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#EEEEEE", lw=0.5)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    figure.suptitle(
        f"{len(comparison.ids)} tasks, {sum(comparison.points)} held-out points; "
        "bars: ± 1 standard error",
        fontsize=8,
    )
    return figure


@styled
def loss(fitted: Fitted, window: int | None = None) -> Figure:
    """The training loss of each step and its running mean.

    Args:
        fitted: a fit by gradient descent.
        window: steps in the running mean; a fiftieth of all by default.
    Raises:
        DataError: the strategy has no history, or the window is not within it.
    """
    history = np.asarray(fitted.history, dtype=float)
    if not len(history):
        raise DataError(
            "loss",
            needed="a fit with a training history",
            found=f"{fitted.strategy.name}, which does not train step by step",
            do="Plot a fit of MAML, AmortizedGuide or another trained strategy.",
        )
    width = max(1, len(history) // 50) if window is None else window
    if not 1 <= width <= len(history):
        raise DataError(
            "loss", needed=f"window from 1 to {len(history)}", found=f"{window}", do="Lower it."
        )
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axis = figure.subplots()
    draw_loss(axis, fitted, width, styles_of([fitted.strategy.name])[fitted.strategy.name][0])
    axis.set_xlabel("training step")
    axis.set_ylabel("training loss, mean over tasks (nats)")
    figure.legend(loc="outside upper center", ncols=2, title=fitted.strategy.name)
    return figure


def _dot(axis: Axes, x: float, y: float, error: float, colour: str, marker: str) -> None:
    if math.isfinite(error):
        axis.hlines(y, x - error, x + error, color=colour, lw=1.0)
    axis.plot(x, y, marker, color=colour, ms=4, mew=0, zorder=3)


def _clip(axis: Axes, x: Floats, alone: Floats, pooled: Floats, colour: str) -> None:
    """An axis that shows the bulk, and an arrow at its edge for each estimate that lies beyond.

    Beyond is what is further from the median than 10 median absolute deviations (6.7 standard
    deviations of a Normal) and than the width of all that is pooled.
    """
    finite = alone[np.isfinite(alone)]
    middle = float(np.median(finite)) if len(finite) else 0.0
    deviation = float(np.median(np.abs(finite - middle))) if len(finite) else 0.0
    reach = max(10.0 * deviation, float(np.ptp(pooled)))
    away = ~(np.abs(alone - middle) <= reach)
    if not away.any():
        return
    seen = np.concatenate([alone[~away], pooled])
    low, high = float(seen.min()), float(seen.max())
    room = 0.08 * (high - low)
    axis.set_ylim(low - room, high + room)
    for marker, edge, chosen in (
        ("^", high + 0.6 * room, away & (alone > middle)),
        ("v", low - 0.6 * room, away & (alone < middle)),
    ):
        axis.plot(x[chosen], np.full(chosen.sum(), edge), marker, color=colour, ms=4, mew=0)
    label = f"no pooling, off the axis ({away.sum()})"
    axis.plot([], [], "^", color=colour, ms=4, mew=0, label=label)


def _summary(
    posterior: TaskPosterior, site: str, coordinate: int, interval: float, draws: int, seed: int
) -> tuple[Floats, Floats, Floats]:
    """Mean, lower and upper end (tasks,) of one coordinate of a site."""
    if not 0.0 < interval < 1.0:
        raise DataError(
            "interval", needed="a probability between 0 and 1", found=f"{interval}", do="Pass 0.9."
        )
    value, weights = coordinate_values(posterior, site, coordinate, draws, seed)
    low, high = weighted_quantile(value, [0.5 - interval / 2, 0.5 + interval / 2], weights)
    mean = posterior.moments(draws, seed)[site][0].double().cpu().reshape(value.shape[1], -1)
    return mean[:, coordinate].numpy(), low.numpy(), high.numpy()


def _pooling(
    axis: Axes, alone: Floats, mean: Floats, low: Floats, high: Floats, interval: float
) -> None:
    """Own and pooled estimates of tasks side by side; marks get smaller where there are many."""
    x = np.arange(len(mean), dtype=float)
    size = _size_of_marks(len(x))
    axis.vlines(x, mean, alone, color=GREY, lw=0.5, zorder=1)
    grey, _ = STYLES["nopooling"]
    axis.plot(
        x, alone, "o", mfc="white", mec=grey, mew=0.7 * size, ms=3.2 * size, label="no pooling",
        zorder=2,
    )  # fmt: skip
    _clip(axis, x, alone, np.concatenate([low, high, mean]), grey)
    blue, _ = STYLES["amortized"]
    axis.vlines(x, low, high, color=blue, lw=0.8 * size, alpha=0.6, zorder=3)
    text = "partial pooling"
    if (high > low).any():
        text += f", {100 * interval:g} % interval"
    axis.plot(x, mean, "o", color=blue, ms=2.8 * size, mew=0, label=text, zorder=4)


def _size_of_marks(n_tasks: int) -> float:
    return min(1.0, math.sqrt(100 / n_tasks))


def _name_tasks(axis: Axes, names: list[str], counts: npt.NDArray[np.int64]) -> None:
    """Few tasks by name; of many, how many points the tasks of a stretch have."""
    last, same = len(names) - 1, counts[0] == counts[-1]
    axis.set_xlim(-0.02 * last - 0.5, 1.02 * last + 0.5)
    points = f"{counts[0]} support points in each task" if same else "support points in the task"
    if len(names) <= _NAMED:
        short = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
        shown = short if same else [f"{n} ({k})" for n, k in zip(short, counts, strict=True)]
        axis.set_xticks(range(len(names)), shown, rotation=90)
        axis.set_xlabel(points if same else f"task ({points})")
        return
    if same:
        axis.set_xticks([])
        axis.set_xlabel(f"{len(names)} tasks, {points}")
        return
    sizes, first = np.unique(counts, return_index=True)
    ends = np.append(first[1:], len(counts)) - 1
    ticks: list[tuple[float, str]] = []
    for size, start, stop in zip(sizes, first, ends, strict=True):
        middle = (start + stop) / 2
        # Labels of sizes that few tasks have would run into each other.
        if not ticks or middle - ticks[-1][0] > 0.04 * len(counts):
            ticks.append((middle, str(size)))
    axis.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    axis.set_xticks(first[1:] - 0.5, minor=True)
    axis.tick_params(axis="x", which="major", length=0)
    axis.set_xlabel(f"{points}: {len(names)} tasks in this order")
