"""How many simulations tell a wrong posterior from a right one.

    python -m benchmarks.calibration [--quick] [--out FILE.md]

Four strategies that should pass (ExactLinear, Laplace and AmortizedGuide adapted to new tasks at
their θ; NUTS fitted in every simulation, its θ ranked too), and the exact posterior made wrong on
purpose: sd × 0.7 and mean + 0.2 sd. The program is linear-Gaussian (two coefficients, four tasks of
3 to 6 rows); each simulation of an adapted fit gives four ranks per quantity, one of NUTS one. The
table gives, after so many ranks, the smallest p-value of the simultaneous ECDF band and that times
the number of quantities (Bonferroni): below 0.01 is a failure, which one run in a hundred has by
chance. Then the ranks from which on a wrong one fails and goes on failing.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from benchmarks.machine import describe
from hbmeta.calibration import Calibration, envelope_p, sbc, sbc_adapted
from hbmeta.densities import Gaussian
from hbmeta.files import write_text
from hbmeta.inference import NUTS, AmortizedGuide, ExactLinear, Laplace
from hbmeta.tasks import Episode, Tasks

SEED = 0
SIMULATIONS = {"adapted": 250, "joint": 300}
AT = (40, 80, 160, 320, 640, 1000)
ALPHA = 0.01


def known(x, y=None, *, task, n_tasks):
    """Two coefficients per task with a known prior."""
    with pyro.plate("task", n_tasks, dim=-1):
        prior = dist.MultivariateNormal(
            torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.3], [0.3, 0.5]])
        )
        coefficients = pyro.sample("coefficients", prior)
    with pyro.plate("point", x.shape[0], dim=-1):
        mean = coefficients[task, 0] + x[:, 0] * coefficients[task, 1]
        return pyro.sample("y", dist.Normal(mean, 0.4), obs=y)


def learned(x, y=None, *, task, n_tasks):
    """An intercept per task around a mean that is drawn."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("task", n_tasks, dim=-1):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
    with pyro.plate("point", x.shape[0], dim=-1):
        return pyro.sample("y", dist.Normal(level[task], 0.7), obs=y)


@dataclass(frozen=True)
class Spoiled(ExactLinear):
    """The exact posterior, wrong on purpose."""

    narrow: float = 1.0
    shift: float = 0.0

    def posterior(self, problem, theta, own, support):
        exact = super().posterior(problem, theta, own, support)
        return Gaussian(exact.loc + self.shift * exact.sd, self.narrow * exact.scale)


def data() -> Tasks:
    """Four tasks of 5, 3, 6 and 4 rows; y only tells the kind of response."""
    rng = np.random.default_rng(SEED)
    task = np.repeat(np.arange(4), [5, 3, 6, 4])
    x = rng.uniform(-2, 2, (len(task), 1))
    return Tasks.from_flat(x, rng.standard_normal(len(task)), task, 4)


def rows(quick: bool) -> dict[str, Calibration]:
    """Every calibration by what it is of."""
    share = 10 if quick else 1
    tasks, count = data(), SIMULATIONS["adapted"] // share
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = ExactLinear().fit(known, tasks, seed=SEED, progress=False)
        found = {"ExactLinear": sbc_adapted(exact, simulations=count, seed=SEED)}
        laplace = Laplace().fit(known, tasks, seed=SEED, progress=False, compile="graph")
        found["Laplace"] = sbc_adapted(laplace, simulations=count, seed=SEED)
        for steps in (30, 3000 // share):
            guide = AmortizedGuide().fit(
                known,
                Source(),
                steps=steps,
                tasks_per_step=64,
                learning_rate=3e-3,
                seed=SEED,
                progress=False,
                compile="graph",
            )
            name = f"AmortizedGuide, {steps} steps of 64 drawn tasks"
            found[name] = sbc_adapted(guide, tasks, simulations=count, seed=SEED)
        found["NUTS, fitted each time"] = sbc(
            learned,
            NUTS(draws=200, chains=2, warmup=150, processes=1, parametrisation="as written"),
            tasks,
            simulations=SIMULATIONS["joint"] // share,
            draws=39,
            seed=SEED,
            compile=True,
        )
        for name, how in (("sd × 0.7", {"narrow": 0.7}), ("mean + 0.2 sd", {"shift": 0.2})):
            wrong = replace(exact, strategy=Spoiled(**how), _cache={})
            found[name] = sbc_adapted(wrong, simulations=count, seed=SEED)
    return found


class Source:
    """Tasks from the program's own prior, for a guide to learn on."""

    def sample(self, n_tasks: int, *, seed: int):
        """Tasks of 3 to 6 rows, all of them support."""
        rng = np.random.default_rng(seed)
        sizes = rng.integers(3, 7, n_tasks)
        task = np.repeat(np.arange(n_tasks), sizes)
        x = rng.uniform(-2, 2, (len(task), 1))
        phi = rng.multivariate_normal([0.5, -1.0], [[1.0, 0.3], [0.3, 0.5]], n_tasks)
        y = phi[task, 0] + x[:, 0] * phi[task, 1] + 0.4 * rng.standard_normal(len(task))
        whole = Tasks.from_flat(x, y, task, n_tasks)
        return Episode(whole, whole.keep(torch.zeros(len(task), dtype=torch.bool)))


def p_at(found: Calibration, ranks: int) -> float | None:
    """The Bonferroni p-value after the first so many ranks."""
    if any(len(q.ranks) < ranks for q in found.quantities):
        return None
    least = min(envelope_p(q.ranks[:ranks], q.draws) for q in found.quantities)
    return min(1.0, least * len(found.quantities))


def first_failure(found: Calibration) -> int | None:
    """Ranks from which on it fails at every later look, in steps of 20."""
    total = min(len(q.ranks) for q in found.quantities)
    looks = list(range(20, total + 1, 20))
    failing = None
    for ranks in reversed(looks):
        p = p_at(found, ranks)
        if p is None or p > ALPHA:
            break
        failing = ranks
    return failing


def report(found: dict[str, Calibration]) -> str:
    """The table."""
    head = ["posterior", "ranks", *(f"p at {n}" for n in AT), "spread", "shift", "fails from"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in found.items():
        total = min(len(q.ranks) for q in one.quantities)
        cells = [name, str(total)]
        for n in AT:
            p = p_at(one, n)
            cells.append("" if p is None else f"{p:.2g}")
        first = one.quantities[0]
        failure = first_failure(one)
        cells += [f"{first.spread:.2f}", f"{first.shift:+.2f}"]
        cells.append("never" if failure is None else str(failure))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = f"{describe(SEED)}\n\n{report(rows(arguments.quick))}"
    print(text)
    if arguments.out is not None:
        write_text(arguments.out, f"# Calibration\n\n{text}")


if __name__ == "__main__":
    main()
