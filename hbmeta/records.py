"""The record that `compare` returns: plain numbers, printed as a table, a data frame or JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hbmeta import __version__
from hbmeta.distances import MEAN_LIMIT, SD_LIMITS, SHARE_LIMIT, TASK_LIMIT, Distance
from hbmeta.errors import FileError
from hbmeta.files import write_text
from hbmeta.tables import aligned, digits_for, plus_minus

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "Row", "Score", "strict", "versions"]

LABELS = {"nll": "NLL", "joint_nll": "joint NLL", "rmse": "RMSE", "crps": "CRPS"}
"""Scores of which less is better, and what they are called in print."""

RULE = (
    f"close: mean |d| ≤ {MEAN_LIMIT:g}, and |d| ≤ {TASK_LIMIT:g} with an sd ratio in "
    f"[{SD_LIMITS[0]:g}, {SD_LIMITS[1]:g}] in {100 * SHARE_LIMIT:.0f} % of tasks and coordinates"
)


@dataclass(frozen=True)
class Score:
    """A mean over tasks, and its paired difference to the baseline.

    Attributes:
        value: the mean over tasks (RMSE: the root of it).
        standard_error: over tasks; NaN for a single task.
        difference: value minus that of the baseline; None for the baseline itself.
        difference_error: standard error of the paired difference.
    """

    value: float
    standard_error: float
    difference: float | None = None
    difference_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One fit of the table.

    Attributes:
        name: the caller's name of the fit.
        strategy: class of the strategy.
        settings: its settings.
        program: the model or program that was fitted.
        theta: "draws" where θ has a posterior, "point" where it is held.
        seed: seed of the fit.
        scores: "nll", "joint_nll" (both per point), "rmse", "crps" in units of y, and
            "coverage_0.9" and the like; class labels have the first two alone.
        nll_by_task: NLL per point of each task, in the order of `Comparison.ids`.
        distance: q(φ | S) against the reference; None for it, and where nothing is comparable.
        distance_given_theta: q(φ | S) against p(φ | S, θ) of its own program at its own θ, for
            fits that hold θ at a point.
        seconds_fit: wall-clock seconds of the fit.
        seconds_staging: the part of them spent tracing and compiling.
        seconds_adapt: seconds to the posterior of these tasks; none where the fit holds it.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any]
    program: str
    theta: str
    seed: int
    scores: Mapping[str, Score]
    nll_by_task: tuple[float, ...]
    distance: Distance | None
    distance_given_theta: Distance | None
    seconds_fit: float
    seconds_staging: float
    seconds_adapt: float


@dataclass(frozen=True)
class Comparison:
    """Scores, distances and seconds of several fits on the same tasks.

    Attributes:
        rows: one per fit, in the caller's order.
        reference: the fit that distances are to, or None.
        baseline: the fit that paired differences are to: the reference, else the lowest NLL.
        ids: tasks that were judged.
        points: their numbers of query points.
        support_points: their numbers of support points.
        without_query: tasks that were left out for want of a query row.
        levels: probabilities of the intervals.
        draws: draws of (θ, φ) in each predictive.
        seed: of those draws.
        flags: why the reference is not to be trusted; empty where nothing speaks against it.
        notes: what could not be computed, and how a number is to be read.
        versions: of hbmeta and of the packages under it.
    """

    rows: tuple[Row, ...]
    reference: str | None
    baseline: str
    ids: tuple[Any, ...]
    points: tuple[int, ...]
    support_points: tuple[int, ...]
    without_query: tuple[Any, ...]
    levels: tuple[float, ...]
    draws: int
    seed: int
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    def __getitem__(self, name: str) -> Row:
        """The row of a fit."""
        return {row.name: row for row in self.rows}[name]

    def best(self, score: str) -> str:
        """The fit with the lowest mean of a score ("nll", "joint_nll", "rmse", "crps")."""
        return min((r for r in self.rows if score in r.scores), key=lambda r: _order(r, score)).name

    def verdict(self) -> str:
        """Which approximation to trust on these tasks, in one sentence and by a stated rule."""
        if self.reference is None:
            return (
                "No reference was named, so nothing here says which posterior is right; "
                f"the lowest NLL is that of {self.best('nll')}."
            )
        judged = [row for row in self.rows if row.distance is not None]
        if not judged:
            return f"No fit has a posterior that can be compared to that of {self.reference}."
        if self.flags:
            return f"No verdict: {self.reference} is flagged, so closeness to it means little."
        groups: dict[str, list[str]] = {f"Close to {self.reference}": []}
        for row in judged:
            groups.setdefault(_judgement(row.distance, self.reference), []).append(row.name)
        parts = [f"{text}: {', '.join(names) or 'none'}" for text, names in groups.items()]
        order = sorted(parts, key=lambda part: part.startswith("not:"))
        return "; ".join(order) + "."

    def __str__(self) -> str:
        lines = [self._heading(), ""]
        lines += aligned(*self._score_cells())
        if self.reference is not None:
            lines += [
                "",
                f"Distance d of q(φ | S) to {self.reference}, in its standard deviations; "
                "given θ: to p(φ | S, θ) at the fit's own θ",
            ]
        else:
            lines += [""]
        lines += aligned(*self._distance_cells())
        remarks = [f"Flag: {self.reference}: {flag}" for flag in self.flags]
        remarks += [f"Note: {note}." for note in self.notes]
        remarks += [self.verdict()]
        remarks += [f"({RULE})"] if any(row.distance for row in self.rows) else []
        lines += ["", *(textwrap.fill(text, 104, subsequent_indent="  ") for text in remarks)]
        return "\n".join(lines)

    def _heading(self) -> str:
        out = f"{len(self.ids)} tasks, {sum(self.points)} held-out points"
        if self.without_query:
            out += f" ({len(self.without_query)} more have none)"
        return out + "; means over tasks ± standard error, * the best"

    def _score_cells(self) -> tuple[list[str], list[list[str]]]:
        keys = [key for key in LABELS if any(key in row.scores for row in self.rows)]
        coverage = [f"coverage_{level:g}" for level in self.levels]
        covered = [key for key in coverage if any(key in row.scores for row in self.rows)]
        head = ["", *(LABELS[key] for key in keys)]
        head += [f"in {100 * float(key.split('_')[1]):g} %" for key in covered]
        columns = [self._column(key) for key in keys]
        body = []
        for index, row in enumerate(self.rows):
            shares = [
                f"{100 * row.scores[key].value:.1f}" if key in row.scores else "–"
                for key in covered
            ]
            body.append([row.name, *(column[index] for column in columns), *shares])
        return head, body

    def _column(self, key: str) -> list[str]:
        found = [row.scores.get(key) for row in self.rows]
        digits = digits_for([s.standard_error for s in found if s is not None])
        best = self.best(key)
        cells = []
        for row, score in zip(self.rows, found, strict=True):
            if score is None:
                cells.append("–  ")
            else:
                mark = " *" if row.name == best and len(self.rows) > 1 else "  "
                cells.append(plus_minus(score.value, score.standard_error, digits) + mark)
        return cells

    def _distance_cells(self) -> tuple[list[str], list[list[str]]]:
        differences = [row.scores["nll"] for row in self.rows]
        digits = digits_for(
            [s.difference_error for s in differences if s.difference_error is not None]
        )
        own = any(row.distance_given_theta is not None for row in self.rows)
        head = ["", f"NLL − {self.baseline}"]
        if self.reference is not None:
            head += ["mean |d|", "sd ratio (range)"]
            head += ["given θ |d|", "sd ratio"] if own else []
        head += ["fit s", "(compiling)", "adapt s"]
        body = []
        for row, score in zip(self.rows, differences, strict=True):
            cells = [row.name]
            if score.difference is None or score.difference_error is None:
                cells.append("–")
            else:
                cells.append(plus_minus(score.difference, score.difference_error, digits, "+"))
            if self.reference is not None:
                d, g = row.distance, row.distance_given_theta
                cells += (
                    ["–", "–"]
                    if d is None
                    else [
                        f"{d.mean_difference:.2f}",
                        f"{d.sd_ratio:.2f} ({d.sd_ratio_low:.2f}–{d.sd_ratio_high:.2f})",
                    ]
                )
                if own:
                    cells += (
                        ["–", "–"]
                        if g is None
                        else [f"{g.mean_difference:.2f}", f"{g.sd_ratio:.2f}"]
                    )
            cells += [
                f"{row.seconds_fit:.1f}",
                f"({row.seconds_staging:.1f})",
                f"{row.seconds_adapt:.2f}",
            ]
            body.append(cells)
        return head, body

    def nll_by_task(self, name: str) -> dict[Any, float]:
        """NLL per point of each task, by id."""
        return dict(zip(self.ids, self[name].nll_by_task, strict=True))

    def to_frame(self) -> pandas.DataFrame:
        """One row per fit: scores (`_se`, `_difference`, `_difference_se`), distances, seconds."""
        import pandas as pd

        records = []
        for row in self.rows:
            record: dict[str, Any] = {
                "name": row.name,
                "strategy": row.strategy,
                "theta": row.theta,
            }
            for key, score in row.scores.items():
                record[key] = score.value
                record[f"{key}_se"] = score.standard_error
                record[f"{key}_difference"] = _or_nan(score.difference)
                record[f"{key}_difference_se"] = _or_nan(score.difference_error)
            for prefix, distance in (
                ("", row.distance),
                ("given_theta_", row.distance_given_theta),
            ):
                for field in _DISTANCES:
                    value = None if distance is None else getattr(distance, field)
                    record[prefix + field] = _or_nan(value)
            for field in ("seconds_fit", "seconds_staging", "seconds_adapt"):
                record[field] = getattr(row, field)
            records.append(record)
        return pd.DataFrame.from_records(records).set_index("name")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All numbers as strict JSON, which `from_json` reads back; also into a file, atomically.

        NaN and infinite numbers are written as the texts "nan", "inf" and "-inf".
        """
        content = {"kind": "comparison", **asdict(self), "verdict": self.verdict()}
        text = json.dumps(strict(content), ensure_ascii=False, indent=1, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote.

        Raises:
            FileError: the text is none.
        """
        try:
            fields = json.loads(text)
            if fields.pop("kind") != "comparison":
                raise ValueError("another kind of record")
            fields.pop("verdict")
            rows = tuple(_row(row) for row in fields.pop("rows"))
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fields.items()
            }
            return cls(rows=rows, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "Comparison.from_json",
                needed="the text that Comparison.to_json wrote",
                found=f"{type(error).__name__}: {error}",
                do="Write it anew with comparison.to_json().",
            ) from error


_DISTANCES = (
    "mean_difference",
    "largest_difference",
    "sd_ratio",
    "sd_ratio_low",
    "sd_ratio_high",
    "share_close",
)


def versions() -> dict[str, str]:
    """Versions of hbmeta, of Python, and of the packages that the numbers depend on."""
    packages = ("torch", "pyro-ppl", "nutpie", "arviz", "numpy")
    out = {"hbmeta": __version__, "python": platform.python_version()}
    return out | {package: version(package) for package in packages}


def _judgement(distance: Distance | None, reference: str) -> str:
    if distance is None or not distance.close_in_mean:
        return "not"
    if distance.close:
        return f"Close to {reference}"
    low, high = SD_LIMITS
    spread = low <= distance.sd_ratio <= high
    return f"close in the mean but not in {'every task' if spread else 'the spread'}"


def _row(fields: Mapping[str, Any]) -> Row:
    scores = {key: _score(score) for key, score in fields["scores"].items()}
    return Row(
        **{
            **fields,
            "scores": scores,
            "nll_by_task": tuple(float(v) for v in fields["nll_by_task"]),
            "distance": _distance(fields["distance"]),
            "distance_given_theta": _distance(fields["distance_given_theta"]),
        }
    )


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
    return Distance(tuple(fields["sites"]), **{name: float(fields[name]) for name in _DISTANCES})


def strict(value: Any) -> Any:
    """What strict JSON can hold: numbers that are not finite as text, tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _order(row: Row, score: str) -> float:
    value = row.scores[score].value
    return math.inf if math.isnan(value) else value
