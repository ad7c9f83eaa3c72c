"""Every stored posterior: NUTS against what is known, approximations against NUTS or the same.

    python benchmarks/posteriors.py [--only NAME ...] [--quick | --again | --kept]
        [--approximations [--strategies NAME ...]]

needs $HBMETA_DATA or ../shared/data. NUTS draws until every parameter of a program has a bulk
effective sample size of 4,000 (8,000 for eight schools, whose τ has a heavy tail). A parameter
agrees where its mean lies within 0.1 reference sd and its sd within 10 %; heavy tails are judged on
the log scale where draws are stored. How often correct draws would fail is printed with the table.
Results are kept in results/posteriors, program by program, and taken from there when the benchmark
runs again; --again runs them anew, --kept shows what is there, --quick draws little and keeps
nothing.

With --approximations every other strategy is fitted to the same programs instead, and its moments
of φ are held against the stored reference, or against NUTS's where none is stored; the figure
docs/images/time_against_distance.png shows seconds against distance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path.insert(0, str(ROOT))

from benchmarks import agreement  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.posterior_programs import CASES, Case, Moments  # noqa: E402
from benchmarks.posterior_programs.case import moments_of_chains  # noqa: E402
from benchmarks.programs import data_folder  # noqa: E402
from hbmeta.files import write_text  # noqa: E402
from hbmeta.inference import NUTS  # noqa: E402

SEED = 0
DRAWS = 3000
MOST_DRAWS = 50_000
ATTEMPTS = 4
KEPT = ROOT / "results" / "posteriors"


@dataclass(frozen=True)
class Row:
    """A program against one reference, or against none."""

    source: str
    agreements: tuple[agreement.Agreement, ...]

    @property
    def disagreeing(self) -> list[agreement.Agreement]:
        """What lies outside the limits."""
        return [row for row in self.agreements if not row.agrees]


@dataclass(frozen=True)
class Sampled:
    """What NUTS gave for one program.

    Attributes:
        moments: of every parameter, computed ones included.
        seconds: of the last run's sampling; compiling is the first run's.
    """

    name: str
    draws: int
    parameters: int
    ess: float
    r_hat: float
    divergences: int
    deep_trees: int
    parametrisation: str
    seconds_sampling: float
    seconds_compiling: float
    moments: dict[str, Moments] = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)

    def to_json(self) -> str:
        """For a file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Sampled:
        """The inverse."""
        stored = json.loads(text)
        stored["moments"] = {name: Moments(**row) for name, row in stored["moments"].items()}
        stored["rows"] = tuple(
            Row(row["source"], tuple(_agreement(entry) for entry in row["agreements"]))
            for row in stored["rows"]
        )
        return cls(**stored)


def _agreement(entry: dict[str, Any]) -> agreement.Agreement:
    return agreement.Agreement(
        entry["parameter"], Moments(**entry["found"]), Moments(**entry["reference"])
    )


def sample(
    case: Case,
    folder: Path,
    *,
    draws: int = DRAWS,
    ess: float | None = None,
    processes: int | None = None,
    seed: int = SEED,
) -> Sampled:
    """Runs NUTS with more draws until every parameter has the effective number wanted.

    Args:
        case: the program.
        folder: the shared data.
        draws: per chain, to begin with.
        ess: bulk effective draws to reach, that of the case by default; 0 for a single run.
        processes: chains at a time.
        seed: of the chains.
    """
    wanted = case.ess if ess is None else ess
    tasks = case.tasks(folder)
    compiling = None
    for _ in range(ATTEMPTS):
        strategy = NUTS(
            draws=draws,
            warmup=1000,
            target_accept=case.target_accept,
            processes=processes,
        )
        fitted = strategy.fit(case.program, tasks, seed=seed, progress=False)
        compiling = fitted.seconds.staging if compiling is None else compiling
        found = agreement.draws_by_name(fitted)
        effective = float(agreement.effective_draws(found).min())
        if effective >= wanted or draws == MOST_DRAWS:
            break
        draws = min(MOST_DRAWS, int(1.2 * draws * wanted / max(effective, 1.0)) + 1)
    assert compiling is not None
    judged = agreement.with_logarithms(found, case.log)
    rows = [
        Row(reference.source, tuple(agreement.compare(judged, reference.moments)))
        for reference in case.references(folder)
    ]
    return Sampled(
        name=case.name,
        draws=strategy.draws,
        parameters=len(found),
        ess=effective,
        r_hat=float(agreement.split_r_hat(found).max()),
        divergences=int(fitted.info["divergences"]),
        deep_trees=int(fitted.info["deep_trees"]),
        parametrisation=str(fitted.info.get("parametrisation", "as written")),
        seconds_sampling=float(fitted.info["seconds_sampling"]),
        seconds_compiling=compiling,
        moments={name: moments_of_chains(values) for name, values in judged.items()},
        rows=tuple(rows),
    )


