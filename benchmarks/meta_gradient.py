"""The MAML meta-gradient from a Pyro program, against JAX, torch.func, TorchOpt and higher.

    python benchmarks/meta_gradient.py [--quick]

25 tasks, 10 + 10 points, N = 5 second-order steps, network 1-40-40-1 (ReLU), float32, one thread.
Value and gradient of the mean query loss at the initialisation; every competitor starts from the
same weights and must find the same gradient. Measured in turn, round by round; ratios are of the
same round. Peers that are not installed are named (`pip install -c constraints.txt -e ".[peers]"`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.utils import _pytree as pytree

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe, interleaved, rounds_of
from benchmarks.peers import LAYERS, Work, peers
from benchmarks.programs import SinusoidNetwork
from hbmeta import models
from hbmeta.inference import MAML
from hbmeta.problem import Problem
from hbmeta.program import Batch
from hbmeta.staging import Staged, Tier, trace
from hbmeta.tasks import Episode, Sinusoids

SEED = 0
# Ours over theirs: what issue and prototype promise.
GOALS = {
    "JAX jit(vmap(grad))": 1.0,
    "torch.func, eager": 1 / 8,
    "TorchOpt": 1 / 35,
    "higher": 1 / 70,
}
Arguments = tuple[dict[str, Tensor], Batch, Batch]


def step_of(
    program: Any, episode: Episode, *, steps: int = 5
) -> tuple[Callable[..., tuple[Tensor, dict[str, Tensor]]], Arguments]:
    """Loss and gradient in θ of MAML on a program, and what it is called with."""
    problem = Problem(program, episode.all)
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    strategy = MAML(steps=steps, step_size=0.01)
    theta = problem.theta(support)

    def step(theta: Any, support: Batch, query: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        loss = strategy.loss(problem, leaves, None, support, query, {}).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return loss.detach(), dict(zip(leaves, gradients, strict=True))

    return step, (theta, support, query)


def bare(function: Any, arguments: Arguments, tier: Tier = "compiled") -> Callable[[], Any]:
    """A staged call without keys and trees, as a training loop in another language would make."""
    run = Staged(function, tier=tier).flat(*arguments)
    tensors = [v for v in pytree.tree_leaves(arguments) if isinstance(v, Tensor)]
    return lambda: run(*tensors)


def ready_made(episode: Episode, width: int = 40) -> Any:
    """What a person writes; its noise √½ makes the loss the squared error, and a constant."""
    return models.NeuralRegression(hidden=(width, width)).bind(episode.all)


def work_of(episode: Episode, theta: dict[str, Tensor]) -> Work:
    """The same data and weights for the peers."""
    weights = {
        f"{layer}.{kind}": value.detach().clone()
        for layer in LAYERS
        for kind in ("weight", "bias")
        for name, value in theta.items()
        if name.endswith(f"{layer}.{kind}")
    }
    sides = [(s.x.contiguous(), s.y.contiguous()) for s in (episode.support, episode.query)]
    return Work(sides[0], sides[1], weights)


def against_peers(quick: bool) -> list[str]:
    """One table of milliseconds and ratios."""
    episode = Sinusoids().sample(25, seed=SEED)
    step, arguments = step_of(ready_made(episode), episode)
    own_step, own_arguments = step_of(SinusoidNetwork(), episode)
    found, missing = peers(work_of(episode, arguments[0]))
    _, expected = step(*arguments)
    for name, call in found.items():
        _, gradients = call()
        for key, value in expected.items():
            theirs = next(v for k, v in gradients.items() if key.endswith(k))
            theirs = torch.as_tensor(
                np.array(theirs.detach() if isinstance(theirs, Tensor) else theirs)
            )
            off = float((theirs - value).abs().max() / value.abs().max())
            if not off < 1e-4:
                raise SystemExit(f"{name}: the gradient of {key} is {off:.2g} off")
    ours = "hbmeta, NeuralRegression"
    calls: dict[str, Callable[[], object]] = {
        ours: bare(step, arguments),
        "hbmeta, a program by hand": bare(own_step, own_arguments),
        **found,
    }
    seconds = rounds_of(calls, rounds=7 if quick else 31, seconds=0.1)
    lines = [
        "| | ms (median) | NeuralRegression over it: median | range | goal |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[ours], times, strict=True)]
        middle, goal = statistics.median(ratios), GOALS.get(name)
        said = "" if goal is None else f"{goal:.3f}: {'met' if middle <= goal else 'missed'}"
        lines.append(
            f"| {name} | {1e3 * statistics.median(times):.3f} | {middle:.3f} "
            f"| {min(ratios):.3f}–{max(ratios):.3f} | {said} |"
        )
    lines += ["", "All gradients agree to a relative 1e-4."]
    if missing:
        lines.append(f"Not installed: {', '.join(missing)}.")
    return [*lines, "", *floating_point(step, arguments, calls[ours])]


def floating_point(step: Any, arguments: Arguments, call: Callable[[], object]) -> list[str]:
    """The share of the machine's peak: operations of the graph over those of one large product."""
    graph, _ = trace(step, arguments)
    products = pointwise = 0
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        name = str(node.target)
        if "mm" in name:
            left = node.args[1 if "addmm" in name or "baddbmm" in name else 0].meta["val"]
            products += 2 * value.numel() * left.shape[-1]
        elif not any(
            word in name for word in ("view", "t.default", "expand", "squeeze", "permute")
        ):
            pointwise += value.numel()
    size = 768
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = interleaved({"step": call, "product": lambda: a @ b}, rounds=9)
    peak = 2 * size**3 / seconds["product"]
    rate = (products + pointwise) / seconds["step"]
    return [
        f"{products / 1e6:.1f} million operations in matrix products and {pointwise / 1e6:.1f} "
        f"million elsewhere: {rate / 1e9:.1f} of {peak / 1e9:.1f} Gflop/s (a {size}² product on "
        f"one thread), {100 * rate / peak:.0f} %.",
    ]


