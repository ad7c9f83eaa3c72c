"""Figures of single tasks and of training, one panel per strategy; records in, figure out.

Predictives and posteriors come ready made; nothing is fitted. Each function returns a
`matplotlib.figure.Figure`, as those of `hbmeta.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hbmeta.drawing import View, draw_loss, view_of
from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.marginals import densities
from hbmeta.predictive import Predictive
from hbmeta.styles import class_style, styled, styles_of
from hbmeta.tasks import Tasks

__all__ = ["bands", "densities", "learning_curves", "regions"]

_DARK = "#333333"

Floats = npt.NDArray[np.float64]


@styled
def bands(
    predictives: Mapping[str, Predictive],
    support: Tasks,
    *,
    query: Tasks | None = None,
    truth: Mapping[str, tuple[Any, Any]] | None = None,
    task: Any = None,
    levels: Sequence[float] = (0.5, 0.9),
    labels: tuple[str | None, str | None] = (None, None),
) -> Figure:
    """Predictions of one task along its one feature: mean line and shaded central intervals.

    One column per strategy, all on one y axis. A strategy that runs away does not squeeze the
    others: the axis shows the points and the bulk of the strategies, and says what it cuts off.

    Args:
        predictives: of a grid of x of (among others) this task, by strategy.
        support: what the strategies saw; y as the tasks hold it.
        query: held-out points to draw besides.
        truth: curves (x, y) by the name that they have in the legend, in the units of y.
        task: id of the task; the first of the support by default.
        levels: probabilities of the intervals.
        labels: what x and y are called on the axes; the name of the feature and "y" by default.
    Raises:
        DataError: no predictive, an unknown task, more than one feature, no row on the grid,
            levels outside (0, 1), a curve whose x and y differ in length.
    """
    _check(predictives, "bands")
    task = support.ids[0] if task is None else task
    levels = _levels(levels)
    curves = {name: _curve(name, xy) for name, xy in (truth or {}).items()}
    first = next(iter(predictives.values()))
    points = {
        name: _points(part, task, first)
        for name, part in (("support", support), ("held out", query))
        if part is not None
    }
    found = {name: _bands_of(p, task, levels, name) for name, p in predictives.items()}
    seen = [*(y for _, y in points.values()), *(y for _, y in curves.values())]
    every = np.concatenate(seen) if seen else np.zeros(0)
    keep = (float(every.min()), float(every.max())) if len(every) else None
    low, high = view_of([(float(b.min()), float(b.max())) for _, _, b in found.values()], keep)

    figure, axes = _row_of(len(found), width=2.1, height=2.5)
    colours = styles_of(found)
    for axis, (name, (x, mean, ends)) in zip(axes, found.items(), strict=True):
        colour = colours[name][0]
        for number in range(len(levels)):
            axis.fill_between(x, ends[2 * number], ends[2 * number + 1], color=colour,
                              alpha=0.18 + 0.14 * number, lw=0)  # fmt: skip
        axis.plot(x, mean, color=colour, lw=1.3)
        for number, (_, (at, value)) in enumerate(curves.items()):
            order = np.argsort(at, kind="stable")
            axis.plot(at[order], value[order], color=_DARK, lw=0.8, ls=_DASHES[number % 3])
        for kind, (at, value) in points.items():
            axis.plot(at, value, zorder=4, **_POINTS[kind])
        axis.set_title(name, color=colour)
        axis.set_xlim(float(x.min()), float(x.max()))
        axis.set_ylim(low, high)
        axis.set_xlabel(labels[0] or first.tasks.features[0])
        axis.xaxis.set_major_locator(MaxNLocator(4))
        _say_cut(axis, x, ends, (low, high), colour)
    axes[0].set_ylabel(labels[1] or "y")
    handles: list[Any] = [Line2D([], [], color=_DARK, lw=1.3, label="mean")]
    handles += [
        Patch(color=_DARK, alpha=0.18 + 0.14 * number, lw=0, label=f"{100 * level:g} % interval")
        for number, level in reversed(list(enumerate(levels)))
    ]
    handles += [Line2D([], [], label=kind, **_POINTS[kind]) for kind in points]
    handles += [
        Line2D([], [], color=_DARK, lw=0.8, ls=_DASHES[number % 3], label=name)
        for number, name in enumerate(curves)
    ]
    _legend(figure, handles, len(found), 2.1)
    return figure


_DASHES: Any = ((0, (4, 2)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
_POINTS: dict[str, dict[str, Any]] = {
    "support": {"marker": "o", "ls": "", "color": "black", "ms": 3.2, "mew": 0},
    "held out": {"marker": "x", "ls": "", "color": "#555555", "ms": 3.4, "mew": 0.8},
}


def _bands_of(
    predictive: Predictive, task: Any, levels: Sequence[float], name: str
) -> tuple[Floats, Floats, Floats]:
    """x (n,), mean (n,) and the ends of the intervals (2 × levels, n), sorted by x."""
    rows = _rows(predictive, task, 1, name)
    x = predictive.tasks.flat_x[rows, 0].detach().double().cpu().numpy()
    order = np.argsort(x, kind="stable")
    mean = _flat(predictive, predictive.mean)
    ends = predictive.quantile([p for level in levels for p in (0.5 - level / 2, 0.5 + level / 2)])
    each = [_flat(predictive, end)[rows].numpy()[order] for end in ends]
    if mean.dim() != 1:
        raise DataError(
            "bands",
            needed="one number y per point",
            found=f"vectors of {mean.shape[1]} in {name!r}",
            do="Predict one coordinate at a time.",
        )
    return x[order], mean[rows].numpy()[order], np.stack(each)


def _say_cut(axis: Axes, x: Floats, ends: Floats, view: View, colour: str) -> None:
    """An arrow where the outer interval leaves the axis furthest, at either edge."""
    for marker, place, beyond in (
        ("^", view[1], ends.max(0) - view[1]),
        ("v", view[0], view[0] - ends.min(0)),
    ):
        if float(beyond.max()) > 0.0:
            at = x[int(beyond.argmax())]
            axis.plot([at], [place], marker, color=colour, ms=5, mew=0, clip_on=False, zorder=5)


@styled
def regions(
    predictives: Mapping[str, Predictive],
    support: Tasks,
    *,
    query: Tasks | None = None,
    task: Any = None,
    labels: tuple[str | None, str | None] = (None, None),
) -> Figure:
    """Which class is the most probable one over two features, one column per strategy.

    The hue is that class and fades to white where it is no more probable than all others. Classes
    have the same colour and marker in every figure; people with any common colour blindness can
    tell them apart.

    Args:
        predictives: of a full grid of the two features of (among others) this task, by strategy.
        support: what the strategies saw, drawn as filled markers.
        query: held-out points, drawn as small open markers.
        task: id of the task; the first of the support by default.
        labels: what the features are called on the axes; their names by default.
    Raises:
        DataError: no predictive, an unknown task, other than two features, rows that are no grid.
        UnsupportedModelError: a response that is no class.
    """
    _check(predictives, "regions")
    task = support.ids[0] if task is None else task
    grids = {name: _grid_of(p, task, name) for name, p in predictives.items()}
    shown = {
        kind: _labelled(part, task)
        for kind, part in (("support", support), ("query", query))
        if part is not None
    }
    n_classes = max(p.shape[-1] for _, _, p in grids.values())
    figure, axes = _row_of(len(grids), width=2.2, height=2.6)
    for axis, (name, (x0, x1, p)) in zip(axes, grids.items(), strict=True):
        best, confidence = p.argmax(-1), p.max(-1)
        sure = (confidence - 1.0 / n_classes) / (1.0 - 1.0 / n_classes)
        shade = 0.05 + 0.6 * np.clip(sure, 0.0, 1.0)[..., None]
        hue = np.array([to_rgb(class_style(k)[0]) for k in range(n_classes)])[best]
        axis.pcolormesh(x0, x1, 1.0 - shade * (1.0 - hue), shading="nearest", rasterized=True)
        for k in np.unique(best)[1:]:  # the border of the first is that of the others
            lead = p[..., k] - np.delete(p, k, axis=-1).max(-1)
            axis.contour(x0, x1, lead, levels=[0.0], colors=[_DARK], linewidths=0.5)
        for kind, (x, y) in shown.items():
            for k in np.unique(y):
                axis.plot(*x[y == k].T, **_class_points(int(k), kind), zorder=4)
        axis.set_title(name)
        axis.set_xlim(float(x0.min()), float(x0.max()))
        axis.set_ylim(float(x1.min()), float(x1.max()))
        axis.set_aspect("equal")
        axis.set_xlabel(labels[0] or support.features[0])
        for dimension in (axis.xaxis, axis.yaxis):
            dimension.set_major_locator(MaxNLocator(4))
    axes[0].set_ylabel(labels[1] or support.features[1])
    handles: list[Any] = [
        Line2D([], [], label=f"class {k}", **_class_points(k, "support")) for k in range(n_classes)
    ]
    if "query" in shown:
        handles.append(Line2D([], [], label="held out", **_class_points(0, "query", "#777777")))
    _legend(figure, handles, len(grids), 2.2)
    return figure


def _class_points(label: int, kind: str, colour: str | None = None) -> dict[str, Any]:
    own, marker = class_style(label)
    if kind == "support":
        return {"marker": marker, "ls": "", "mfc": own, "mec": "black", "ms": 4.6, "mew": 0.5}
    return {"marker": marker, "ls": "", "mfc": "none", "mec": colour or own, "ms": 2.8, "mew": 0.6}


def _grid_of(predictive: Predictive, task: Any, name: str) -> tuple[Floats, Floats, Floats]:
    """The two axes (a,), (b,) and the probabilities (b, a, classes) of a full grid."""
    rows = _rows(predictive, task, 2, name)
    x = predictive.tasks.flat_x[rows].detach().double().cpu().numpy()
    x0, at0 = np.unique(x[:, 0], return_inverse=True)
    x1, at1 = np.unique(x[:, 1], return_inverse=True)
    place = at1 * len(x0) + at0
    if (
        len(x0) < 2
        or len(x1) < 2
        or not np.array_equal(np.sort(place), np.arange(len(x0) * len(x1)))
    ):
        raise DataError(
            "regions",
            needed="a full grid: every pair of a value of one feature and one of the other, once",
            found=f"{len(x)} rows of {len(x0)} and {len(x1)} different values in {name!r}",
            do="Predict torch.cartesian_prod(a, b).",
        )
    p = _flat(predictive, predictive.probabilities)[rows].numpy()
    out = np.empty_like(p)
    out[place] = p
    return x0, x1, out.reshape(len(x1), len(x0), -1)


def _labelled(part: Tasks, task: Any) -> tuple[Floats, npt.NDArray[np.int64]]:
    one = part.select([task])
    y = one.flat_y
    if y is None:
        raise DataError("regions", needed="points with y", found="none", do="Pass tasks with y.")
    labels = y.argmax(-1) if y.dim() > 1 else y
    return one.flat_x.detach().double().cpu().numpy(), labels.cpu().numpy().astype(np.int64)


@styled
def learning_curves(fits: Mapping[str, Fitted], window: int | None = None) -> Figure:
    """Training loss against the step: each step faint, and its running mean, one panel per fit.

    Losses of different strategies are different quantities, so that each has an axis of its own.
    Fits that do not train step by step are left out.

    Args:
        fits: by name.
        window: steps in the running mean; a fiftieth of all by default.
    Raises:
        DataError: no fit has a history, or the window is longer than one.
    """
    trained = {name: fitted for name, fitted in fits.items() if len(fitted.history)}
    if not trained:
        raise DataError(
            "learning_curves",
            needed="a fit with a training history",
            found=", ".join(fits) or "no fit",
            do="Pass a fit of MAML, AmortizedGuide or another trained strategy.",
        )
    shortest = min(len(fitted.history) for fitted in trained.values())
    if window is not None and not 1 <= window <= shortest:
        raise DataError(
            "learning_curves",
            needed=f"window from 1 to {shortest}",
            found=f"{window}",
            do="Lower it.",
        )
    columns = min(len(trained), 3)
    lines = math.ceil(len(trained) / columns)
    figure = Figure(figsize=(2.5 * columns + 0.3, 1.9 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    colours = styles_of(trained)
    for axis, (name, fitted) in zip(axes.flat, trained.items(), strict=False):
        width = window or max(1, len(fitted.history) // 50)
        draw_loss(axis, fitted, width, colours[name][0])
        axis.set_title(f"{name}, mean of {width} steps", color=colours[name][0])
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5))
    for axis in axes.flat[len(trained) :]:
        axis.remove()
    figure.supxlabel("training step", fontsize=8)
    figure.supylabel("training loss per task (nats)", fontsize=8)
    return figure


# What comes in, and where it goes


def _check(given: Mapping[str, Any], where: str) -> None:
    if not given:
        raise DataError(where, needed="one or more by name", found="none", do="Pass a mapping.")
    values = given if isinstance(given, Mapping) else {"": given}
    other = [
        f"{type(v).__name__} {n!r}" for n, v in values.items() if not isinstance(v, Predictive)
    ]
    if other or not isinstance(given, Mapping):
        raise DataError(
            where,
            needed="predictives by name",
            found=other[0] if other else type(given).__name__,
            do='Pass {"a": posterior.predict(grid)}; of a fit, posterior = fitted.adapt(support).',
        )


def _levels(given: Any) -> list[float]:
    """Probabilities of intervals, the widest first."""
    try:
        levels = sorted((float(level) for level in given), reverse=True)
    except (TypeError, ValueError):
        levels = [math.nan]
    if not all(0.0 < level < 1.0 for level in levels):
        raise DataError(
            "bands", needed="levels between 0 and 1", found=f"{given!r}", do="Pass (0.5, 0.9)."
        )
    return levels


def _rows(predictive: Predictive, task: Any, n_features: int, name: str) -> Tensor:
    """Positions of the flat rows of a task, whose tasks must have so many features."""
    tasks = predictive.tasks
    rows = (tasks.task == tasks.position(task)).nonzero()[:, 0].cpu()
    if len(tasks.features) != n_features or not len(rows):
        raise DataError(
            "a figure of predictions",
            needed=f"rows of task {task!r} on a grid of {n_features} features",
            found=f"{len(rows)} rows of {len(tasks.features)} features in {name!r}",
            do="Predict Tasks(grid, ids=posterior.ids) with posterior.predict.",
        )
    return rows


def _flat(predictive: Predictive, values: Tensor) -> Tensor:
    rows = predictive.tasks.unpad(values) if predictive.padded else values
    return rows.detach().double().cpu()


def _points(part: Tasks, task: Any, predictive: Predictive) -> tuple[Floats, Floats]:
    """x and y of a task, y in the units of the predictive."""
    one = part.select([task])
    if one.flat_y is None:
        raise DataError("bands", needed="points with y", found="none", do="Pass tasks with y.")
    y = predictive.location + predictive.scale * one.flat_y.double()
    return one.flat_x[:, 0].detach().double().cpu().numpy(), y.cpu().numpy()


def _curve(name: str, pair: tuple[Any, Any]) -> tuple[Floats, Floats]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        found = f"{type(pair).__name__} for {name!r}"
    else:
        at, value = (
            np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v, dtype=float).reshape(-1)
            for v in pair
        )
        if at.shape == value.shape and len(at) and np.isfinite([*at, *value]).all():
            return at, value
        found = f"{len(at)} and {len(value)} numbers, or some not finite, in {name!r}"
    raise DataError(
        "bands",
        needed="curves of finite x and y of one length",
        found=found,
        do='Pass truth={"f": (x, y)}.',
    )


def _row_of(n: int, *, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * n + 0.5, height), layout="constrained")
    return figure, figure.subplots(1, n, sharex=False, sharey=True, squeeze=False)[0]


def _legend(figure: Figure, handles: Sequence[Any], n: int, width: float) -> None:
    """Above the panels, in as many columns as fit."""
    columns = max(2, min(len(handles), int((width * n + 0.5) / 0.95)))
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns,
                  columnspacing=1.2, handletextpad=0.5)  # fmt: skip
