"""The picture a person chooses by: what an approximation costs, and how far off it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hbmeta.styles import GREY, styled

Point = tuple[float, float]
# Beyond these distances a mark stands at the edge, as a caret.
LEAST, MOST = 3e-3, 30.0
SPREAD, SINGLE, TRUTH = "#0072B2", "#D55E00", "#000000"
# Discs nearer than this, in points, are moved apart.
_APART = 11.0


@styled
def time_against_distance(
    points: Mapping[str, Sequence[Point]], singles: Collection[str] = ()
) -> Figure:
    """One dot per strategy and program, one numbered disc per strategy at its medians.

    Args:
        points: (seconds, distance in reference sds) of each program, by strategy.
        singles: the strategies whose φ is a point.
    """
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axis, names = figure.subplots(1, 2, width_ratios=(4.2, 1))
    axis.set(xscale="log", yscale="log", ylim=(LEAST * 0.8, MOST * 1.3))
    axis.set_xlabel("processor seconds to fit and to adapt")
    axis.set_ylabel("distance to the reference (W2 per coordinate, in its sds)")
    axis.grid(color="#EEEEEE", lw=0.5)
    axis.set_axisbelow(True)
    axis.axhline(0.1, color=GREY, lw=0.8, zorder=0)
    medians = {name: tuple(np.median(points[name], 0)) for name in points}
    order = sorted(medians, key=lambda name: medians[name][1])
    colours = {name: SINGLE if name in singles else SPREAD for name in order}
    colours |= dict.fromkeys(["NUTS"], TRUTH)
    for name in order:
        x, y = np.array(points[name]).T
        inside = np.clip(y, LEAST, MOST)
        for shown, marker in ((y <= MOST, "."), (y > MOST, "^")):
            axis.plot(
                x[shown], inside[shown], marker, ms=3.5, color=colours[name], alpha=0.3, mew=0
            )
    axis.margins(x=0.06)
    _discs(figure, axis, [(*medians[name], colours[name]) for name in order])
    _legend(names, order, colours)
    return figure


def _discs(figure: Figure, axis: Axes, marks: Sequence[tuple[float, float, str]]) -> None:
    """Numbered discs at the medians; those that would lie on each other are moved apart."""
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    place = np.clip([mark[:2] for mark in marks], (0, LEAST), (np.inf, MOST))
    home = axis.transData.transform(place) / pixels
    moved = home.copy()
    for _ in range(200):
        between = moved[:, None] - moved[None]
        far = np.hypot(*between.transpose(2, 0, 1))
        np.fill_diagonal(far, np.inf)
        push = np.clip(_APART - far, 0, None) / 2
        if not push.any():
            break
        # Two at the very same place part along a line of their own.
        angle = np.arange(len(moved))
        tie = np.stack([np.cos(angle), np.sin(angle)], -1)[:, None] - np.zeros_like(between)
        along = np.where(far[..., None] > 1e-6, between / np.maximum(far, 1e-6)[..., None], tie)
        moved += 0.5 * (push[..., None] * along).sum(1)
    back = axis.transData.inverted()
    for number, ((_, _, colour), at, to) in enumerate(zip(marks, home, moved, strict=True), 1):
        (x, y), (x_home, y_home) = back.transform(to * pixels), back.transform(at * pixels)
        axis.plot([x_home, x], [y_home, y], color=colour, lw=0.5)
        axis.plot(x, y, "o", ms=_APART - 1, color=colour, mec="white", mew=0.6, zorder=3)
        axis.text(x, y, str(number), ha="center", va="center_baseline", fontsize=6, color="white",
                  fontweight="bold", zorder=4)  # fmt: skip


def _legend(axis: Axes, order: Sequence[str], colours: Mapping[str, str]) -> None:
    """The names by number, the nearest first, and what the colours and marks mean."""
    axis.axis("off")
    for row, name in enumerate(order):
        height = 1 - row / 27
        axis.text(0.08, height, str(row + 1), fontsize=7, ha="right", va="top",
                  color=colours[name], fontweight="bold", transform=axis.transAxes)  # fmt: skip
        axis.text(0.14, height, name, fontsize=7, va="top", transform=axis.transAxes)
    notes = (
        (SPREAD, "a spread"),
        (SINGLE, "a point"),
        (GREY, "dots: one program each"),
        (GREY, f"carets: above {MOST:g}"),
    )
    for row, (colour, text) in enumerate(notes):
        axis.text(0.0, 0.1 - row / 27, text, fontsize=7, va="top", color=colour,
                  transform=axis.transAxes)  # fmt: skip
