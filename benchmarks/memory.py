"""Peak memory of a meta-step by the number of inner steps, for the gradient lens.

    python benchmarks/memory.py [--quick] [--figures DIR]

25 tasks of sinusoids with 10 + 10 points and a network 1-40-40-1 (ReLU), float32; then 500 + 500
points, where what the network computes on the way outweighs its weights. Peak bytes are those of
tensors that one value and gradient of the training loss hold at once, beyond data and θ
(`hbmeta.memory`). ImplicitMAML has a tolerance of 1e-12, so that all its steps are taken. All rows
run eagerly, as torch keeps their graphs; those that are computed in pieces also compiled, as a fit
has them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path.insert(0, str(ROOT))

from matplotlib.figure import Figure  # noqa: E402

from benchmarks.machine import describe  # noqa: E402
from hbmeta import models  # noqa: E402
from hbmeta.inference import FOMAML, MAML, ImplicitMAML, Reptile, Strategy  # noqa: E402
from hbmeta.memory import peak_bytes  # noqa: E402
from hbmeta.problem import Problem  # noqa: E402
from hbmeta.staging import Tier  # noqa: E402
from hbmeta.styles import styled, styles_of  # noqa: E402
from hbmeta.tasks import Sinusoids  # noqa: E402
from hbmeta.training import Options, mean_over_queries  # noqa: E402

SEED = 0
TASKS = 25
STEPS = (10, 20, 50, 100, 200)
FLAT = 0.2
STRATEGIES: dict[str, Strategy] = {
    "MAML": MAML(recompute=False),
    "MAML, recomputed": MAML(recompute=True),
    "iMAML": ImplicitMAML(tolerance=1e-12),
    "FOMAML": FOMAML(recompute=False),
    "Reptile": Reptile(recompute=False),
}
PIECES = ("MAML, recomputed", "iMAML")
Peaks = dict[str, dict[int, int]]


def meta_step(strategy: Strategy, points: int, tier: Tier) -> tuple[Callable[[], Any], Any]:
    """Value and gradient of the mean loss where training starts, and the pieces if there are."""
    episode = Sinusoids(shots=points, queries=points).sample(TASKS, seed=SEED)
    network = models.NeuralRegression(hidden=(40, 40)).bind(episode.all)
    problem = Problem(network, episode.all)
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    if strategy.needs == "subset":
        query = support.beside(query)
    theta = problem.theta(support)
    pieces = strategy.meta_gradient(problem, None, Options(steps=1, tier=tier))
    if pieces is not None:
        return lambda: pieces(theta, {}, support, query, {}), pieces

    def whole() -> Any:
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        losses = strategy.loss(problem, leaves, None, support, query, {})
        return torch.autograd.grad(
            mean_over_queries(losses, query), list(leaves.values()), allow_unused=True
        )

    return whole, None


def measure(
    names: Sequence[str], points: int, tier: Tier, steps: Sequence[int]
) -> tuple[Peaks, dict[int, str]]:
    """Peak bytes by strategy and number of steps, and what ImplicitMAML did in each."""
    peaks: Peaks = {name: {} for name in names}
    taken = {}
    for name in names:
        for number in steps:
            start = time.perf_counter()
            strategy = replace(STRATEGIES[name], steps=number)
            call, pieces = meta_step(strategy, points, tier)
            if tier != "eager" or number == steps[0]:
                call()  # compiles, and fills caches
            peaks[name][number] = peak_bytes(call)
            if name == "iMAML":
                work = pieces.work()
                taken[number] = f"{work.gradients} gradients, {work.products} products"
            seconds = time.perf_counter() - start
            print(f"{points} points, {tier}, {name}, {number}: {seconds:.1f} s", file=sys.stderr)
    return peaks, taken


def table(peaks: Peaks, steps: Sequence[int]) -> list[str]:
    """Mebibytes by strategy and number of steps, and the growth from the first to the last."""
    heads = ["MiB at N =", *map(str, steps), f"{steps[0]} to {steps[-1]}", "KiB per step"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, by_steps in peaks.items():
        first, last = by_steps[steps[0]], by_steps[steps[-1]]
        each = (last - first) / (steps[-1] - steps[0]) / 1024
        cells = [f"{by_steps[n] / 2**20:.2f}" for n in steps]
        lines.append(f"| {name} | {' | '.join(cells)} | × {last / first:.2f} | {each:.1f} |")
    return lines


def verdict(peaks: Peaks, steps: Sequence[int]) -> list[str]:
    """Whether iMAML is flat, and checkpointing between it and MAML."""
    implicit = peaks["iMAML"]
    growth = max(implicit.values()) / min(implicit.values()) - 1
    lines = [
        f"- iMAML from {steps[0]} to {steps[-1]} steps: {100 * growth:+.1f} % "
        f"(at most {100 * FLAT:.0f} %): {said(growth <= FLAT)}"
    ]
    if "MAML" in peaks:
        last = steps[-1]
        low, middle, high = (peaks[n][last] for n in ("iMAML", "MAML, recomputed", "MAML"))
        lines.append(
            f"- at {last} steps MAML takes {high / low:.1f} times iMAML's bytes, recomputed "
            f"{middle / low:.1f} times (in between): {said(low < middle < high)}"
        )
    return lines


def said(met: bool) -> str:
    """How a target came out."""
    return "met" if met else "missed"


@styled
def figure_of(found: dict[int, Peaks]) -> Figure:
    """Bytes against steps, both on logarithmic axes, one panel per number of points."""
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, (points, peaks) in zip(panels, found.items(), strict=True):
        styles = styles_of(peaks)
        for name, by_steps in peaks.items():
            colour, marker = styles[name]
            sizes = [value / 2**20 for value in by_steps.values()]
            axis.plot(
                list(by_steps), sizes, color=colour, marker=marker, ms=4, mew=0, lw=1.1, label=name,
                clip_on=False,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(STEPS, [str(n) for n in STEPS])
        axis.minorticks_off()
        axis.set_xlabel("inner steps")
        axis.set_title(f"{points} + {points} points a task", loc="left")
    ticks = [1, 3, 10, 30, 100, 300, 1000]
    low, high = panels[0].get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    panels[0].set_yticks(shown, [f"{tick:,}" for tick in shown])
    panels[0].set_ylabel("peak memory of a meta-step, MiB")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the tables and the verdicts, draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to 20 steps, nothing compiled")
    parser.add_argument("--figures", type=Path, help="where to put memory.png")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps = STEPS[:2] if chosen.quick else STEPS
    print(f"# Memory\n\n{describe(SEED)}, one thread\n")
    print(
        f"Peak memory of tensors in one meta-step: {TASKS} tasks, network 1-40-40-1, float32. "
        f"φ of all tasks takes {TASKS * 1761 * 4 / 2**20:.2f} MiB.\n"
    )
    found = {}
    for points in (10, 500):
        print(f"## {points} + {points} points, eager\n", flush=True)
        found[points], taken = measure(list(STRATEGIES), points, "eager", steps)
        print("\n".join([*table(found[points], steps), "", *verdict(found[points], steps)]))
        print(
            "- what iMAML computed: "
            + "; ".join(f"{number} steps: {text}" for number, text in taken.items())
            + "\n",
            flush=True,
        )
    if not chosen.quick:
        print("## 10 + 10 points, compiled\n", flush=True)
        ends = (steps[0], steps[-1])
        peaks, _ = measure(PIECES, 10, "compiled", ends)
        print("\n".join([*table(peaks, ends), "", *verdict(peaks, ends)]))
    if chosen.figures is not None:
        chosen.figures.mkdir(parents=True, exist_ok=True)
        figure_of(found).savefig(chosen.figures / "memory.png")
        print(f"wrote {chosen.figures / 'memory.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
