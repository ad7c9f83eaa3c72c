"""Figures of diagnoses: every parameter's verdict, and k̂ by task."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

from hbmeta.diagnosis import Diagnosis
from hbmeta.diagnosis.records import Parameter
from hbmeta.distances import SD_LIMITS, TASK_LIMIT
from hbmeta.errors import DataError
from hbmeta.styles import GREY, styled, styles_of

__all__ = ["pareto_k", "verdicts"]

_RIGHT, _WRONG = "#0072B2", "#D55E00"
# Ratios from a tenth to ten are shown, and shifts up to ten sd; a symmetric log scale between.
_RATIOS, _SHIFTS = (0.1, 10.0), 10.0
_NAMES_BELOW = 30
_GOOD_K, _USABLE_K, _LEAST_K = 0.5, 0.7, -0.5


@styled
def verdicts(diagnoses: Mapping[str, Diagnosis]) -> Figure:
    """Each parameter's shift of the mean against its ratio of sds, one panel per diagnosis.

    The box is what counts as right. What lies beyond the axes stands at their edge: a point
    estimate, of sd 0, at the lower one. Level-1 parameters are diamonds. `print(diagnosis)` names
    those that are furthest off.

    Args:
        diagnoses: by name, from `hbmeta.diagnose`.
    Raises:
        DataError: no diagnosis, or one that had no reference to measure a distance from.
    """
    found = {name: _measured(name, one) for name, one in _some(diagnoses, "verdicts").items()}
    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(2.3 * columns + 0.6, 2.3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, parameters) in zip(axes.flat, found.items(), strict=False):
        _panel(axis, parameters)
        axis.set_title(f"{name}: {diagnoses[name].verdict}")
    for axis in axes[-1]:
        axis.set_xlabel("shift of the mean (sd)")
    for axis in axes[:, 0]:
        axis.set_ylabel("sd / reference's sd")
    return figure


@styled
def pareto_k(diagnoses: Mapping[str, Diagnosis]) -> Figure:
    """k̂ of every task: whether q(φ | S) covers p(φ | S, θ) at the fit's θ.

    Below 0.5 draws of q can be weighed to the truth well, up to 0.7 usefully, above not at all
    (Vehtari et al. 2024, JMLR 25). What is below −0.5 stands there: bounded weights, or all alike
    where q is p(φ | S, θ). Fits whose q has no density have no k̂ and are left out.

    Args:
        diagnoses: of the same tasks, by name.
    Raises:
        DataError: no diagnosis, other tasks, or no k̂ in any of them.
    """
    known = {
        name: np.maximum([task.pareto_k for task in one.tasks], _LEAST_K)
        for name, one in _some(diagnoses, "pareto_k").items()
    }
    ids = {tuple(str(task.id) for task in one.tasks) for one in diagnoses.values()}
    shown = {name: k for name, k in known.items() if not np.isnan(k).all()}
    if len(ids) != 1 or not shown:
        raise DataError(
            "pareto_k",
            needed="diagnoses of the same tasks, one of them with k̂",
            found=f"{len(ids)} sets of tasks, k̂ in {len(shown)} of {len(known)} diagnoses",
            do="Diagnose Laplace, AmortizedGuide or another fit whose q has a density.",
        )
    (names,) = ids
    styles = styles_of(diagnoses)
    figure = Figure(figsize=(5.4, 2.8), layout="constrained")
    axis = figure.subplots()
    x = np.arange(len(names), dtype=float)
    worst = np.fmax.reduce(list(shown.values()))
    order = np.argsort(worst, kind="stable")
    for limit, text in ((_GOOD_K, "good"), (_USABLE_K, "usable")):
        axis.axhline(limit, color=GREY, lw=0.8, ls=(0, (3, 2)), zorder=0)
        axis.annotate(f"{text} below {limit:g}", (1.0, limit), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", color="#777777", fontsize=6)  # fmt: skip
    for name, k in shown.items():
        colour, marker = styles[name]
        over = int((k > _USABLE_K).sum())
        label = f"{name} ({over} of {len(k)} above {_USABLE_K:g})"
        size = 3.2 * min(1.0, math.sqrt(100 / len(k)))
        axis.plot(x, k[order], marker, color=colour, ms=size, mew=0, label=label)
    if len(names) <= _NAMES_BELOW:
        axis.set_xticks(x, [names[i] for i in order], rotation=90)
        axis.set_xlabel("task")
    else:
        axis.set_xticks([])
        axis.set_xlabel(f"{len(names)} tasks, by their largest k̂")
    axis.set_ylabel("Pareto k̂")
    axis.yaxis.set_major_locator(MultipleLocator(0.5))
    axis.yaxis.set_major_formatter(FuncFormatter(_edge_k))
    figure.legend(loc="outside upper center", ncols=min(len(shown), 2))
    return figure


def _panel(axis: Axes, parameters: list[Parameter]) -> None:
    shift = np.array([p.shift for p in parameters])
    ratio = np.array([p.sd_ratio for p in parameters])
    x = np.clip(shift, -_SHIFTS, _SHIFTS)
    y = np.clip(ratio, *_RATIOS)
    low, high = SD_LIMITS
    axis.add_patch(
        Rectangle((-TASK_LIMIT, low), 2 * TASK_LIMIT, high - low, color=GREY, alpha=0.5, lw=0)
    )
    level_one = np.array([p.task is None for p in parameters])
    wrong = np.array([p.verdict == "wrong" for p in parameters])
    for chosen, colour in ((~wrong, _RIGHT), (wrong, _WRONG)):
        for globals_, marker, size in ((False, "o", 2.6), (True, "D", 3.4)):
            mask = chosen & (level_one == globals_)
            axis.plot(x[mask], y[mask], marker, color=colour, ms=size, mew=0, alpha=0.7)
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_yscale("log")
    axis.set(xlim=(-1.3 * _SHIFTS, 1.3 * _SHIFTS), ylim=(0.8 * _RATIOS[0], 1.25 * _RATIOS[1]))
    axis.xaxis.set_major_locator(FixedLocator([-10, -1, 0, 1, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(_edge_x))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(FixedLocator([0.1, 0.5, 1, 2, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(_edge_y))
    axis.yaxis.set_minor_locator(NullLocator())


def _edge_x(value: float, _: int) -> str:
    if abs(value) < _SHIFTS:
        return f"{value:g}".replace("-", "−")
    return "≤ −10" if value < 0 else "≥ 10"


def _edge_k(value: float, _: int) -> str:
    return f"≤ −{-_LEAST_K:g}" if value == _LEAST_K else f"{value:g}"


def _edge_y(value: float, _: int) -> str:
    low, high = _RATIOS
    return f"≤ {low:g}" if value <= low else f"≥ {high:g}" if value >= high else f"{value:g}"


def _measured(name: str, diagnosis: Diagnosis) -> list[Parameter]:
    found = [p for p in diagnosis.parameters if np.isfinite([p.shift, p.sd_ratio]).all()]
    if not found:
        raise DataError(
            "verdicts",
            needed="a diagnosis with distances",
            found=f"none in {name!r}: judged by {diagnosis.reference or 'nothing'}",
            do="Pass reference= to hbmeta.diagnose.",
        )
    return found


def _some(diagnoses: Mapping[str, Diagnosis], where: str) -> Mapping[str, Diagnosis]:
    good = isinstance(diagnoses, Mapping) and all(
        isinstance(one, Diagnosis) for one in diagnoses.values()
    )
    if not good or not diagnoses:
        raise DataError(
            where,
            needed="diagnoses by name",
            found=type(diagnoses).__name__ if not good else "none",
            do='Pass {"Laplace": hbmeta.diagnose(fitted, tasks)}.',
        )
    return diagnoses
