"""`hbmeta diagnose RUN`: which of the fits that were kept have a posterior to be believed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from math import isnan
from pathlib import Path

from hbmeta.cli.runs import open_run
from hbmeta.diagnosis import Diagnosis, reference_fit
from hbmeta.diagnosis import diagnose as diagnosed
from hbmeta.diagnosis_plots import pareto_k, verdicts
from hbmeta.files import atomic, write_text
from hbmeta.fitted import Fitted
from hbmeta.tables import aligned

__all__ = ["diagnose"]


def diagnose(arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Print one line per fit and then all about one of them; `say` takes the progress.

    The one is the first whose posterior is not right, or the first of all.
    """
    run = open_run(arguments.run)
    names = run.fits if arguments.strategy is None else (arguments.strategy,)
    reference = None if arguments.reference == "none" else arguments.reference
    found: dict[str, Diagnosis] = {}
    judge: Fitted | None = None
    for name in names:
        _, fitted = run.fitted(name)
        if judge is None and reference is not None:
            judge = reference_fit(fitted, reference=reference, seed=arguments.seed)
        found[name] = diagnosed(fitted, reference=judge or reference, seed=arguments.seed)
        say(f"{name}: diagnosed in {found[name].seconds:.1f} s")
    shown = next((name for name in names if found[name].verdict != "right"), names[0])
    if len(found) > 1:
        print(f"POSTERIORS OF {len(found[shown].tasks)} GROUPS\n{_table(found)}\n")
        print(f"{shown.upper()} (another: --strategy NAME)")
    print(found[shown])
    if arguments.out is not None:
        content = {name: json.loads(one.to_json()) for name, one in found.items()}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(arguments.out, text + "\n")
    if arguments.figures is not None:
        _draw(found, arguments.figures)


def _draw(found: Mapping[str, Diagnosis], folder: Path) -> None:
    """verdicts.png and, where a fit has k̂, pareto_k.png."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = {
        name: one for name, one in found.items() if not all(isnan(p.shift) for p in one.parameters)
    }
    weighed = any(not isnan(task.pareto_k) for one in found.values() for task in one.tasks)
    figures = {
        **({"verdicts": verdicts(measured)} if measured else {}),
        **({"pareto_k": pareto_k(found)} if weighed else {}),
    }
    for name, figure in figures.items():
        with atomic(folder / f"{name}.png") as path:
            figure.savefig(path)


def _table(found: Mapping[str, Diagnosis]) -> str:
    """The verdicts of all fits, and what they rest on."""
    head = ["", "posterior", "means alone", "wrong parameters"]
    body, judges = [], dict[str, list[str]]()
    for name, one in found.items():
        wrong = sum(parameter.verdict == "wrong" for parameter in one.parameters)
        cells = [one.verdict, one.verdict_of_means, f"{wrong} of {len(one.parameters)}"]
        body.append([name, *cells])
        judges.setdefault(one.reference or "nothing", []).append(name)
    first, *lines = aligned(head, body)
    symptoms = [", ".join(s.name for s in one.symptoms) or "–" for one in found.values()]
    lines = [f"{line}  {text}" for line, text in zip(lines, symptoms, strict=True)]
    rest = [f"Judged by {words}: {', '.join(names)}." for words, names in judges.items()]
    return "\n".join([f"{first}  symptoms", *lines, *rest])
