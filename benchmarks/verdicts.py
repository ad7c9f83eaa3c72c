"""`hbmeta.diagnose` without a reference at hand, against the truth that stored references tell.

Every strategy is fitted to every program (by benchmarks/approximations.py, whose distances are kept
on the way) and diagnosed; the diagnosis sees the fit and the rows, and nothing of what is stored.
The truth: a parameter is wrong where its mean lies more than 0.3 sd from the reference's or its sd
outside [0.75, 1.33] of it; a fit is wrong where more than one in ten of its parameters is. A
verdict that is not "right" counts as a flag, "unverified" too. Wanted: nine in ten wrong fits
flagged, one in ten right fits at most.

    python -m benchmarks.verdicts --only eight_schools radon_hierarchical --strategies Laplace NUTS

Results are kept, one file per program and strategy, so that a run goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import hbmeta
from benchmarks import agreement, approximations
from benchmarks.approximations import (
    SEED,
    STEPS,
    Fit,
    Result,
    fit,
    moments_by_name,
    reference_of,
    strategies,
)
from benchmarks.machine import cpu_seconds, describe
from benchmarks.posterior_programs import CASES, Moments
from benchmarks.posteriors import Sampled
from benchmarks.posteriors import kept as kept_sample
from benchmarks.programs import data_folder
from hbmeta.diagnosis import reference_fit
from hbmeta.diagnosis.records import Diagnosis, Verdict, summed_up
from hbmeta.distances import SD_LIMITS, TASK_LIMIT
from hbmeta.files import write_text
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "verdicts"
WORDS: tuple[Verdict, ...] = ("right", "wrong", "unverified")


@dataclass(frozen=True)
class Judged:
    """A fit's verdicts and the truth. Without them it was refused or failed: `why`.

    Attributes:
        counts: of parameters, by "truth/verdict".
        means: truth and verdict on posterior means alone.
        point: whether the posterior has no spread, so that it is wrong by construction.
    """

    program: str
    strategy: str
    why: str = ""
    truth: str = ""
    verdict: str = ""
    means: tuple[str, str] = ("", "")
    counts: dict[str, int] = field(default_factory=dict)
    point: bool = False
    reference: str = ""
    symptoms: tuple[str, ...] = ()
    seconds_fit: float = math.nan
    seconds_diagnose: float = math.nan


def names_of(posterior: TaskPosterior) -> dict[tuple[str, object, tuple[int, ...]], str]:
    """The name in a reference of each entry of a site of a task."""
    out: dict[tuple[str, object, tuple[int, ...]], str] = {}
    for name, (mean, _) in posterior.moments(draws=2).items():
        flat = agreement.labels(name, mean.numel())
        entries = [()] if mean.dim() == 1 else list(torch.ones(mean.shape[1:]).nonzero().tolist())
        keys = [(name, task, tuple(entry)) for task in posterior.ids for entry in entries]
        out |= dict(zip(keys, flat, strict=True))
    return out


def truth_of(found: Moments, reference: Moments) -> tuple[Verdict, Verdict]:
    """On mean and sd, and on the mean alone."""
    close = abs(found.mean - reference.mean) <= TASK_LIMIT * reference.sd
    spread = SD_LIMITS[0] <= found.sd / reference.sd <= SD_LIMITS[1]
    return ("right" if close and spread else "wrong"), ("right" if close else "wrong")


def compare(
    diagnosis: Diagnosis, posterior: TaskPosterior, reference: Mapping[str, Moments]
) -> tuple[Counter[str], list[tuple[Verdict, Verdict]]]:
    """Parameters by "truth/verdict", and the truths about them."""
    found, names = moments_by_name(posterior), names_of(posterior)
    count: Counter[str] = Counter()
    truths = []
    for parameter in diagnosis.parameters:
        name = names.get((parameter.site, parameter.task, parameter.index))
        if name is None or name not in reference or not reference[name].sd > 0:
            continue
        truth = truth_of(found[name], reference[name])
        truths.append(truth)
        count[f"{truth[0]}/{parameter.verdict}"] += 1
    return count, truths


@dataclass(frozen=True)
class Judge:
    """What `diagnose` makes to judge by, made once for a program; and the seconds that it took."""

    fitted: Fitted | None
    seconds: float

    @staticmethod
    def of(fit: Fit) -> Judge:
        """From the first fit of a program; None where every fit is judged given its own θ."""
        start = cpu_seconds()
        fitted = reference_fit(fit.fitted, fit.tasks, seed=SEED + 1)
        return Judge(fitted, cpu_seconds() - start)


def judge(result: Result, fit: Fit, reference: Mapping[str, Moments], by: Judge) -> Judged:
    """Diagnoses a fit, and looks up the truth."""
    program, strategy = result.program, result.strategy
    start = cpu_seconds() - by.seconds
    try:
        diagnosis = hbmeta.diagnose(
            fit.fitted, fit.tasks, reference=by.fitted or "auto", seed=SEED + 1
        )
        count, truths = compare(diagnosis, fit.posterior, reference)
    except Exception as error:  # a bug, to be seen in the table, and not the end of a long run
        return Judged(program, strategy, f"crashed: {type(error).__name__}: {error}")
    return Judged(
        program,
        strategy,
        truth=summed_up([both for both, _ in truths]),
        verdict=diagnosis.verdict,
        means=(summed_up([mean for _, mean in truths]), diagnosis.verdict_of_means),
        counts=dict(count),
        point=any(s.name == "point estimate" for s in diagnosis.symptoms),
        reference=diagnosis.reference,
        symptoms=tuple(s.name for s in diagnosis.symptoms),
        seconds_fit=result.seconds_fit,
        seconds_diagnose=cpu_seconds() - start,
    )


def matrix(pairs: Sequence[tuple[str, str]] | Counter[tuple[str, str]]) -> str:
    """Truth against verdict, and the shares that are flagged."""
    count = Counter(pairs)
    lines = ["| truth | right | wrong | unverified | flagged |", "|---|---|---|---|---|"]
    for truth in ("right", "wrong"):
        row = [count[truth, verdict] for verdict in WORDS]
        share = f"{100 * sum(row[1:]) / sum(row):.0f} %" if sum(row) else "–"
        lines.append(f"| {truth} | {' | '.join(map(str, row))} | {share} |")
    return "\n".join(lines)


def report(results: Sequence[Judged]) -> str:
    """The matrices, every fit, the misses, and what was refused."""
    ran = [r for r in results if not r.why]
    spread = [r for r in ran if not r.point]
    parameters: Counter[tuple[str, str]] = Counter()
    for r in ran:
        for key, number in r.counts.items():
            truth, verdict = key.split("/")
            parameters[truth, verdict] += number
    parts = [
        ("Fits", matrix([(r.truth, r.verdict) for r in ran])),
        ("Fits with a spread (no point estimates)", matrix([(r.truth, r.verdict) for r in spread])),
        ("Means alone, all fits", matrix([r.means for r in ran])),
        ("Parameters of all fits", matrix(parameters)),
    ]
    lines = ["# Verdicts without a reference at hand, against the truth", ""]
    lines += [f"{describe(SEED)}", ""]
    for title, text in parts:
        lines += [f"## {title}", "", text, ""]
    lines += [
        "| program | strategy | truth | verdict | means | judged by | fit (CPU s) "
        "| diagnose (CPU s) |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r.program} | {r.strategy} | {r.truth} | {r.verdict} | {'/'.join(r.means)} "
        f"| {r.reference or '–'} | {r.seconds_fit:.1f} | {r.seconds_diagnose:.1f} |"
        for r in ran
    ]
    misses = [r for r in ran if (r.truth == "wrong") != (r.verdict != "right")]
    lines += ["", f"{len(misses)} misses (parameters as truth/verdict):", ""]
    lines += [f"- {r.strategy} on {r.program}: {_explained(r)}" for r in misses]
    refused = sum(bool(r.why) for r in results)
    lines += ["", f"{refused} fits were refused or failed; approximations.md says why."]
    lines += ["", approximations.not_run(r.program for r in results)]
    return "\n".join(lines)


def _explained(r: Judged) -> str:
    """What was counted, and what the diagnosis complained of."""
    counts = ", ".join(f"{number} {key}" for key, number in r.counts.items())
    symptoms = ", ".join(dict.fromkeys(r.symptoms)) or "none"
    return f"it is {r.truth}, the verdict is {r.verdict}; {counts}; symptoms: {symptoms}"


def kept(program: str, strategy: str) -> Path:
    """Where a result is kept."""
    return KEPT / f"{program.replace('/', '-')}.{strategy}.json"


def from_file(path: Path) -> Judged:
    """The inverse of what is kept."""
    fields = json.loads(path.read_text())
    for name in ("means", "symptoms"):
        fields[name] = tuple(fields[name])
    return Judged(**fields)


def main() -> int:
    """Parses the arguments, runs what is not kept, and prints the tables of all that is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="programs")
    parser.add_argument("--strategies", nargs="+", metavar="NAME", help="some of them")
    parser.add_argument("--kept", action="store_true", help="show what was kept, run nothing")
    parser.add_argument("--again", action="store_true", help="run anew what was kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = data_folder()
    if not arguments.kept and not folder.is_dir():
        print(f"verdicts: needs the reference data at {folder}; set HBMETA_DATA")
        return 1
    for case in CASES.values():
        named = any(part in case.name for part in arguments.only)
        if arguments.kept or not named:
            continue
        path = kept_sample(case.name)
        sampled = Sampled.from_json(path.read_text()) if path.exists() else None
        reference = reference_of(case, sampled, folder)
        if not reference:
            print(f"{case.name}: needs its run of benchmarks/posteriors.py first", file=sys.stderr)
            continue
        by = None
        for name, strategy in strategies(arguments.strategies).items():
            path = kept(case.name, name)
            if path.exists() and not arguments.again:
                continue
            distance, found = fit(name, strategy, case, reference, folder, STEPS)
            approximations.keep(distance, "resume")
            if by is None and found is not None:
                by = Judge.of(found)
            result = (
                Judged(case.name, name, distance.why)
                if found is None or by is None
                else judge(distance, found, reference, by)
            )
            print(f"{distance}\n{result}", file=sys.stderr, flush=True)
            if not result.why.startswith("crashed"):
                write_text(path, json.dumps(asdict(result), ensure_ascii=False))
    print(report([from_file(path) for path in sorted(KEPT.glob("*.json"))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
