"""The record of a certificate: every term, the ledger of δ, what was checked and what is warranted.

A certificate claims: with probability at least 1 − δ over the tasks and their data (and over the
draws that measured a random predictor), the expected loss of this predictor on a new task of the
same environment is below `value`. It holds what its arithmetic needs, so that a file can be checked
without model and data (`hbmeta.certification.checking`).
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from hbmeta.certification.losses import Loss
from hbmeta.certification.statements import Statement
from hbmeta.errors import FileError
from hbmeta.rows import as_json
from hbmeta.tables import aligned

__all__ = ["Certificate", "Remark"]

WIDTH = 60
INKS = {"measured": "█", "evaluation": "▓", "within_task": "▒", "across_task": "░"}


@dataclass(frozen=True)
class Remark:
    """Something that must be true for a certificate.

    Attributes:
        kind: "checked": seen to be so; "flag": the data speak against it; "warranted": no program
            can see it, and whoever quotes the certificate answers for it.
        text: a sentence.
    """

    kind: Literal["checked", "flag", "warranted"]
    text: str


@dataclass(frozen=True)
class Certificate:
    """An upper bound on the expected loss of a predictor, and all that it stands on.

    Attributes:
        question: "over tasks", the average future task before its data; or "one task", this task
            after its data. They answer different questions and are never mixed.
        statements: the theorems that were computed. Those that competed share δ; those beside have
            one of their own.
        chosen: position of the statement that is the certificate.
        delta: probability with which it may fail.
        choices: between how many fits or settings the same tasks chose; δ is divided by it.
        loss: its name and constant.
        predictor: in words, what is certified.
        n_tasks: tasks that were certified on.
        shots: fewest and most support points of these.
        queries: fewest and most query points.
        strategy: name and settings.
        program: name of the program.
        settings: what the evaluation needs to be done again.
        data: digest of the tasks, by what they served.
        remarks: what was checked, flagged, and has to be warranted.
        versions: of hbmeta and of the packages under it.
    """

    question: str
    statements: tuple[Statement, ...]
    chosen: int
    delta: float
    choices: int
    loss: tuple[str, float | None]
    predictor: str
    n_tasks: int
    shots: tuple[int, int]
    queries: tuple[int, int]
    strategy: str
    strategy_settings: Mapping[str, Any]
    program: str
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    remarks: tuple[Remark, ...]
    versions: Mapping[str, str]

    @property
    def statement(self) -> Statement:
        """The theorem that is quoted."""
        return self.statements[self.chosen]

    @property
    def value(self) -> float:
        """The number: the expected loss is below it."""
        return self.statement.value

    @property
    def vacuous(self) -> bool:
        """Whether it says nothing about a loss in [0, 1]."""
        return self.statement.vacuous

    @property
    def bound(self) -> str:
        """Name of the theorem in `hbmeta.bounds`."""
        return self.statement.bound

    @property
    def flags(self) -> tuple[str, ...]:
        """Where the data speak against an assumption."""
        return tuple(remark.text for remark in self.remarks if remark.kind == "flag")

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        lines = [self.claim(), "", *aligned(*self._cells()), ""]
        lines += [f"{one.bound:>14} {bar(one)}" for one in self.statements]
        legend = ", ".join(f"{ink} {name.replace('_', ' ')}" for name, ink in INKS.items())
        lines += [f"{'':>14} 0{'1':>{WIDTH}}   {legend}", "", self._ledger()]
        names = {"checked": "Checked", "flag": "FLAG", "warranted": "You warrant"}
        lines += ["", *(f"{names[remark.kind]}: {remark.text}" for remark in self.remarks)]
        return "\n".join(
            line if line[:1] in (" ", "") or "  " in line
            else textwrap.fill(line, 104, subsequent_indent="  ")
            for line in lines
        )  # fmt: skip

    def claim(self) -> str:
        """What is claimed, in one sentence."""
        one = self.statement
        if self.question == "one task":
            about = "of this one task, on new points of it and after its data,"
        else:
            about = "on a new task of the same environment, averaged over its data,"
        says = ", which says nothing: it is vacuous" if one.vacuous else ""
        return (
            f"With probability at least {1 - self.delta:g} the expected {self._loss()} {about} of "
            f"{self.predictor} is at most {one.value:.4f}{says}. ({one.theorem})"
        )

    def _loss(self) -> str:
        return str(Loss(*self.loss))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["", "bound", "measured", "draws", "within tasks", "across tasks", "K_H", "δ", ""]
        body = []
        for position, one in enumerate(self.statements):
            terms = (one.measured, one.evaluation, one.within_task, one.across_task)
            body.append(
                [
                    one.bound,
                    f"{one.raw:.4f}" + (" (vacuous)" if one.vacuous else ""),
                    *(f"{term:.4f}" for term in terms),
                    "–" if one.hyper_kl is None else f"{one.hyper_kl:.2f}",
                    f"{one.cost:.4g}",
                    "← certificate"
                    if position == self.chosen
                    else "beside it, at a δ of its own"
                    if one.beside
                    else "",
                ]
            )
        return head, body

    def _ledger(self) -> str:
        parts = []
        for one in self.statements:
            grid = len(one.inputs.get("grid", [None]))
            times = f" × {grid} hyperpriors" if grid > 1 else ""
            drawn = one.inputs.get("evaluation_delta", 0.0)
            text = f"{one.bound} {one.inputs['delta']:.4g}{times}"
            text += f" + {drawn:.4g} for the draws" if drawn else ""
            parts.append(text + (" (beside)" if one.beside else ""))
        text = "δ: " + "; ".join(parts) + f"; in all {self.delta:g}"
        if self.choices > 1:
            text += f", because these tasks chose between {self.choices}: {self.choices} times that"
        return text + "."

    def check(self, **evidence: Any) -> tuple[str, ...]:
        """What is wrong with it, in sentences; empty where nothing is.

        Its arithmetic from its own inputs; its risks too where the fit and the tasks are given.

        Args:
            evidence: as for `hbmeta.certification.check_certificate`.
        """
        from hbmeta.certification.checking import check_certificate

        return check_certificate(self, **evidence)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it as strict JSON, which `from_json` reads back; also into a file, atomically."""
        return as_json({"kind": "certificate", "claim": self.claim(), **asdict(self)}, path)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that `to_json` wrote; `check` says whether it can be believed.

        Raises:
            FileError: the text is none.
        """
        try:
            content = json.loads(text)
            if content.pop("kind") != "certificate":
                raise ValueError("another kind of record")
            content.pop("claim")
            names = {field.name for field in fields(cls)}
            if set(content) != names:
                raise ValueError(f"fields {sorted(set(content) ^ names)}")
            content["statements"] = tuple(Statement(**one) for one in content["statements"])
            content["remarks"] = tuple(Remark(**one) for one in content["remarks"])
            for name in ("loss", "shots", "queries"):
                content[name] = tuple(content[name])
            found = cls(**content)
            numbers = [found.delta, found.choices, found.chosen]
            for one in found.statements:
                numbers += [one.value, one.raw, one.measured, one.evaluation, one.cost]
            if not all(type(number) in (int, float) for number in numbers):
                raise ValueError("text where a number belongs")
            if not 0 <= found.chosen < len(found.statements):
                raise ValueError(f"no statement {found.chosen}")
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "Certificate.from_json",
                needed="the text that Certificate.to_json wrote",
                found=f"{type(error).__name__}: {error}",
                do="Write it anew with certificate.to_json().",
            ) from error


def bar(one: Statement) -> str:
    """The terms of a bound on a line of fixed width; what is beyond 1 is cut off."""
    drawn, reached = "", 0.0
    for name, ink in INKS.items():
        reached += max(0.0, getattr(one, name))
        drawn += ink * (min(WIDTH, round(WIDTH * reached)) - len(drawn))
    return "|" + drawn.ljust(WIDTH) + "|"
