"""Uncertainty on sinusoids at 5 shots: MAML, soft MAML, ABML, BMAML and PLATIPUS.

    python benchmarks/bayesian_maml.py [--seed 0] [--quick] [--only NAME ...] [--figures DIR]

    y = A sin(x − b) + ε,  A ~ U[0.1, 5], b ~ U[0, π], x ~ U[−5, 5], ε ~ N(0, 0.3²)

One network for all, 1-40-40-1 (ReLU), y ~ N(f(x), 0.3²) with the noise known, so that what differs
is what is thought of the weights. Trained on 25 tasks a step with 5 + 15 points, 10,000 steps of
Adam at 1e-3 along a half cosine, 5 inner steps of α = 0.0018, which with this noise are those of
0.01 on the squared error (ABML's 0.05 is in units of the variance of its prior, which is learned:
at 0.18, the same at the start, its inner steps ran away once the prior had grown). Judged on new
tasks with 5 points to adapt to and 25 to be judged by: squared error, −log density, coverage of
the central 90 % and CRPS, mean over tasks ± half of a 95 % interval. The best that can be done, the
wave's amplitude and phase averaged over (`bayes_sinusoid`), stands below. Every fit is kept in
results/bayesian_maml, and taken from there when the benchmark runs again; an interrupted one is
resumed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from hbmeta import load, models  # noqa: E402
from hbmeta.fitted import Fitted  # noqa: E402
from hbmeta.inference import ABML, BMAML, MAML, PLATIPUS, Strategy  # noqa: E402
from hbmeta.inference.laplace import Laplace  # noqa: E402
from hbmeta.oracles import bayes_sinusoid  # noqa: E402
from hbmeta.panels import bands  # noqa: E402
from hbmeta.predictive import Predictive  # noqa: E402
from hbmeta.tasks import Episode, Sinusoids, Tasks  # noqa: E402

ITERATIONS = 10_000
NOISE = 0.3
STEP = 0.0018
SCALE = 0.1
DRAWS = 100
TASKS_AT_A_TIME = 50
SCORES = ("squared error", "−log density", "coverage of 90 %", "CRPS")
EXACT = "exact"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        strategy: what is fitted; None where another row's fit is taken.
        overrides: settings of adapting.
        base: that other row.
        after: what is made of its fit.
    """

    strategy: Strategy | None
    overrides: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    after: Callable[[Fitted], Fitted] | None = None


def softened(fitted: Fitted) -> Fitted:
    """A Gaussian around the points of a fit."""
    return Laplace.soften(fitted, curvature="diagonal")


ROWS = {
    "MAML": Row(MAML(steps=5, step_size=STEP)),
    "soft MAML": Row(None, base="MAML", after=softened),
    "ABML": Row(ABML(steps=5, step_size=0.05, learned_scale=True), {"draws": 20}),
    "BMAML": Row(BMAML(steps=5, step_size=STEP)),
    "PLATIPUS": Row(PLATIPUS(steps=5, step_size=STEP, prior_step=STEP, posterior_step=STEP)),
}


def family(shots: int = 5, queries: int = 15) -> Sinusoids:
    """The tasks, with so many rows each."""
    return Sinusoids(noise=NOISE, shots=shots, queries=queries)


def path(name: str, seed: int, quick: bool, folder: Path) -> Path:
    """Where a fit is kept."""
    return folder / f"{name.lower()}-{seed}{'-quick' if quick else ''}.safetensors"


def fit(name: str, seed: int, quick: bool, folder: Path) -> Fitted:
    """The fit of a row, from its file where that is there."""
    row = ROWS[name]
    if row.strategy is None:
        base = fit(row.base, seed, quick, folder)
        return base if row.after is None else row.after(base)
    target = path(name, seed, quick, folder)
    if not target.exists():
        fitted = row.strategy.fit(
            models.NeuralRegression((40, 40), noise=NOISE, prior_scale=SCALE),
            family(),
            steps=ITERATIONS // 20 if quick else ITERATIONS,
            seed=seed,
            checkpoint=target.with_suffix(".checkpoint"),
        )
        fitted.save(target)
        target.with_suffix(".checkpoint").unlink(missing_ok=True)
    return load(target)


