"""Scores of a predictive on held-out points, by task, and their means over tasks.

Scores of task i average over its query points; a table averages over tasks, each counting once:

    s̄ = (1/T) Σ_i s_i,   standard error sd(s_i) / √T,   paired differences s_i − s_i^base likewise

RMSE = √(mean of the tasks' mean squared errors); its standard error is that of the mean divided by
2 RMSE (delta method), its paired difference's that of mse_i / (2 RMSE) − mse_i^base /
(2 RMSE^base).

ECE = Σ_b |mean over i of g_ib| is no mean over tasks (`hbmeta.classification`). Its standard error
is the jackknife's over tasks, with E_(i) the ECE, or the difference of two, of all tasks but i:

    √( (T − 1)/T Σ_i (E_(i) − mean of them)² )

rough where the classifier is calibrated, because |·| has a kink at 0 (Efron 1982, The Jackknife).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hbmeta.classification import accuracy, brier, calibration_gaps
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.posterior import Units
from hbmeta.predictive import Predictive
from hbmeta.rows import Score

__all__ = ["Table", "score_of", "scores_by_task"]

Floats = npt.NDArray[np.float64]
Table = Mapping[str, Floats]
"""By name of a score, its value per task: "rmse" squared errors, "ece" gaps (tasks, bins)."""


def scores_by_task(
    predictive: Predictive, y: Tensor, units: Units, levels: Sequence[float], name: str
) -> Table:
    """Each score of each task that has a row, averaged over its rows.

    Args:
        predictive: of the rows that y belongs to.
        y: flat, as the tasks hold it.
        units: undoes a standardised y.
        levels: probabilities of the central intervals whose coverage is counted.
        name: the row of the table, for messages.
    Raises:
        DataError: labels that the response cannot have.
    """
    query = predictive.tasks
    y = y.to(query.device)
    judged = (query.counts > 0).cpu()
    counts = query.counts.cpu()[judged]

    def rows_of(found: Tensor) -> Tensor:
        return (query.unpad(found) if predictive.padded else found).detach().double().cpu()

    def per_task(found: Tensor, *, flat: bool = False) -> Floats:
        rows = found.double().cpu() if flat else rows_of(found)
        rows = rows.reshape(len(rows), -1).mean(-1)
        total = torch.zeros(query.n_tasks, dtype=rows.dtype).index_add(0, query.task.cpu(), rows)
        return (total[judged] / counts).numpy()

    if y.is_floating_point():  # tasks hold y as it was encoded; scores are in units of the table
        numbers = units.location + units.scale * y.double()
    else:
        numbers = y
    found = {"nll": per_task(-predictive.log_prob(numbers))}
    with contextlib.suppress(UnsupportedModelError):  # labels of points that depend on each other
        joint = predictive.log_prob(numbers, joint=True).detach().double().cpu()[judged]
        found["joint_nll"] = (-joint / counts).numpy()
    probabilities = _probabilities(predictive)
    if probabilities is not None:
        p = rows_of(probabilities)
        labels = (y.argmax(-1) if y.dim() > 1 else y).cpu()
        try:
            found["accuracy"] = per_task(accuracy(p, labels), flat=True)
            found["brier"] = per_task(brier(p, labels), flat=True)
            gaps = calibration_gaps(p, labels, query.task.cpu(), query.n_tasks)
        except DataError as error:
            raise DataError(
                f"compare ({name!r})", needed=error.needed, found=error.found, do=error.do
            ) from error
        return {**found, "ece": gaps[judged].numpy()}
    flat = numbers.double().cpu()
    found["rmse"] = per_task((rows_of(predictive.mean) - flat).square(), flat=True)
    found["crps"] = per_task(predictive.crps(numbers))
    for level in levels:
        found[f"coverage_{level:g}"] = per_task(predictive.coverage(numbers, level))
    return found


def _probabilities(predictive: Predictive) -> Tensor | None:
    try:
        return predictive.probabilities
    except UnsupportedModelError:
        return None


def score_of(key: str, values: Floats, baseline: Floats | None) -> Score:
    """The mean over tasks and its standard error, and the paired difference to the baseline.

    Args:
        key: name of the score.
        values: (tasks,), or (tasks, bins) for "ece".
        baseline: those of the baseline; None for itself, or where it has no such score.
    """
    if key == "ece":
        own = _leaving_out(values)
        if baseline is None:
            return Score(_pooled(values), _jackknife(own))
        return Score(
            _pooled(values),
            _jackknife(own),
            _pooled(values) - _pooled(baseline),
            _jackknife(own - _leaving_out(baseline)),
        )
    value, influence = _moment(key, values)
    if baseline is None:
        return Score(value, _standard_error(influence))
    other, other_influence = _moment(key, baseline)
    return Score(
        value,
        _standard_error(influence),
        value - other,
        _standard_error(influence - other_influence),
    )


def _moment(key: str, values: Floats) -> tuple[float, Floats]:
    """The score, and what each task adds to it, whose spread is that of the score."""
    mean = float(np.mean(values))
    if key != "rmse":
        return mean, values
    root = math.sqrt(mean)
    # d √m = dm / (2 √m)
    return root, values / (2 * root) if root > 0 else values


def _pooled(gaps: Floats) -> float:
    return float(np.abs(gaps.mean(0)).sum())


def _leaving_out(gaps: Floats) -> Floats:
    """(tasks,) the ECE of all tasks but one; NaN for a single task."""
    n_tasks = len(gaps)
    if n_tasks < 2:
        return np.full(1, math.nan)
    left: Floats = np.abs((gaps.sum(0) - gaps) / (n_tasks - 1)).sum(1)
    return left


def _jackknife(left_out: Floats) -> float:
    """√((T − 1)/T Σ (E_(i) − mean)²)."""
    n_tasks = len(left_out)
    if n_tasks < 2 or not np.isfinite(left_out).all():
        return math.nan
    return float(math.sqrt((n_tasks - 1) * np.var(left_out)))


def _standard_error(values: Floats) -> float:
    """sd / √T over tasks; NaN for one task or values that are not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
