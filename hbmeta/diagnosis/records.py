"""The record that `diagnose` returns: plain numbers and words, a table, a data frame or JSON.

A parameter is right where its mean lies within 0.3 standard deviations of the true posterior's and
its standard deviation within [0.75, 1.33] of it, wrong where not, and unverified where nothing at
hand can tell. A posterior is right where nine in ten of its parameters are, and wrong where more
than one in ten is.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from hbmeta.distances import SD_LIMITS, SHARE_LIMIT, TASK_LIMIT
from hbmeta.errors import FileError
from hbmeta.rows import as_json
from hbmeta.tables import aligned

if TYPE_CHECKING:
    import pandas

__all__ = ["About", "Diagnosis", "Parameter", "Symptom", "Task", "Verdict", "summed_up"]

Verdict = Literal["right", "wrong", "unverified"]
About = Literal["approximation", "model", "reference"]

_SHOWN = 8
_WIDTH = 104
_NUMBERS = ("shift", "sd_ratio", "sure", "pareto_k")


@dataclass(frozen=True)
class Symptom:
    """Something that was looked at and found to be off.

    Attributes:
        name: of the check.
        about: what is in doubt: the approximation of the posterior, the model itself, or the
            reference that this diagnosis judged by.
        measured: the numbers.
        sure: how sure it is.
        means: for the person's conclusions.
        do: the next thing to try.
    """

    name: str
    about: About
    measured: str
    sure: str
    means: str
    do: str


@dataclass(frozen=True)
class Parameter:
    """The verdict on one number.

    Attributes:
        site: of the program.
        index: of the entry of a vector site; empty for a number.
        task: label of its task; None for a level-1 parameter.
        verdict: "right", "wrong" or "unverified".
        shift: (mean − reference's) / reference's sd; NaN without a reference.
        sd_ratio: sd / reference's sd; NaN likewise.
        sure: probability of the verdict under the Monte Carlo errors of both; NaN likewise.
    """

    site: str
    index: tuple[int, ...]
    task: Any
    verdict: Verdict
    shift: float
    sd_ratio: float
    sure: float

    @property
    def label(self) -> str:
        """Such as "beta[0]" or "slope[1] of 'LAKE'"."""
        index = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.site}{index}" + ("" if self.task is None else f" of {self.task!r}")

    @property
    def mean_verdict(self) -> Verdict:
        """On the mean alone, whatever the spread."""
        if math.isnan(self.shift):
            return self.verdict if self.verdict == "right" else "unverified"
        return "right" if abs(self.shift) <= TASK_LIMIT else "wrong"

    @property
    def distance(self) -> float:
        """How far off in units of the limits, 1 at a limit; −1 where nothing was measured."""
        if math.isnan(self.shift):
            return -1.0
        low, high = SD_LIMITS
        wide = self.sd_ratio >= 1.0
        spread = (self.sd_ratio - 1.0) / ((high if wide else low) - 1.0)
        return max(abs(self.shift) / TASK_LIMIT, spread)


@dataclass(frozen=True)
class Task:
    """The verdict on a task: that of the worst of its parameters.

    Attributes:
        id: its label.
        verdict: "wrong" if any of its parameters is, else "unverified" if any is.
        worst: label of the parameter that is furthest off; empty where nothing was measured.
        pareto_k: k̂ of q(φ | S) to p(φ | S, θ) at the fit's θ; NaN where q has no density.
    """

    id: Any
    verdict: Verdict
    worst: str
    pareto_k: float


def summed_up(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for many: wrong above one wrong in ten, right from nine right in ten on."""
    if not verdicts:
        return "unverified"
    count = Counter(verdicts)
    if len(verdicts) - count["wrong"] < SHARE_LIMIT * len(verdicts):
        return "wrong"
    return "right" if count["right"] >= SHARE_LIMIT * len(verdicts) else "unverified"


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a fit's posterior of some tasks, as far as it can be told from itself.

    Attributes:
        strategy: of the fit.
        program: its name.
        theta: "draws", "point", or "none" where the program has no level-1 quantity.
        reference: what verdicts rest on, in words; empty where there was nothing to judge by.
        parameters: level-1 ones where the fit has draws of them, then those of the tasks.
        tasks: in the order in which they were given.
        symptoms: of the approximation, then of the model, then of the reference.
        seed: of the checks.
        seconds: that they took.
        versions: of hbmeta and of the packages under it.
    """

    strategy: str
    program: str
    theta: str
    reference: str
    parameters: tuple[Parameter, ...]
    tasks: tuple[Task, ...]
    symptoms: tuple[Symptom, ...]
    seed: int
    seconds: float
    versions: Mapping[str, str]

    @property
    def verdict(self) -> Verdict:
        """On the posterior as a whole, means and spread."""
        return summed_up([p.verdict for p in self.parameters])

    @property
    def verdict_of_means(self) -> Verdict:
        """On posterior means alone: what a point estimate can be right about."""
        return summed_up([p.mean_verdict for p in self.parameters])

    def __getitem__(self, task: Any) -> tuple[Parameter, ...]:
        """The parameters of a task, by its label."""
        return tuple(p for p in self.parameters if p.task == task and p.task is not None)

    def __str__(self) -> str:
        count = Counter(p.verdict for p in self.parameters)
        parts = ", ".join(f"{count[v]} {v}" for v in ("right", "wrong", "unverified"))
        lines = [
            f"{self.strategy} on {self.program}, {len(self.tasks)} tasks: {self.verdict}"
            f" (means alone: {self.verdict_of_means})",
            f"Of {len(self.parameters)} parameters {parts}.",
            f"Judged by {self.reference or 'nothing'}; right: within {TASK_LIMIT:g} sd of the mean "
            f"and [{SD_LIMITS[0]:g}, {SD_LIMITS[1]:g}] of the sd.",
        ]
        worst = sorted(self.parameters, key=lambda p: p.distance, reverse=True)[:_SHOWN]
        worst = [p for p in worst if not math.isnan(p.shift)]
        if worst:
            head = ["furthest off", "shift (sd)", "sd ratio", "verdict", "sure"]
            body = [
                [p.label, f"{p.shift:+.2f}", f"{p.sd_ratio:.2f}", p.verdict, _percent(p.sure)]
                for p in worst
            ]
            lines += ["", *aligned(head, body)]
        for symptom in self.symptoms:
            lines += ["", f"{symptom.name} [{symptom.about}]: {symptom.measured}"]
            lines += [f"Sure: {symptom.sure}. It means: {symptom.means} Next: {symptom.do}"]
        if not self.symptoms:
            lines += ["", "No symptoms."]
        wrapped = [
            textwrap.fill(line, _WIDTH, subsequent_indent="  ") if len(line) > _WIDTH else line
            for line in lines
        ]
        return "\n".join(wrapped)

    def to_frame(self) -> pandas.DataFrame:
        """One row per parameter."""
        import pandas as pd

        rows = [{**asdict(p), "mean_verdict": p.mean_verdict} for p in self.parameters]
        return pd.DataFrame.from_records(rows, index=[p.label for p in self.parameters])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it as strict JSON, which `from_json` reads back; also into a file, atomically.

        NaN and infinite numbers are written as the texts "nan", "inf" and "-inf".
        """
        verdicts = {"verdict": self.verdict, "verdict_of_means": self.verdict_of_means}
        return as_json({"kind": "diagnosis", **verdicts, **asdict(self)}, path)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """The diagnosis that `to_json` wrote.

        Raises:
            FileError: the text is none.
        """
        try:
            fields = json.loads(text)
            if fields.pop("kind") != "diagnosis":
                raise ValueError("another kind of record")
            for name in ("verdict", "verdict_of_means"):
                fields.pop(name)
            parameters = [_read(row) for row in fields.pop("parameters")]
            return cls(
                parameters=tuple(Parameter(**row) for row in parameters),
                tasks=tuple(Task(**_read(row)) for row in fields.pop("tasks")),
                symptoms=tuple(Symptom(**row) for row in fields.pop("symptoms")),
                **fields,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "Diagnosis.from_json",
                needed="the text that Diagnosis.to_json wrote",
                found=f"{type(error).__name__}: {error}",
                do="Write it anew with diagnosis.to_json().",
            ) from error


def _read(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its numbers, which may be the text "nan", and its tuples."""
    out = {k: float(v) if k in _NUMBERS else v for k, v in row.items()}
    return out | {"index": tuple(row["index"])} if "index" in row else out


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"
