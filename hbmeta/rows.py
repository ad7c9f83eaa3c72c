"""One line of a comparison: the scores of a fit or an oracle, as plain numbers."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hbmeta.distances import Distance
from hbmeta.errors import DataError
from hbmeta.files import write_text
from hbmeta.models import HierarchicalModel

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

__all__ = [
    "DISTANCES",
    "LABELS",
    "MORE_IS_BETTER",
    "ORACLE",
    "Row",
    "Score",
    "as_json",
    "batch_norm_of",
    "best_of",
    "strict",
    "transduction",
    "unknown_name",
]

LABELS = {
    "nll": "NLL",
    "joint_nll": "joint NLL",
    "accuracy": "accuracy",
    "brier": "Brier",
    "ece": "ECE",
    "rmse": "RMSE",
    "crps": "CRPS",
}
"""Scores of which one direction is better, and what they are called in print."""
MORE_IS_BETTER = frozenset({"accuracy"})
"""Those of them of which more is better; less is better of the others."""
ORACLE = "oracle"
"""What stands for the strategy of a row that knows the family of the tasks."""
DISTANCES = (
    "mean_difference",
    "largest_difference",
    "sd_ratio",
    "sd_ratio_low",
    "sd_ratio_high",
    "share_close",
)


@dataclass(frozen=True)
class Score:
    """A mean over tasks, and its paired difference to the baseline.

    Attributes:
        value: the mean over tasks (RMSE: the root of it; ECE: of all points, pooled).
        standard_error: over tasks; NaN for a single task.
        difference: value minus that of the baseline; None for the baseline itself, and where the
            baseline has no such score.
        difference_error: standard error of the paired difference.
    """

    value: float
    standard_error: float
    difference: float | None = None
    difference_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One fit or oracle of the table; what an oracle has not is None.

    Attributes:
        name: the caller's name of it.
        strategy: class of the strategy; "oracle" for what knows the family of the tasks.
        settings: its settings.
        program: the model or program that was fitted.
        theta: "draws" where θ has a posterior, "point" where it is held.
        seed: seed of the fit.
        scores: "nll" and "joint_nll", both per point; for classes "accuracy", "brier", "ece"; for
            numbers "rmse" and "crps" in units of y, and "coverage_0.9" and the like.
        nll_by_task: NLL per point of each task, in the order of `Comparison.ids`.
        distance: q(φ | S) against the reference; None for it, and where nothing is comparable.
        distance_given_theta: q(φ | S) against p(φ | S, θ) of its own program at its own θ, for
            fits that hold θ at a point.
        seconds_fit: wall-clock seconds of the fit.
        seconds_staging: the part of them spent tracing and compiling.
        seconds_adapt: seconds to the posterior of these tasks; none where the fit holds it.
        saw_query: whether it was fitted on held-out points, so that its scores are no test.
        batch_norm: which rows batch norm took its statistics from ("support", "stored", "query");
            None where the model has none.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any]
    program: str | None
    theta: str | None
    seed: int | None
    scores: Mapping[str, Score]
    nll_by_task: tuple[float, ...]
    distance: Distance | None
    distance_given_theta: Distance | None
    seconds_fit: float | None
    seconds_staging: float | None
    seconds_adapt: float | None
    saw_query: bool = False
    batch_norm: str | None = None

    @property
    def is_oracle(self) -> bool:
        """Whether it is no fit."""
        return self.strategy == ORACLE

    @classmethod
    def of_oracle(
        cls, name: str, scores: Mapping[str, Score], nll_by_task: tuple[float, ...]
    ) -> Row:
        """Scores without a fit: no θ, no posterior, no seconds."""
        return cls(
            name,
            ORACLE,
            settings={},
            program=None,
            theta=None,
            seed=None,
            scores=scores,
            nll_by_task=nll_by_task,
            distance=None,
            distance_given_theta=None,
            seconds_fit=None,
            seconds_staging=None,
            seconds_adapt=None,
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        """The row that strict JSON holds."""
        return cls(
            **{
                **fields,
                "scores": {key: _score(score) for key, score in fields["scores"].items()},
                "nll_by_task": tuple(float(v) for v in fields["nll_by_task"]),
                "distance": _distance(fields["distance"]),
                "distance_given_theta": _distance(fields["distance_given_theta"]),
            }
        )


def unknown_name(name: Any, known: Collection[str], *, needed: str, where: str) -> DataError:
    """The error of a name that is none of the known ones; names the nearest of them."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return DataError(
        where,
        needed=f"{needed} {', '.join(map(repr, known))}",
        found=repr(name),
        do=f"The nearest name is {near[0]!r}.",
    )


def batch_norm_of(fitted: Fitted) -> str | None:
    """The policy of the model's batch norm; None without."""
    model = fitted.model
    found = model.settings().get("batch_norm") if isinstance(model, HierarchicalModel) else None
    return None if found is None else str(found)


def transduction(fitted: Fitted) -> str:
    """Says so where a prediction depends on the other rows of the query; else empty."""
    if fitted.problem.takes_context != "rows":
        return ""
    what = "batch norm: query statistics" if batch_norm_of(fitted) else "its context is the query"
    return f"{what} (transductive), so that a prediction depends on the x of the other queries"


def best_of(rows: Sequence[Row], score: str) -> str | None:
    """The fit of the best finite mean of a score, among those that saw no held-out point.

    Oracles do not compete.

    Raises:
        DataError: a score that has no better and worse.
    """
    if score not in LABELS:
        raise unknown_name(score, LABELS, needed="a score of", where="Comparison.best")
    sign = -1.0 if score in MORE_IS_BETTER else 1.0
    judged = [
        (sign * row.scores[score].value, row.name)
        for row in rows
        if score in row.scores and not (row.is_oracle or row.saw_query)
    ]
    finite = [pair for pair in judged if math.isfinite(pair[0])]
    return min(finite, key=lambda pair: pair[0])[1] if finite else None


def _score(fields: Mapping[str, Any]) -> Score:
    difference = [fields[name] for name in ("difference", "difference_error")]
    return Score(
        float(fields["value"]),
        float(fields["standard_error"]),
        *(None if value is None else float(value) for value in difference),
    )


def _distance(fields: Mapping[str, Any] | None) -> Distance | None:
    if fields is None:
        return None
    return Distance(tuple(fields["sites"]), **{name: float(fields[name]) for name in DISTANCES})


def strict(value: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite as text, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def as_json(content: Mapping[str, Any], path: str | os.PathLike[str] | None) -> str:
    """A record as strict JSON; also into a file, atomically, where a path is given."""
    text = json.dumps(strict(content), ensure_ascii=False, indent=1, allow_nan=False)
    if path is not None:
        write_text(path, text + "\n")
    return text
