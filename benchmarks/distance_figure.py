"""The picture a person chooses by: what an approximation costs, and how far off it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from hbmeta.styles import GREY, styled, styles_of

Point = tuple[float, float]
# Where a label may stand around its mark, in points, the best first.
_AROUND = [
    (side * (5 + 6 * far), up * (1 + 5 * far))
    for far in range(8)
    for side, up in ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]


@styled
def time_against_distance(points: Mapping[str, Sequence[Point]]) -> Figure:
    """One small mark per strategy and program, one large one with a label at the medians.

    Args:
        points: (seconds, distance in reference sds) of each program, by strategy.
    """
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("seconds to fit and to adapt")
    axis.set_ylabel("distance to the reference (W2 per coordinate, in its sds)")
    axis.grid(color="#EEEEEE", lw=0.5)
    axis.set_axisbelow(True)
    axis.axhline(0.1, color=GREY, lw=0.8, zorder=0)
    centres = {}
    for name, (colour, marker) in styles_of(points).items():
        x, y = np.array(points[name]).T
        axis.plot(x, y, marker, ms=3, mfc="none", mec=colour, mew=0.6, alpha=0.6, zorder=2)
        centres[name] = (float(np.median(x)), float(np.median(y)), colour)
        axis.plot(*centres[name][:2], marker, ms=7, color=colour, mec="white", mew=0.7, zorder=3)
    axis.margins(x=0.12)
    _label(figure, axis, centres)
    figure.suptitle("small: one program each; large: the median over programs", fontsize=8)
    return figure


def _label(figure: Figure, axis: Axes, centres: Mapping[str, tuple[float, float, str]]) -> None:
    """A name beside each large mark, where it covers neither another name nor a large mark."""
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    where = {k: axis.transData.transform(centre[:2]) for k, centre in centres.items()}
    taken = [Bbox.from_bounds(x - 4 * pixels, y - 4 * pixels, 8 * pixels, 8 * pixels)
             for x, y in where.values()]  # fmt: skip
    frame = axis.get_window_extent()
    for name, (x, y, colour) in sorted(centres.items(), key=lambda item: item[1][1]):
        for number, (right, up) in enumerate(_AROUND):
            text = axis.annotate(
                name,
                (x, y),
                (right, up),
                textcoords="offset points",
                ha="left" if right > 0 else "right",
                va="center",
                fontsize=6.5,
                color=colour,
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour} if number > 5 else None,
            )
            box = Bbox(text.get_window_extent().get_points())
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0
            free = not any(box.overlaps(other) for other in taken)
            if (inside and box.y1 < frame.y1 and free) or number == len(_AROUND) - 1:
                taken.append(box)
                break
            text.remove()