def predictive(name: str, fitted: Fitted, support: Tasks, query: Tasks) -> Predictive:
    """What a row predicts of new tasks."""
    posterior = fitted.adapt(support, seed=1, **ROWS[name].overrides)
    return posterior.predict(query, draws=DRAWS, seed=2)


def scores(predicted: Predictive, y: Tensor) -> Tensor:
    """(scores, tasks) means over the query points of each task."""
    lower, upper = predicted.interval(0.9)
    inside = (lower <= y) & (y <= upper)
    squared = (predicted.mean - y).square()
    found = [squared, -predicted.log_prob(y), inside, predicted.crps(y)]
    return torch.stack([value.double().mean(1) for value in found])


def judged(name: str, fitted: Fitted | None, episode: Episode) -> Tensor:
    """(scores, tasks) of a row, or of the exact answer, some tasks at a time."""
    found = []
    for start in range(0, episode.n_tasks, TASKS_AT_A_TIME):
        ids = episode.ids[start : start + TASKS_AT_A_TIME]
        support, query = episode.support.select(ids), episode.query.select(ids)
        y = query.y
        assert y is not None
        if fitted is None:
            answer = bayes_sinusoid(family(), Episode(support, query))
        else:
            answer = predictive(name, fitted, support, query)
        found.append(scores(answer, y))
    return torch.cat(found, 1)


def line(name: str, found: Tensor, seconds: str) -> str:
    """A row of the table."""
    mean = found.mean(1)
    half = 1.96 * found.std(1) / found.shape[1] ** 0.5
    cells = [f"{float(m):.3f} ± {float(h):.3f}" for m, h in zip(mean, half, strict=True)]
    return "| " + " | ".join([name, *cells, seconds]) + " |"


def draw(fits: dict[str, Fitted], episode: Episode, truth: dict[str, Tensor], folder: Path) -> None:
    """The bands of all rows and of the exact answer, on a wave of middling amplitude."""
    order = truth["amplitude"].argsort()
    task = int(order[int(0.6 * len(order))])
    support = episode.support.select([episode.ids[task]])
    x = torch.linspace(-5.0, 5.0, 121, dtype=support.dtype)
    grid = Tasks(x.reshape(1, -1, 1), ids=support.ids, features=support.features)
    found = {name: predictive(name, fitted, support, grid) for name, fitted in fits.items()}
    found[EXACT] = bayes_sinusoid(family(), Episode(support, grid))
    wave = truth["amplitude"][task] * torch.sin(x.double() - truth["phase"][task])
    figure = bands(found, support, truth={"the wave": (x, wave)})
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "bayesian_maml.png")
    print(f"wrote {folder / 'bayesian_maml.png'}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing, prints the table, draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=500, help="new tasks")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="a twentieth of the training")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "bayesian_maml")
    parser.add_argument("--figures", type=Path, help="where to put bayesian_maml.png")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    # Training draws its own tasks with other seeds.
    held_out = family(queries=25).sample_with_truth(chosen.tasks, seed=2**32 + chosen.seed)
    episode, truth = held_out
    print(f"# Uncertainty on sinusoids, 5 shots\n\n{describe(chosen.seed)}, one thread\n")
    print(f"{chosen.tasks:,} new tasks, mean ± half of a 95 % interval over tasks\n")
    heads = ["row", *SCORES, "seconds of training"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    fits = {}
    for name in chosen.only:
        fits[name] = fit(name, chosen.seed, chosen.quick, chosen.folder)
        found = judged(name, fits[name], episode)
        trained = "" if ROWS[name].strategy is None else f"{fits[name].seconds.fit:.0f}"
        print(line(name, found, trained), flush=True)
    print(line(f"{EXACT}, amplitude and phase averaged over", judged("", None, episode), ""))
    print(f"\n{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    if chosen.figures is not None:
        draw(fits, episode, truth, chosen.figures)


if __name__ == "__main__":
    main()