def table(results: Iterable[Sampled]) -> str:
    """One line per program and reference."""
    lines = [
        "| program | reference | parameters | agree | smallest ESS | largest R̂ | divergences "
        "| largest shift of a mean (sd) | sd ratio | sampling (s) | compiling (s) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        run = f"{result.ess:,.0f} | {result.r_hat:.4f} | {result.divergences}"
        seconds = f"{result.seconds_sampling:.1f} | {result.seconds_compiling:.1f}"
        for row in result.rows:
            shifts = [entry.shift for entry in row.agreements]
            ratios = [entry.ratio for entry in row.agreements]
            lines.append(
                f"| {result.name} | {row.source} | {len(shifts)} "
                f"| {len(shifts) - len(row.disagreeing)} | {run} | {max(shifts):.3f} "
                f"| {min(ratios):.3f} to {max(ratios):.3f} | {seconds} |"
            )
        if not result.rows:
            lines.append(
                f"| {result.name} | none stored | {result.parameters} | – | {run} | – | – "
                f"| {seconds} |"
            )
    return "\n".join(lines)


def false_alarms(results: Sequence[Sampled]) -> str:
    """How often a correct sampler would fail anything in the table, in a sentence."""
    rates = [
        entry.false_alarm for result in results for row in result.rows for entry in row.agreements
    ]
    known = [rate for rate in rates if not math.isnan(rate)]
    return (
        f"A correct sampler with these effective numbers of draws would fail one of the "
        f"{len(known)} comparisons whose reference states its error with probability below "
        f"{max(sum(known), 1e-12):.1g}. {len(rates) - len(known)} references (BUGS) state none."
    )


def trouble(results: Iterable[Sampled]) -> list[str]:
    """What disagrees, and which runs cannot be relied on."""
    lines = []
    for result in results:
        wanted = CASES[result.name].ess
        if result.ess < wanted:
            lines.append(f"TOO FEW: {result.name}: {result.ess:.0f} effective draws of {wanted}")
        if result.divergences:
            lines.append(f"DIVERGES: {result.name}: {result.divergences} transitions")
        lines += [
            f"DISAGREES: {result.name}, {row.source}: {entry}"
            for row in result.rows
            for entry in row.disagreeing
        ]
    return lines


def notes(cases: Iterable[Case]) -> str:
    """What differs from the stored definitions."""
    lines = [f"- {case.name}: {case.note}." for case in cases if case.note]
    return "\n".join(lines)


def kept(name: str) -> Path:
    """Where a program's result is kept."""
    return KEPT / f"{name.replace('/', '-')}.json"


def results_for(
    cases: Sequence[Case], folder: Path, *, mode: str, processes: int | None
) -> list[Sampled]:
    """Kept results, and new ones where there are none; each is shown as it comes.

    Args:
        cases: the programs.
        folder: the shared data.
        mode: "resume"; "again" for new ones alone, "kept" for kept ones alone, "quick" for new ones
            of few draws that are not kept.
        processes: chains at a time.
    """
    found = []
    quick = mode == "quick"
    for case in cases:
        path = kept(case.name)
        if mode in ("resume", "kept"):
            if path.exists():
                found.append(Sampled.from_json(path.read_text()))
            if path.exists() or mode == "kept":
                continue
        result = (
            sample(case, folder, draws=500, ess=0, processes=processes)
            if quick
            else sample(case, folder, processes=processes)
        )
        if not quick:
            write_text(path, result.to_json())
        print("\n".join(table([result]).splitlines()[2:]), file=sys.stderr, flush=True)
        found.append(result)
    return found


def main() -> int:
    """Parses the arguments, runs, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    for name, about in (
        ("quick", "few draws and steps; nothing is kept"),
        ("again", "run anew what was kept"),
        ("kept", "show what was kept, run nothing"),
    ):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=about)
    parser.set_defaults(mode="resume")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="programs by a part of the name")
    parser.add_argument("--approximations", action="store_true", help="the other strategies")
    parser.add_argument("--strategies", nargs="+", metavar="NAME", help="some of them")
    parser.add_argument("--processes", type=int, help="chains at a time; the cores by default")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = data_folder()
    if not folder.is_dir():
        print(f"posteriors: needs the reference data at {folder}; set HBMETA_DATA")
        return 1
    parts = arguments.only or [""]
    cases = [case for name, case in CASES.items() if any(part in name for part in parts)]
    if not cases:
        parser.error(f"no program is named like {parts}; known are {', '.join(CASES)}")
    # Approximations are held against what NUTS gave before.
    again = arguments.approximations and arguments.mode == "again"
    results = results_for(
        cases,
        folder,
        mode="resume" if again else arguments.mode,
        processes=arguments.processes,
    )
    if arguments.approximations:
        from benchmarks import approximations

        approximations.report(results, folder, names=arguments.strategies, mode=arguments.mode)
        return 0
    print(f"# NUTS against stored posteriors\n\n{describe(SEED)}; 4 chains\n")
    print(table(results))
    print(f"\n{false_alarms(results)}")
    print("\n".join(f"\n{line}" for line in trouble(results)))
    done = {result.name for result in results}
    print(f"\n{len(done)} of the {len(CASES)} stored definitions are in the table.", end=" ")
    print(f"Not run: {', '.join(sorted(CASES.keys() - done)) or 'none'}.")
    print(f"What differs from the stored text:\n\n{notes(cases)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
