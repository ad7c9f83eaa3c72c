"""Approximations of stored posteriors: distance to the reference, and what they cost.

For every coordinate of φ (all tasks, computed sites included) with mean m and sd s,

    d = (m − m_ref) / s_ref,   r = s / s_ref,   W2² = d² + (1 − r)²

the last being the squared distance of Wasserstein between N(m, s²) and the reference's, in its sds.
Shown are the median and the largest |d|, the median r, and the root mean square of W2. A strategy
that holds θ at a point is judged against p(φ | y) with θ integrated out, as a person would use it.
Moments that need draws take 4,000 of them, so that distances below 0.02 are noise. NUTS is there
with its defaults and another seed than the run that is the reference where nothing is stored.

Seconds are processor seconds, compilers included: what one core of an idle machine would take, and
hardly moved by other work beside.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import agreement
from benchmarks.machine import cpu_seconds, describe
from benchmarks.posterior_programs import CASES, Case, Moments
from hbmeta import inference
from hbmeta.errors import HbmetaError, UnsupportedModelError
from hbmeta.files import write_text
from hbmeta.fitted import Fitted
from hbmeta.inference import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Episode, Tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.posteriors import Sampled

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "posteriors" / "approximations"
FIGURE = ROOT / "docs" / "images" / "time_against_distance.png"
SEED = 1
STEPS = 2000
QUICK_STEPS = 200

# It minimises a bound on the risk of predictions, with a loss in place of the likelihood: it does
# not aim at p(φ | S).
LEFT_OUT = ("PACBayes",)
# What differs from the defaults, by the name in inference.__all__; the others run with these.
SETTINGS: dict[str, dict[str, Any]] = {
    "ExactLinear": {"prior": True},
    "Quadrature": {"prior": True},
    "MAML": {"steps": 5, "step_size": 0.05},
    "FOMAML": {"steps": 5, "step_size": 0.05},
    "Reptile": {"steps": 5, "step_size": 0.05},
    "ANIL": {"steps": 5, "step_size": 0.05},
    "MetaSGD": {"steps": 5},
}
# An sd ratio below this is that of a point.
_POINT = 0.02


@dataclass(frozen=True)
class Result:
    """A strategy on a program. Without distances it was refused or failed: `why`.

    `warned` is what the strategy itself said of its fit, the first line of each warning.
    """

    program: str
    strategy: str
    why: str = ""
    warned: tuple[str, ...] = ()
    shift_median: float = float("nan")
    shift_worst: float = float("nan")
    ratio_median: float = float("nan")
    wasserstein: float = float("nan")
    seconds_fit: float = float("nan")
    seconds_adapt: float = float("nan")

    @property
    def ran(self) -> bool:
        """Whether there is a distance."""
        return not self.why


def strategies(names: Sequence[str] | None = None) -> dict[str, Strategy]:
    """Those of hbmeta.inference that approximate p(φ | S), with the settings above."""
    found = {}
    for name in inference.__all__:
        kind = getattr(inference, name)
        if not (isinstance(kind, type) and issubclass(kind, Strategy)) or kind is Strategy:
            continue
        if name in names if names is not None else name not in LEFT_OUT:
            found[name] = kind(**SETTINGS.get(name, {}))
    return found


def moments_by_name(posterior: TaskPosterior) -> dict[str, Moments]:
    """Mean and sd of every coordinate of φ, named as the draws of NUTS are."""
    out = {}
    for name, (mean, sd) in posterior.moments().items():
        columns = zip(mean.flatten().tolist(), sd.flatten().tolist(), strict=True)
        names = agreement.labels(name, mean.numel())
        out |= {k: Moments(m, s) for k, (m, s) in zip(names, columns, strict=True)}
    return out


def distance(found: Mapping[str, Moments], reference: Mapping[str, Moments]) -> dict[str, float]:
    """The four numbers, over the coordinates that both have and whose reference varies."""
    shared = [name for name in found if name in reference and reference[name].sd > 0]
    mean, sd = (np.array([getattr(found[n], k) for n in shared]) for k in ("mean", "sd"))
    mean_ref, sd_ref = (
        np.array([getattr(reference[n], k) for n in shared]) for k in ("mean", "sd")
    )
    d, r = np.abs(mean - mean_ref) / sd_ref, sd / sd_ref
    return {
        "shift_median": float(np.median(d)),
        "shift_worst": float(d.max()),
        "ratio_median": float(np.median(r)),
        "wasserstein": float(np.sqrt(np.mean(d**2 + (1 - r) ** 2))),
    }


def reference_of(case: Case, sampled: Sampled | None, folder: Path) -> dict[str, Moments]:
    """NUTS's moments, and what is stored in their place: quadrature, else draws, else a table."""
    out = {} if sampled is None else dict(sampled.moments)
    for reference in reversed(case.references(folder)):
        out |= reference.moments
    return out


@dataclass(frozen=True)
class Fit:
    """A fit, the tasks, and the posterior of these that is judged."""

    fitted: Fitted
    tasks: Tasks
    posterior: TaskPosterior