def growth(quick: bool) -> list[str]:
    """Milliseconds by tasks, steps and width; loops of 10 steps and more keep φ_n alone."""
    lines = ["| tasks | steps | width | ms | how |", "|---|---|---|---|---|"]
    tasks = (1, 25, 100) if quick else (1, 5, 25, 100, 300, 1_000)
    steps = (1, 5) if quick else (1, 2, 5, 10, 20, 50)
    widths = (40, 128) if quick else (40, 128, 256, 512)
    cells = [(t, 5, 40) for t in tasks] + [(25, n, 40) for n in steps if n != 5]
    cells += [(25, 5, w) for w in widths if w != 40]
    for n_tasks, n_steps, width in cells:
        episode = Sinusoids().sample(n_tasks, seed=SEED)
        program = ready_made(episode, width)
        if n_steps < 10:
            call = bare(*step_of(program, episode, steps=n_steps))
            how = "whole graph"
        else:
            call, how = recomputed(program, episode, n_steps), "step by step"
        seconds = interleaved({"ours": call}, rounds=5, seconds=0.1)["ours"]
        lines.append(f"| {n_tasks:,} | {n_steps} | {width} | {1e3 * seconds:.2f} | {how} |")
    return lines


def recomputed(program: Any, episode: Episode, steps: int) -> Callable[[], object]:
    """The chain of compiled inner steps."""
    from hbmeta.training import Options

    problem = Problem(program, episode.all)
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    pieces = MAML(steps=steps, recompute=True).meta_gradient(
        problem, None, Options(steps=1_000, tier="compiled")
    )
    assert pieces is not None
    theta = problem.theta(support)
    return lambda: pieces(theta, {}, support, query, {})


def first_step(quick: bool) -> list[str]:
    """What a person waits for who trains 1,000 steps, with nothing in the compiler's cache."""
    lines = ["| compile= | first 1 step, s | 1,000 steps, s | tier reached |", "|---|---|---|---|"]
    for choice in ("auto", True, "graph", False):
        seconds, tier = [], ""
        for steps in (1, 100 if quick else 1_000):
            with fresh_cache():
                start = time.perf_counter()
                fitted = MAML(steps=5).fit(
                    models.NeuralRegression(hidden=(40, 40)), Sinusoids(), steps=steps,
                    compile=choice, seed=SEED, progress=False,
                )  # fmt: skip
                seconds.append(time.perf_counter() - start)
                tier = fitted.info["tier"]
        lines.append(f"| {choice!r} | {seconds[0]:.1f} | {seconds[1]:.1f} | {tier} |")
    return lines


def versions() -> str:
    """Of the peers that are installed."""
    found = []
    for name in ("jax", "torchopt", "higher"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Prints all parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cells")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"# MAML meta-gradient\n\n{describe(SEED)}, one thread; {versions()}\n", flush=True)
    for title, part in (
        ("25 tasks, 10 + 10 points, 5 second-order steps, 1-40-40-1, float32", against_peers),
        ("How cost grows (compiled)", growth),
        ("A person who trains 1,000 steps, compiler's cache empty", first_step),
    ):
        print(f"## {title}\n\n" + "\n".join(part(quick)) + "\n", flush=True)


if __name__ == "__main__":
    main()
