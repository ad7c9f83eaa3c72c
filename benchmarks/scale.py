"""Many rows and many groups: university ratings by three strategies, 100,000 groups by a guide.

    python -m benchmarks.scale [--only NAME ...] [--quick | --again | --kept]

needs $HBMETA_DATA or ../shared/data. 73,421 ratings of 1,128 lecturers by 2,972 students
(benchmarks/scale_program.py) are fitted by NUTS, Variational and Laplace, each in a process of its
own, and stand beside the maximum of the likelihood, which benchmarks/crossed.py finds by dense
algebra. Then a guide trained on 1,000 groups of 5 to 20 rows adapts to 100,000 others, read from a
data frame. Results are kept in results/scale, part by part, and taken from there when the benchmark
runs again; --again runs them anew, --kept shows what is there, --quick runs small ones and keeps
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.crossed import Crossed
from benchmarks.machine import cpu_seconds, describe
from benchmarks.programs import data_folder
from benchmarks.scale_program import FIXED, SCALES, Ratings, part_of, read_ratings
from hbmeta import models
from hbmeta.files import write_text
from hbmeta.fitted import Fitted
from hbmeta.inference import NUTS, AmortizedGuide, Laplace, Variational
from hbmeta.tasks import Tasks, from_frame

SEED = 0
ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "scale"
INTEGRATED = ("mu", "beta", "lecturer", "z")
# Limits of a shift from NUTS in its posterior standard deviations: of the means of μ, β and each
# scale but that of the 14 departments, whose posterior is skewed; of that one; and of the students'
# means, root mean square.
SHIFT, SHIFT_OF_FEW, SHIFT_OF_STUDENTS = 0.5, 1.0, 0.2
MINUTES, SECONDS = 10, 30

__all__ = ["Adapted", "Fit", "Size", "adapt_many", "fit_ratings", "likelihood", "main", "table"]


@dataclass(frozen=True)
class Size:
    """How much is run; the defaults are those of the kept results."""

    ratings: int | None = None
    draws: int = 1000
    warmup: int = 400
    steps: int = 2000
    known: int = 1000
    groups: int = 100_000
    guide_steps: int = 2000
    compile: bool | str = "auto"


@dataclass(frozen=True)
class Fit:
    """One posterior of the ratings.

    Attributes:
        name: of the strategy.
        seconds: of the fit, compiling included.
        cpu: seconds of processors, of this process and its children: what `seconds` would be at
            most on one idle core.
        megabytes: largest resident memory of the process.
        parameters: mean and standard deviation of μ, β and the scales, 0 for a point.
        students: mean and standard deviation of every student's effect.
        converged: how it was judged, in words.
    """

    name: str
    seconds: float
    cpu: float
    megabytes: float
    parameters: dict[str, tuple[float, float]]
    students: tuple[list[float], list[float]]
    converged: str


@dataclass(frozen=True)
class Adapted:
    """100,000 groups and a guide.

    Attributes:
        groups: number of them, with `rows` rows.
        seconds: by step.
        cpu: seconds of processors, by step.
        megabytes: largest resident memory of the process.
        shift: root mean square and largest shift of the means, in exact posterior sds.
        ratio: smallest and largest ratio of the sds, over the groups compared.
    """

    groups: int
    rows: int
    seconds: dict[str, float]
    cpu: dict[str, float]
    megabytes: float
    shift: tuple[float, float]
    ratio: tuple[float, float]


def megabytes() -> float:
    """Largest resident memory so far, of this process or one of its children."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) / 1024


# -- the ratings ----------------------------------------------------------------------------------


def _of_nuts(fitted: Fitted) -> str:
    info = fitted.info
    return (
        f"R̂ at most {float(info['r_hat'].max()):.4f}, bulk ESS at least "
        f"{float(info['ess_bulk'].min()):.0f} over all {len(info['r_hat']):,} unknowns; "
        f"{info['divergences']} divergences"
    )


def _of_variational(fitted: Fitted) -> str:
    return f"ELBO {fitted.info['bound']:,.1f}; its rise over the last tenth {_rise(fitted)} nats"


