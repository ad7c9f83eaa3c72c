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
from hbmeta.rows import DISTANCES, LABELS, Row, Score, as_json, best_of, strict, unknown_name
from hbmeta.tables import aligned, digits_for, plus_minus

if TYPE_CHECKING:
    import pandas

__all__ = ["Comparison", "Row", "Score", "strict", "versions"]

RULE = (
    f"close: mean |d| ≤ {MEAN_LIMIT:g}, and |d| ≤ {TASK_LIMIT:g} with an sd ratio in "
    f"[{SD_LIMITS[0]:g}, {SD_LIMITS[1]:g}] in {100 * SHARE_LIMIT:.0f} % of tasks and coordinates"
)


@dataclass(frozen=True)
class Comparison:
    """Scores, distances and seconds of several fits on the same tasks.

    Attributes:
        rows: one per fit and then one per oracle, in the caller's order.
        reference: the fit that distances are to, or None.
        baseline: the row that paired differences are to: as named, else the reference, else the
            fit of the lowest NLL; None where no fit can be one by default.
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
    baseline: str | None
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
        """The row of a fit or an oracle."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise unknown_name(name, rows, needed="a row of", where="Comparison")
        return rows[name]

    def best(self, score: str) -> str | None:
        """The fit of the best finite mean of a score: "nll", "accuracy", "rmse" and the like.

        Oracles and fits that saw the held-out points do not compete; None where nobody is left.

        Raises:
            DataError: a score that has no better and worse.
        """
        return best_of(self.rows, score)

    def verdict(self) -> str:
        """Which approximation to trust on these tasks, in one sentence and by a stated rule."""
        if self.reference is None:
            best = self.best("nll")
            return (
                "No reference was named, so nothing here says which posterior is right; "
                f"the lowest NLL is {'no test of any fit' if best is None else 'that of ' + best}."
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
        return out + "; means over tasks ± standard error, * the best fit"

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
        # The best of one is no finding, nor is the best of those that happen to have the score.
        judged = [row for row in self.rows if not (row.is_oracle or row.saw_query)]
        common = len(judged) > 1 and all(key in row.scores for row in judged)
        best = self.best(key) if common else None
        cells = []
        for row, score in zip(self.rows, found, strict=True):
            if score is None:
                cells.append("–  ")
            else:
                mark = " *" if row.name == best else "  "
                cells.append(plus_minus(score.value, score.standard_error, digits) + mark)
        return cells

    def _differences(self, key: str) -> list[str]:
        """Cells of the paired differences of a score to the baseline."""
        found = [row.scores.get(key) for row in self.rows]
        errors = [s.difference_error for s in found if s is not None]
        digits = digits_for([error for error in errors if error is not None])
        cells = []
        for score in found:
            if score is None or score.difference is None or score.difference_error is None:
                cells.append("–")
            else:
                cells.append(plus_minus(score.difference, score.difference_error, digits, "+"))
        return cells

    def _distance_cells(self) -> tuple[list[str], list[list[str]]]:
        shown = [k for k in ("nll", "accuracy") if any(k in row.scores for row in self.rows)]
        shown = [] if self.baseline is None else shown
        columns = [self._differences(key) for key in shown]
        own = any(row.distance_given_theta is not None for row in self.rows)
        head = ["", *(f"{LABELS[key]} − {self.baseline}" for key in shown)]
        if self.reference is not None:
            head += ["mean |d|", "sd ratio (range)"]
            head += ["given θ |d|", "sd ratio"] if own else []
        head += ["fit s", "(compiling)", "adapt s"]
        body = []
        for index, row in enumerate(self.rows):
            cells = [row.name, *(column[index] for column in columns)]
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
            seconds = (row.seconds_fit, "{:.1f}"), (row.seconds_staging, "({:.1f})")
            for value, form in (*seconds, (row.seconds_adapt, "{:.2f}")):
                cells.append("–" if value is None else form.format(value))
            body.append(cells)
        return head, body

    def nll_by_task(self, name: str) -> dict[Any, float]:
        """NLL per point of each task, by id."""
        return dict(zip(self.ids, self[name].nll_by_task, strict=True))

    def to_frame(self) -> pandas.DataFrame:
        """One line per row: scores (`_se`, `_difference`, `_difference_se`), distances, seconds."""
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
                for field in DISTANCES:
                    value = None if distance is None else getattr(distance, field)
                    record[prefix + field] = _or_nan(value)
            for field in ("seconds_fit", "seconds_staging", "seconds_adapt"):
                record[field] = _or_nan(getattr(row, field))
            record["saw_query"], record["batch_norm"] = row.saw_query, row.batch_norm
            records.append(record)
        return pd.DataFrame.from_records(records).set_index("name")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All numbers as strict JSON, which `from_json` reads back; also into a file, atomically.

        NaN and infinite numbers are written as the texts "nan", "inf" and "-inf".
        """
        content = {"kind": "comparison", **asdict(self), "verdict": self.verdict()}
        return as_json(content, path)

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
            rows = tuple(Row.from_json(row) for row in fields.pop("rows"))
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


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
