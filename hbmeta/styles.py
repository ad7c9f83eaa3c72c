"""How the figures look: colours and markers by strategy, sizes, lines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["GREY", "STYLES", "class_style", "styled", "styles_of"]

# Okabe and Ito's colours, which people with any common colour blindness tell apart. Names that
# begin like these keep their colour and marker in every figure; others take the spare ones.
STYLES = {
    "nuts": ("#000000", "o"),
    "amortized": ("#0072B2", "s"),
    "maml": ("#D55E00", "D"),
    "exact": ("#009E73", "^"),
    "nopooling": ("#999999", "v"),
    "completepooling": ("#CC79A7", "X"),
}
_SPARE = (
    ("#E69F00", "P"),
    ("#56B4E9", "<"),
    ("#B79F00", ">"),
    ("#7A4FA3", "p"),
    ("#8C564B", "h"),
    ("#882255", "*"),
)

# Classes have the eight of Okabe and Ito in an order that keeps the first five far apart also in
# print; the markers run through seven, so that 56 classes differ in one or the other.
_CLASSES = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#B79F00",
    "#000000",
)
_CLASS_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_SETTINGS: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.dpi": 200,
    "axes.unicode_minus": True,
}
GREY = "#BBBBBB"

Parameters = ParamSpec("Parameters")


def styled(function: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw with the settings above, and leave the caller's as they were."""

    @functools.wraps(function)
    def draw(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with mpl.rc_context(_SETTINGS):
            figure = function(*args, **kwargs)
            figure.draw_without_rendering()  # ticks take their settings when they are first drawn
            return figure

    return draw


def class_style(label: int) -> tuple[str, str]:
    """The colour and the marker of a class, the same in every figure."""
    return _CLASSES[label % len(_CLASSES)], _CLASS_MARKERS[label % len(_CLASS_MARKERS)]


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker per name, the same in every figure for the names of STYLES."""
    out: dict[str, tuple[str, str]] = {}
    spare = 0
    for name in names:
        plain = "".join(c for c in name.lower() if c.isalnum())
        known = next((style for key, style in STYLES.items() if plain.startswith(key)), None)
        if known is None or known in out.values():
            known = _SPARE[spare % len(_SPARE)]
            spare += 1
        out[name] = known
    return out
