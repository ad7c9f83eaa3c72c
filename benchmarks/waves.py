"""The figure of benchmarks/sinusoid.py: how a network turns into a wave, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from hbmeta.fitted import Fitted
from hbmeta.styles import styled, styles_of
from hbmeta.tasks import Tasks

_SHOWN = (0, 1, 10)


@styled
def evolution(
    fits: Mapping[str, Fitted],
    support: Tasks,
    truth: Mapping[str, Tensor],
    errors: Mapping[str, Sequence[tuple[float, float]]],
    steps: Sequence[int],
) -> Figure:
    """Fits (rows) on a middling and a large wave (columns), and the error of all by steps.

    Args:
        fits: of gradient strategies, one row of panels each.
        support: tasks, in the order of `truth`.
        truth: amplitude and phase per task.
        errors: mean and half of its interval for each of `steps`, by name.
        steps: numbers of gradient steps.
    """
    order = truth["amplitude"].argsort()
    chosen = [int(order[int(0.5 * len(order))]), int(order[int(0.95 * len(order))])]
    figure = Figure(figsize=(7.2, 1.75 * len(fits) + 0.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1.0))
    panels = left.subplots(len(fits), 2, squeeze=False, sharex=True, sharey="col")
    shades = mpl.colormaps["viridis"](torch.linspace(0.85, 0.1, len(_SHOWN)).numpy())
    for line, (name, fitted) in zip(panels, fits.items(), strict=True):
        for axis, task in zip(line, chosen, strict=True):
            _waves(axis, fitted, support.select([support.ids[task]]), truth, task, shades)
        line[0].set_ylabel(f"{name}\ny")
    for axis in panels[-1]:
        axis.set_xlabel("x")
    handles, names = panels[0][0].get_legend_handles_labels()
    left.legend(handles, names, loc="outside upper center", ncols=len(names))
    _errors(right.subplots(), errors, steps)
    return figure


def _waves(
    axis: Axes, fitted: Fitted, one: Tasks, truth: Mapping[str, Tensor], task: int, shades: object
) -> None:
    grid = torch.linspace(-5.0, 5.0, 201, dtype=one.dtype)
    wave = truth["amplitude"][task] * torch.sin(grid.double() - truth["phase"][task])
    axis.plot(grid, wave, color="#333333", lw=0.9, ls=(0, (4, 2)), label="the wave", zorder=3)
    inputs = Tasks(grid.reshape(1, -1, 1), ids=one.ids, features=one.features)
    for number, shade in zip(_SHOWN, shades, strict=True):  # type: ignore[call-overload]
        mean = fitted.adapt(one, steps=number).predict(inputs).mean[0]
        label = "start" if number == 0 else f"{number} step{'s' * (number > 1)}"
        axis.plot(grid, mean, color=shade, lw=1.2, label=label)
    assert one.flat_y is not None
    axis.plot(
        one.flat_x[:, 0], one.flat_y, "o", color="black", ms=3.2, mew=0, label="support",
        zorder=4, clip_on=False,
    )  # fmt: skip
    axis.set_xlim(-5.0, 5.0)
    axis.set_xticks([-4, -2, 0, 2, 4])


def _errors(
    axis: Axes, errors: Mapping[str, Sequence[tuple[float, float]]], steps: Sequence[int]
) -> None:
    styles = styles_of(errors)
    for name, found in errors.items():
        colour, marker = styles[name]
        means = [mean for mean, _ in found]
        axis.plot(steps, means, color=colour, marker=marker, ms=3.2, mew=0, lw=1.0, label=name)
        low = [mean - half for mean, half in found]
        high = [mean + half for mean, half in found]
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
    axis.set_yscale("log")
    ticks = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xticks([0, 1, 2, 3, 5, 7, 10])
    axis.set_xlabel("gradient steps on 5 points")
    axis.set_ylabel("squared error on new points")
    handles = [
        Line2D([], [], color=styles[n][0], marker=styles[n][1], ms=3.2, mew=0, lw=1.0, label=n)
        for n in errors
    ]
    # Lines fall from the left: there is room above them on the right.
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.35)
    axis.legend(handles=handles, loc="upper right", borderaxespad=0.0)
