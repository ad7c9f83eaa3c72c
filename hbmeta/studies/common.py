"""How every study is run, what it gives back, and how that is printed and written."""

from __future__ import annotations

import json
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from matplotlib.figure import Figure

from hbmeta.files import atomic, write_text
from hbmeta.fitted import Fitted
from hbmeta.inference import Strategy
from hbmeta.program import Program
from hbmeta.records import Comparison

__all__ = ["Outcome", "Plan", "Say", "Study", "entries", "fit_plans", "silent", "write"]

Budget = TypeVar("Budget")
"""How much work a study is, in numbers of its own."""

Say = Callable[[str], None]
"""Takes one line of progress."""


def silent(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    Attributes:
        title: the study in one line.
        text: what was fitted to what, and what to look at; lines of at most 100 characters.
        comparisons: tables by name.
        captions: one line above each table, by the same names.
        figures: by name; made when they are written, because they take time too.
        seconds: wall-clock seconds of the whole study, figures left out; measured by `Study`.
    """

    title: str
    text: str
    comparisons: Mapping[str, Comparison]
    captions: Mapping[str, str]
    figures: Mapping[str, Callable[[], Figure]] = field(repr=False)
    seconds: float = 0.0

    def __str__(self) -> str:
        tables = [
            f"{self.captions[name].upper()}\n{table}" for name, table in self.comparisons.items()
        ]
        return "\n\n".join([self.title, self.text, *tables, f"{self.seconds:.0f} s in all"])

    def to_json(self) -> str:
        """Title, text, captions, seconds and the tables, as JSON."""
        content: dict[str, Any] = {
            "title": self.title,
            "text": self.text,
            "captions": dict(self.captions),
            "seconds": self.seconds,
        }
        content |= {name: json.loads(table.to_json()) for name, table in self.comparisons.items()}
        return json.dumps(content, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Study(Generic[Budget]):
    """A study that can be run; what it finds is a function of the arguments alone.

    Attributes:
        find: budget, seed, say and compile to what was found.
        full: how much work it is.
        quick: a first look, with a fraction of the work.
    """

    find: Callable[[Budget, int, Say, bool | str], Outcome]
    full: Budget
    quick: Budget

    def __call__(
        self,
        *,
        seed: int = 0,
        quick: bool = False,
        say: Say = silent,
        compile: bool | str = "auto",
        budget: Budget | None = None,
    ) -> Outcome:
        """Run the study.

        Args:
            seed: of the held-out tasks and of the fits.
            quick: a first look, with a fraction of the work.
            say: takes one line of progress per fit.
            compile: as for `Strategy.fit`.
            budget: how much work; by default that of `quick` or the full one.
        """
        start = time.perf_counter()
        chosen = budget or (self.quick if quick else self.full)
        outcome = self.find(chosen, seed, say, compile)
        return replace(outcome, seconds=time.perf_counter() - start)


def entries(texts: Mapping[str, str], width: int = 100) -> str:
    """Names on the left and what is said of them on the right, in lines of at most `width`."""
    margin = max(map(len, texts)) + 2
    lines = []
    for name, text in texts.items():
        first, *others = textwrap.wrap(text, width - margin)
        lines += [name.ljust(margin) + first, *(" " * margin + line for line in others)]
    return "\n".join(lines)


def write(folder: Path, outcome: Outcome) -> None:
    """Writes the text, the tables as JSON and the figures, each file atomically.

    Args:
        folder: where to; made if it is missing.
        outcome: what the study returned.
    Raises:
        FileError: a file cannot be written.
    """
    write_text(folder / "summary.txt", f"{outcome}\n")
    for name, table in outcome.comparisons.items():
        table.to_json(folder / f"comparison_{name}.json")
    for name, make in outcome.figures.items():
        with atomic(folder / f"{name}.png") as path:
            make().savefig(path)


@dataclass(frozen=True)
class Plan:
    """One fit of a study.

    Attributes:
        strategy: of the fit.
        model: what it fits.
        data: what it is fitted to.
        arguments: of fit.
        network: whether φ is the weights of a network. They have many equivalent modes, so that R̂
            and effective numbers of draws of a weight mean little, and warnings of them are not
            shown; the study reports R̂ of what the network predicts.
    """

    strategy: Strategy
    model: Program
    data: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    network: bool = False


def fit_plans(
    plans: Mapping[str, Plan], *, seed: int, compile: bool | str, say: Say
) -> dict[str, Fitted]:
    """Runs the plans one after another.

    Args:
        plans: by the name that the fit has in tables.
        seed: of every fit.
        compile: as for `Strategy.fit`; a plan may say otherwise.
        say: takes one line per fit.
    """
    fits = {}
    for name, plan in plans.items():
        start = time.perf_counter()
        arguments = {"seed": seed, "compile": compile, "progress": False, **plan.arguments}
        with warnings.catch_warnings():
            if plan.network:
                said = "NUTS: (split R̂|an effective sample size)"
                warnings.filterwarnings("ignore", message=said)
            fits[name] = plan.strategy.fit(plan.model, plan.data, **arguments)
        say(f"{name}: fitted in {time.perf_counter() - start:.1f} s")
    return fits
