"""Figures of simulation-based calibration: rank histograms and ECDFs with their bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from hbmeta.calibration import Calibration, Ranks, chi_squared, envelope
from hbmeta.errors import DataError
from hbmeta.styles import GREY, styled

__all__ = ["rank_plots"]

_LINE, _BAD = "#0072B2", "#D55E00"


@styled
def rank_plots(
    calibration: Calibration, *, names: Sequence[str] | None = None, alpha: float = 0.01
) -> Figure:
    """For each quantity the histogram of its ranks, and its ECDF less that of uniform ranks.

    Grey is where uniform ranks stay: each bar by itself in the histogram, the whole curve in the
    ECDF, with probability 1 − alpha over the number of quantities. What leaves its band is red. A
    histogram like ∪ means a posterior that is too narrow, like ∩ one that is too wide.

    Args:
        calibration: the record.
        names: which quantities; the first eight by default.
        alpha: false-alarm rate of all quantities of the record together.
    Raises:
        DataError: no quantity, or an unknown one.
    """
    known = {quantity.name: quantity for quantity in calibration.quantities}
    chosen = list(known)[:8] if names is None else list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise DataError(
            "rank_plots",
            needed=f"names of quantities among {', '.join(known) or 'none'}",
            found=", ".join(map(repr, unknown)) or "none",
            do="Leave names out to see the first eight.",
        )
    level = alpha / len(known)
    figure = Figure(figsize=(1.75 * len(chosen) + 0.5, 3.2))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for column, name in enumerate(chosen):
        _histogram(axes[0, column], known[name], level)
        _ecdf(axes[1, column], known[name], level)
        axes[0, column].set_title(name if len(name) < 28 else f"{name[:26]}…")
    axes[0, 0].set_ylabel("simulations")
    axes[1, 0].set_ylabel("ECDF − uniform")
    return figure


def _histogram(axis: Axes, quantity: Ranks, level: float) -> None:
    ranks, draws = np.asarray(quantity.ranks), quantity.draws
    _, bins, p = chi_squared(ranks, draws)
    counts = np.bincount(ranks * bins // (draws + 1), minlength=bins)
    # Bars are judged one by one: level / bins for each.
    low, high = stats.binom(len(ranks), 1 / bins).interval(1 - level / bins)
    axis.axhspan(low, high, color=GREY, alpha=0.5, linewidth=0)
    colour = _BAD if p < level else _LINE
    axis.bar(np.arange(bins) + 0.5, counts, width=0.9, color=colour)
    axis.set_xticks([0, bins], ["0", str(draws)])
    axis.set_xlabel("rank")


def _ecdf(axis: Axes, quantity: Ranks, level: float) -> None:
    ranks, draws = np.sort(np.asarray(quantity.ranks)), quantity.draws
    number = len(ranks)
    band = envelope(number, draws, level)
    z = band.at / (draws + 1)
    axis.fill_between(
        [0, *z, 1], [0, *(band.low / number - z), 0], [0, *(band.high / number - z), 0],
        color=GREY, alpha=0.5, linewidth=0,
    )  # fmt: skip
    counts = np.searchsorted(ranks, band.at, side="left")
    out = bool(((counts < band.low) | (counts > band.high)).any())
    axis.plot([0, *z, 1], [0, *(counts / number - z), 0], color=_BAD if out else _LINE, lw=1.2)
    widest = 1.3 * max(math.sqrt(0.25 / number) * 4, float(np.abs(counts / number - z).max()))
    axis.set_ylim(-widest, widest)
    axis.set_xlabel("share of the draws")