def _rise(fitted: Fitted) -> str:
    """Mean of the ELBO over the last tenth of the steps less that over the tenth before."""
    tenth = max(len(fitted.history) // 10, 2)
    last, before = (
        -fitted.tasks.n_tasks * np.asarray(fitted.history[part])
        for part in (slice(-tenth, None), slice(-2 * tenth, -tenth))
    )
    error = math.hypot(*(part.std() / math.sqrt(tenth) for part in (last, before)))
    return f"{last.mean() - before.mean():.1f} ± {error:.1f}"


def _of_laplace(fitted: Fitted) -> str:
    info = fitted.info
    return (
        f"evidence {info['log_evidence']:,.1f}, its gradient at most {info['slope']:.2g} nats per "
        f"unit of a prior's scale after {info['evaluations']} evaluations"
    )


def strategies(size: Size) -> dict[str, tuple[Any, Callable[[Fitted], str]]]:
    """By name: settings, and how convergence is told."""
    return {
        "NUTS": (NUTS(draws=size.draws, warmup=size.warmup), _of_nuts),
        "Variational": (Variational(theta="distribution"), _of_variational),
        "Laplace": (Laplace(integrated=INTEGRATED), _of_laplace),
    }


def fit_ratings(name: str, program: Ratings, tasks: Tasks, size: Size) -> Fit:
    """The ratings by one strategy."""
    strategy, told = strategies(size)[name]
    start, before = time.perf_counter(), cpu_seconds()
    fitted = strategy.fit(
        program, tasks, steps=size.steps, seed=SEED, compile=size.compile, progress=False
    )
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    mean, sd = fitted.posterior.moments()["student"]
    return Fit(
        name,
        seconds,
        cpu,
        megabytes(),
        {n: _moments(fitted.globals()[n]) for n in (*FIXED, *SCALES)},
        (_short(mean), _short(sd)),
        told(fitted),
    )


def _moments(draws: Tensor) -> tuple[float, float]:
    sd = float(draws.std(0))
    # A scale at the maximum of the evidence is the same in every draw.
    return float(draws.mean()), sd if sd > 1e-12 else 0.0


def _short(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def likelihood(program: Ratings, tasks: Tasks) -> Fit:
    """The maximum of the likelihood, and the students' effects given it."""
    start, before = time.perf_counter(), cpu_seconds()
    crossed = Crossed.of_ratings(program, tasks)
    found = crossed.maximum()
    values = [*found.fixed, *found.scales]
    return Fit(
        "maximum likelihood",
        time.perf_counter() - start,
        cpu_seconds() - before,
        megabytes(),
        {n: (float(v), 0.0) for n, v in zip((*FIXED, *SCALES), values, strict=True)},
        (_short(found.students), _short(found.students_sd)),
        f"log likelihood {found.log_likelihood:,.3f}",
    )


def shifts(found: Fit, reference: Fit) -> dict[str, float]:
    """Differences of the means in the reference's sds, and of the students' (root mean square)."""
    out = {
        name: (found.parameters[name][0] - mean) / sd
        for name, (mean, sd) in reference.parameters.items()
    }
    (mean, _), (mean_there, sd_there) = map(np.asarray, (found.students, reference.students))
    out["students"] = float(np.sqrt(np.mean(((mean - mean_there) / sd_there) ** 2)))
    return out


def outside(found: Fit, reference: Fit) -> list[str]:
    """What is shifted by more than its limit."""
    limits = dict.fromkeys((*FIXED, *SCALES), SHIFT)
    limits |= {"tau_department": SHIFT_OF_FEW, "students": SHIFT_OF_STUDENTS}
    return [n for n, value in shifts(found, reference).items() if not abs(value) <= limits[n]]


def table(fits: Mapping[str, Fit]) -> str:
    """What each found, and how far it is from NUTS."""
    names = (*FIXED, *SCALES)
    lines = [
        f"| | seconds | CPU seconds | MiB | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for fit in fits.values():
        cells = [
            f"{mean:.4f}" + (f" ± {sd:.4f}" if sd else "") for mean, sd in fit.parameters.values()
        ]
        used = [f"{value:.0f}" for value in (fit.seconds, fit.cpu, fit.megabytes)]
        lines.append(f"| {' | '.join([fit.name, *used, *cells])} |")
    reference = fits.get("NUTS")
    if reference is not None:
        lines += [
            "",
            f"| shift from NUTS, in its sds | {' | '.join(names)} | students (rms) | sd ratio of "
            "students | outside its limit |",
            f"|---|{'---|' * len(names)}---|---|---|",
        ]
        for fit in fits.values():
            if fit is not reference:
                found = shifts(fit, reference)
                cells = [f"{found[name]:+.2f}" for name in names]
                ratio = np.mean(np.asarray(fit.students[1]) / np.asarray(reference.students[1]))
                verdict = ", ".join(outside(fit, reference)) or "nothing"
                lines.append(
                    f"| {fit.name} | {' | '.join(cells)} | {found['students']:.3f} | {ratio:.3f} "
                    f"| {verdict} |"
                )
        lines += [
            "",
            f"Limits: {SHIFT} sd, {SHIFT_OF_FEW} of the departments' scale, {SHIFT_OF_STUDENTS} "
            "of the students.",
        ]
    lines += ["", *(f"- {fit.name}: {fit.converged}." for fit in fits.values())]
    return "\n".join(lines)


# -- many groups ----------------------------------------------------------------------------------


def groups_frame(groups: int, seed: int) -> pd.DataFrame:
    """Lines with a random intercept and slope, 5 to 20 rows a group."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rng.integers(5, 21, groups))
    intercept = 1.3 + 0.4 * rng.standard_normal(groups)
    slope = -0.6 + 0.3 * rng.standard_normal(groups)
    x = rng.standard_normal(len(group))
    y = intercept[group] + slope[group] * x + 0.8 * rng.standard_normal(len(group))
    return pd.DataFrame({"group": group, "x": x, "y": y})


def exact_moments(fitted: Fitted, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """Mean and sd (tasks, 2) of the coefficients given θ, task by task from the normal equations.

    With X = (1, x): precision X'X / noise² + diag(1 / scale²).
    """
    theta = fitted.globals()
    weight = theta["scale"].square().reciprocal()
    means, sds = [], []
    for k in range(tasks.n_tasks):
        one = tasks[k : k + 1]
        assert one.flat_y is not None
        x = torch.cat([torch.ones_like(one.flat_x), one.flat_x], -1)
        precision = x.T @ x / theta["noise"].square() + weight.diag()
        right = x.T @ one.flat_y / theta["noise"].square() + weight * theta["mean"]
        means.append(torch.linalg.solve(precision, right))
        sds.append(torch.linalg.inv(precision).diagonal().sqrt())
    return torch.stack(means), torch.stack(sds)


def adapt_many(size: Size, compared: int = 1000) -> Adapted:
    """Trains the guide, and adapts it to new groups from a data frame."""
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        start, before = time.perf_counter(), cpu_seconds()
        found = call()
        seconds[what], cpu[what] = time.perf_counter() - start, cpu_seconds() - before
        return found

    known = from_frame(groups_frame(size.known, SEED), group="group", x="x", y="y")
    frame = groups_frame(size.groups, SEED + 1)
    fitted = timed(
        "fit",
        lambda: AmortizedGuide().fit(
            models.VaryingEffects(varying=["intercept", "x"]),
            known,
            steps=size.guide_steps,
            tasks_per_step=min(100, size.known),
            seed=SEED,
            compile=size.compile,
            progress=False,
        ),
    )
    new = timed("from_frame", lambda: from_frame(frame, group="group", x="x", y="y").support)
    posterior = timed("adapt", lambda: fitted.adapt(new))
    mean, sd = timed("moments", lambda: posterior.moments()["coefficients"])
    timed("predict", lambda: posterior.predict(new).interval(0.9))
    used = megabytes()
    some = new[: min(compared, size.groups)]
    exact, exact_sd = exact_moments(fitted, some)
    shift = (mean[: some.n_tasks] - exact) / exact_sd
    ratio = sd[: some.n_tasks] / exact_sd
    return Adapted(
        new.n_tasks,
        new.n_points,
        seconds,
        cpu,
        used,
        (float(shift.square().mean().sqrt()), float(shift.abs().max())),
        (float(ratio.min()), float(ratio.max())),
    )


def report(found: Adapted) -> str:
    """In sentences."""
    whole = sum(found.seconds[name] for name in ("from_frame", "adapt"))
    steps = ", ".join(
        f"{name} {value:.1f} s ({found.cpu[name]:.1f} of a processor)"
        for name, value in found.seconds.items()
    )
    return "\n".join(
        [
            f"- {found.groups:,} groups, {found.rows:,} rows: {steps}; {found.megabytes:.0f} MiB",
            f"- read and adapted in {whole:.1f} s, at most {SECONDS}: "
            f"{'met' if whole <= SECONDS else 'missed'}",
            f"- against the exact posterior given θ (1,000 of them): shift of the means "
            f"{found.shift[0]:.3f} sd (root mean square), {found.shift[1]:.3f} at most; "
            f"sd ratio {found.ratio[0]:.3f} to {found.ratio[1]:.3f}",
        ]
    )


# -- running --------------------------------------------------------------------------------------

PARTS = ("likelihood", "NUTS", "Variational", "Laplace", "groups")
QUICK = Size(
    ratings=2000, draws=100, warmup=100, steps=100, known=100, groups=2000, guide_steps=100
)


def run_part(name: str, size: Size) -> Fit | Adapted:
    """One part."""
    if name == "groups":
        return adapt_many(size)
    tasks, program = read_ratings(data_folder()), Ratings()
    if size.ratings is not None:
        tasks, program = part_of(tasks, size.ratings, SEED)
    if name == "likelihood":
        return likelihood(program, tasks)
    return fit_ratings(name, program, tasks, size)


def load(name: str) -> Fit | Adapted | None:
    """What is kept of a part."""
    path = KEPT / f"{name}.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return Adapted(**stored) if name == "groups" else Fit(**stored)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    for flag, about in (
        ("quick", "small ones; nothing is kept"),
        ("again", "run anew what was kept"),
        ("kept", "show what was kept, run nothing"),
        ("alone", "run one part in this process and keep it"),
    ):
        mode.add_argument(f"--{flag}", dest="mode", action="store_const", const=flag, help=about)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if not data_folder().is_dir() and chosen.only != ["groups"]:
        print(f"scale: needs the reference data at {data_folder()}; set HBMETA_DATA")
        return 1
    if chosen.mode == "alone":
        for name in chosen.only:
            found = run_part(name, Size())
            write_text(KEPT / f"{name}.json", json.dumps(asdict(found)) + "\n")
        return 0
    results: dict[str, Any] = {}
    for name in chosen.only:
        if chosen.mode == "quick":
            results[name] = run_part(name, QUICK)
            continue
        if chosen.mode == "again" or (chosen.mode is None and load(name) is None):
            command = [sys.executable, "-m", "benchmarks.scale", "--alone", "--only", name]
            if subprocess.run(command, check=False).returncode:
                return 1
        results[name] = load(name)
    print(f"# Scale\n\n{describe(SEED)}\n")
    fits = {name: found for name, found in results.items() if isinstance(found, Fit)}
    if fits:
        print(f"## University ratings\n\n{table(fits)}")
        for what in ("seconds", "cpu"):
            slowest = max(getattr(fit, what) for fit in fits.values())
            met = "met" if slowest <= 60 * MINUTES else "missed"
            clock = "by the clock" if what == "seconds" else "of a processor"
            print(f"- each in at most {MINUTES} minutes {clock}: {met}")
    if isinstance(results.get("groups"), Adapted):
        print(f"\n## Many groups\n\n{report(results['groups'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
