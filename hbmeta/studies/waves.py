"""Figures of gradient-based adaptation; everything was fitted before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from hbmeta.fitted import Fitted
from hbmeta.styles import styled, styles_of
from hbmeta.tasks import Episode, Tasks

__all__ = ["adaptation", "error_by_step", "grid_of"]


def grid_of(low: float, high: float, points: int) -> Tensor:
    """Evenly spaced inputs, float64."""
    return torch.linspace(low, high, points, dtype=torch.float64)


@styled
def adaptation(
    fitted: Fitted,
    support: Tasks,
    curves: Mapping[Any, tuple[Tensor, Tensor]],
    steps: Sequence[int],
) -> Figure:
    """The fitted function on its way from the common start, after several numbers of steps.

    Args:
        fitted: a fit of MAML.
        support: tasks of one feature; one panel each.
        curves: the truth (x, y) of each task by id; x is where the function is drawn.
        steps: numbers of inner steps.
    """
    shades = mpl.colormaps["viridis"](torch.linspace(0.9, 0.05, len(steps)).numpy())
    n = support.n_tasks
    figure = Figure(figsize=(3.0 * n + 0.4, 2.7), layout="constrained")
    axes = figure.subplots(1, n, squeeze=False)[0]
    for axis, task in zip(axes, support.ids, strict=True):
        one = support.select([task])
        x, y = curves[task]
        axis.plot(x, y, color="#333333", lw=0.9, ls=(0, (4, 2)), label="the wave", zorder=3)
        grid = Tasks(x.reshape(1, -1, 1), ids=one.ids, features=one.features)
        for number, shade in zip(steps, shades, strict=True):
            mean = fitted.adapt(one, steps=number).predict(grid).mean[0]
            label = "start" if number == 0 else f"{number} step{'s' * (number > 1)}"
            axis.plot(x, mean, color=shade, lw=1.2, label=label)
        assert one.flat_y is not None
        axis.plot(
            one.flat_x[:, 0], one.flat_y, "o", color="black", ms=3.5, mew=0, label="support",
            zorder=4, clip_on=False,
        )  # fmt: skip
        axis.set_xlim(float(x.min()), float(x.max()))
        axis.set_xlabel("x")
    axes[0].set_ylabel("y")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


@styled
def error_by_step(
    fits: Mapping[str, Fitted],
    test: Episode,
    steps: Sequence[int],
    among: Iterable[str] = (),
) -> Figure:
    """Mean squared error on the query after so many inner steps, mean over tasks ± 1 s.e.

    Args:
        fits: fits of MAML by name.
        test: tasks with support and query.
        steps: numbers of inner steps, rising from 0.
        among: names of all fits of the study, to give each its colour in the other figures.
    """
    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    axis = figure.subplots()
    styles = styles_of([*dict.fromkeys([*among, *fits])])
    y = test.query.flat_y
    assert y is not None
    for name, fitted in fits.items():
        means, errors = [], []
        for number in steps:
            found = fitted.adapt(test.support, steps=number).predict(test.query).mean
            squared = (test.query.unpad(found) - y.to(found)).square()
            total = torch.zeros(test.query.n_tasks, dtype=squared.dtype)
            each = total.index_add(0, test.query.task, squared) / test.query.counts
            means.append(float(each.mean()))
            errors.append(float(each.std()) / len(each) ** 0.5)
        colour, marker = styles[name]
        axis.errorbar(
            steps, means, errors, color=colour, marker=marker, ms=3.5, mew=0, lw=1.0, label=name
        )
    axis.set_xscale("symlog", linthresh=1.0, linscale=0.6)
    axis.set_yscale("log")
    shown = [number for number in steps if number in (0, 1, 2, 5, 10, 20, 50, 100, 200)]
    axis.set_xticks(shown, [str(number) for number in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("gradient steps on the support")
    axis.set_ylabel("mean squared error on the query")
    figure.legend(loc="outside upper center", ncols=len(fits))
    return figure
