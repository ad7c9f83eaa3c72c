"""Figures of bounds over tasks: what they are made of, and how they near the risk as tasks grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hbmeta import bounds
from hbmeta.bounds import Bound
from hbmeta.errors import DataError
from hbmeta.styles import GREY, class_style, styled

__all__ = ["BOUNDS", "bounds_by_tasks", "certificates_by_tasks"]

BOUNDS: dict[str, Callable[..., Bound]] = {
    "pentina_lampert": bounds.pentina_lampert,
    "amit_meir": bounds.amit_meir,
    "account_bound": bounds.account_bound,
    "amit_meir_kl": bounds.amit_meir_kl,
    "separate_roots": bounds.separate_roots,
    "joint_root": bounds.joint_root,
    "joint_kl": bounds.joint_kl,
    "query_split": bounds.query_split,
}
"""The bounds over tasks, the largest first as it is for 200 tasks of 50 samples."""

WITHIN, ACROSS = "#0072B2", "#E69F00"
TOP = 1.25

Floats = npt.NDArray[np.float64]


@styled
def bounds_by_tasks(
    *,
    risk: float = 0.1,
    hyper_kl: float = 5.0,
    task_kl: float = 2.0,
    delta: float = 0.05,
    samples: Sequence[int] = (5, 25, 100),
    tasks: tuple[int, int] = (10, 10_000),
    names: Sequence[str] = tuple(BOUNDS),
) -> Figure:
    """Each bound against the number of tasks, and the terms that it is the sum of.

    One row per bound, one column per number of samples per task. From below: the empirical risk,
    what finitely many samples cost, what finitely many tasks cost. Where a bound is 1 or more it
    says nothing, and is drawn pale.

    Args:
        risk: R̂ of every bound; for the query split, that on the queries.
        hyper_kl: K_H in nats.
        task_kl: K_i in nats, the same for all tasks.
        delta: probability with which a bound may fail.
        samples: per task, one column each; at least 2.
        tasks: first and last number of tasks; at least 2.
        names: which bounds, of those in `BOUNDS`.
    Raises:
        DataError: an unknown bound, none, or arguments that a bound refuses.
    """
    unknown = [name for name in names if name not in BOUNDS]
    if unknown or not names or not samples or not 2 <= tasks[0] < tasks[1]:
        raise DataError(
            "bounds_by_tasks",
            needed=f"names among {', '.join(BOUNDS)}; samples; a range of tasks from 2 on",
            found=f"{unknown or list(names)}, {list(samples)}, {tasks}",
            do="Leave them out to see all.",
        )
    T = np.unique(np.geomspace(*tasks, 200).round())
    figure = Figure(figsize=(2.1 * len(samples) + 0.6, 1.05 * len(names) + 0.9))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(names), len(samples), sharex=True, sharey=True, squeeze=False)
    for name, row in zip(names, axes, strict=True):
        for n, axis in zip(samples, row, strict=True):
            given = {"risk": risk, "hyper_kl": hyper_kl, "n_tasks": T, "delta": delta}
            if name != "query_split":
                given |= {"task_kls": task_kl, "n_samples": n}
            _draw(axis, T, BOUNDS[name](**given))
        row[0].set_ylabel(name.replace("_", " "))
    for n, axis in zip(samples, axes[0], strict=True):
        axis.set_title(f"{n} samples per task")
    for axis in axes[-1]:
        axis.set_xlabel("tasks")
    figure.legend(
        handles=[
            Line2D([], [], color="black", linewidth=1.0, label="bound"),
            Patch(color=ACROSS, label="across tasks"),
            Patch(color=WITHIN, label="within tasks"),
            Patch(color=GREY, label="empirical risk"),
        ],
        loc="outside upper center",
        ncols=4,
    )
    return figure


def _draw(axis: Axes, T: Floats, bound: Bound) -> None:
    within = bound.empirical + bound.within_task
    layers = [
        (np.zeros_like(T), bound.empirical, GREY),
        (bound.empirical, within, WITHIN),
        (within, bound.raw, ACROSS),
    ]
    for low, high, colour in layers:
        axis.fill_between(T, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.fill_between(T, low, high, where=~bound.vacuous, color=colour, linewidth=0)
    axis.plot(T, bound.raw, color="black", linewidth=1.0)
    axis.axhline(1.0, color="black", linewidth=0.5, linestyle=":")
    axis.set_xscale("log")
    axis.set_ylim(0.0, TOP)
    axis.set_xlim(T[0], T[-1])
    said, height = "1 or more for all of these", 0.12
    if not bound.vacuous.all():
        least = int(bound.raw.argmin())
        said, height = f"{bound.raw[least]:.2f} at {T[least]:,.0f} tasks", 0.86
    axis.annotate(
        said,
        (0.97, height),
        xycoords="axes fraction",
        ha="right",
        fontsize=6,
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.0},
    )


@styled
def certificates_by_tasks(
    tasks: Sequence[int],
    values: Mapping[str, Sequence[float]],
    risk: Sequence[float],
    *,
    title: str = "",
) -> Figure:
    """Certificates against the true risk, as the number of tasks grows.

    One line per certificate, named at its end; above 1 it says nothing, and is cut there.

    Args:
        tasks: numbers of tasks, increasing; two or more.
        values: by name, one value of the certificate for each number of tasks.
        risk: the true risk of what is certified, for each number of tasks.
        title: says what the tasks are.
    Raises:
        DataError: fewer than two numbers of tasks, not increasing; values of another length, or
            not finite.
    """
    T = np.asarray(tasks, dtype=float)
    given = {name: np.asarray(value, dtype=float) for name, value in values.items()}
    true = np.asarray(risk, dtype=float)
    wrong = [
        name
        for name, value in {**given, "risk": true}.items()
        if value.shape != T.shape or not np.isfinite(value).all()
    ]
    if T.ndim != 1 or len(T) < 2 or not (np.diff(T) > 0).all() or wrong or not given:
        raise DataError(
            "certificates_by_tasks",
            needed="two or more increasing numbers of tasks; a finite value of each for each",
            found=f"{len(np.atleast_1d(T))} numbers of tasks; wrong: {wrong or 'the tasks'}",
            do="Give the values in the order of the tasks.",
        )
    figure = Figure(figsize=(6.3, 3.6))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    order = sorted(given, key=lambda name: given[name][-1])
    height = -1.0
    for i, name in enumerate(order):
        colour, marker = class_style(i)
        cut = np.minimum(given[name], 1.0)
        axis.plot(T, cut, color=colour, marker=marker, markersize=3, linewidth=1.0, label=name)
        height = max(float(cut[-1]), height + 0.05)  # names stand apart where lines end together
        axis.annotate(
            f"{given[name][-1]:.2f}  {name.replace('_', ' ')}",
            (T[-1], cut[-1]),
            xytext=(1.03, height),
            textcoords=axis.get_yaxis_transform(),
            va="center",
            color=colour,
            annotation_clip=False,
        )
    axis.fill_between(T, 0.0, true, color=GREY, alpha=0.35, linewidth=0)
    axis.plot(T, true, color="black", linewidth=1.2)
    axis.annotate("true risk", (T[0], true[0] / 2), xytext=(4, 0), textcoords="offset points")
    axis.set(xscale="log", xlabel="tasks", ylabel="certificate", ylim=(0.0, 1.02), title=title)
    axis.set_xlim(T[0], T[-1])
    axis.set_xticks(T, [f"{n:,.0f}" for n in T], minor=False)
    axis.set_xticks([], minor=True)
    return figure