def fit(
    name: str, strategy: Strategy, case: Case, reference: Mapping[str, Moments], folder: Path,
    steps: int,
) -> tuple[Result, Fit | None]:  # fmt: skip
    """One strategy on one program: seconds of the fit and of adapting to all its tasks again."""
    tasks = case.tasks(folder)
    # One row a task leaves none to hold back: a loss on a query then takes the support's own rows.
    trained = type(strategy).learn is Strategy.learn and strategy.needs == "split"
    single = trained and int(tasks.counts.max()) < 2
    data = Episode(tasks, tasks) if single else tasks
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            clock = [cpu_seconds()]
            fitted = strategy.fit(case.program, data, steps=steps, seed=SEED, progress=False)
            clock.append(cpu_seconds())
            adapted = fitted.adapt(tasks)
            clock.append(cpu_seconds())
            posterior = adapted if single else fitted.posterior
            found = distance(moments_by_name(posterior), reference)
    except UnsupportedModelError as error:
        return Result(case.name, name, f"refused: needed {error.needed}; found {error.found}"), None
    except HbmetaError as error:
        return Result(case.name, name, f"failed: {error}"), None
    except Exception as error:  # a bug, to be seen in the table, and not the end of a long run
        return Result(case.name, name, f"crashed: {type(error).__name__}: {error}"), None
    texts = [str(entry.message).splitlines()[0] for entry in said]
    own = tuple(dict.fromkeys(text for text in texts if text.startswith(name)))
    seconds = {"seconds_fit": clock[1] - clock[0], "seconds_adapt": clock[2] - clock[1]}
    return Result(case.name, name, warned=own, **seconds, **found), Fit(fitted, tasks, posterior)


def table(results: Sequence[Result]) -> str:
    """One line per program and strategy; what was refused comes after it."""
    lines = [
        "| program | strategy | shift, median (sd) | worst | sd ratio | W2 (sd) | fit (CPU s) "
        "| adapt (CPU s) | warned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.program} | {r.strategy} | {r.shift_median:.3f} | {r.shift_worst:.2f} "
        f"| {r.ratio_median:.2f} | {r.wasserstein:.3f} | {r.seconds_fit:.1f} "
        f"| {r.seconds_adapt:.3f} | {'yes' if r.warned else ''} |"
        for r in results
        if r.ran
    ]
    return "\n".join(lines)


def left_out(results: Sequence[Result]) -> str:
    """Refusals and failures, those of one text together."""
    programs: dict[tuple[str, str], list[str]] = {}
    for r in results:
        if not r.ran:
            programs.setdefault((r.why, r.strategy), []).append(r.program)
    names: dict[tuple[str, str], list[str]] = {}
    for (why, strategy), on in programs.items():
        names.setdefault((why, ", ".join(on)), []).append(strategy)
    return "\n".join(f"- {', '.join(who)} on {on}: {why}" for (why, on), who in names.items())


def not_run(programs: Iterable[str]) -> str:
    """Which of the stored definitions have no line, in a sentence."""
    run = set(programs)
    missing = [name for name in CASES if name not in run]
    return f"Not run: {', '.join(missing) or 'none'}."


def kept(program: str, strategy: str) -> Path:
    """Where a result is kept."""
    return KEPT / f"{program.replace('/', '-')}.{strategy}.json"


def report(
    sampled: Sequence[Sampled], folder: Path, *, names: Sequence[str] | None, mode: str
) -> None:
    """Fits, prints the tables, and draws the figure of all that was ever kept.

    Args:
        sampled: what NUTS gave, of the programs wanted.
        folder: the shared data.
        names: strategies; all by default.
        mode: as in benchmarks/posteriors.py.
    """
    results: list[Result] = []
    for reference in sampled:
        case = CASES[reference.name]
        moments = reference_of(case, reference, folder)
        for name, strategy in strategies(names).items():
            path = kept(case.name, name)
            if path.exists() and mode in ("resume", "kept"):
                results.append(from_json(path.read_text()))
            elif mode != "kept":
                steps = QUICK_STEPS if mode == "quick" else STEPS
                result, _ = fit(name, strategy, case, moments, folder, steps)
                print(f"{case.name}, {name}: {result}", file=sys.stderr, flush=True)
                keep(result, mode)
                results.append(result)
    print(f"# Approximations against stored posteriors\n\n{describe(SEED)}\n")
    print(f"{table(results)}\n\n{left_out(results)}\n\n{not_run(r.program for r in results)}")
    ever = [from_json(path.read_text()) for path in sorted(KEPT.glob("*.json"))]
    if mode != "quick" and any(r.ran for r in ever):
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        figure([r for r in ever if r.ran]).savefig(FIGURE)


def from_json(text: str) -> Result:
    """A kept result."""
    stored = json.loads(text)
    return Result(**stored | {"warned": tuple(stored.get("warned", ()))})


def keep(result: Result, mode: str) -> None:
    """Writes a result down, unless it is a quick one or a bug's."""
    if mode != "quick" and not result.why.startswith("crashed"):
        write_text(kept(result.program, result.strategy), json.dumps(asdict(result)))


def figure(results: Sequence[Result]) -> Figure:
    """Seconds to fit and adapt against distance, one mark per strategy and program."""
    from benchmarks.distance_figure import time_against_distance

    points: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, list[float]] = {}
    for r in results:
        points.setdefault(r.strategy, []).append((r.seconds_fit + r.seconds_adapt, r.wasserstein))
        ratios.setdefault(r.strategy, []).append(r.ratio_median)
    singles = [name for name, found in ratios.items() if np.median(found) < _POINT]
    return time_against_distance(points, singles)
