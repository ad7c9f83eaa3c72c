"""What staging buys: log joint with gradient, MAML meta-gradient, and NUTS, against eager Pyro.

    python -m benchmarks.staging [--quick]

All in one process on one thread, interleaved. "eager Pyro" is Pyro's own machinery:
`poutine.condition` and `trace.log_prob_sum` with validation off for the log joint,
`pyro.infer.NUTS` for sampling.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
import warnings
from collections.abc import Callable

import arviz
import numpy as np
import pyro
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.distributions import biject_to, constraints

from benchmarks.machine import describe, interleaved
from benchmarks.programs import SinusoidNetwork, radon_flat, radon_nested, radon_tasks
from hbmeta.inference import MAML, NUTS
from hbmeta.inference.nuts import log_density
from hbmeta.problem import Problem
from hbmeta.program import Batch, Layout
from hbmeta.staging import Staged
from hbmeta.tasks import Tasks

SEED = 0


def pyro_log_density(
    program: Callable[..., None], batch: Batch
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The log joint and its gradient as a person would get them from Pyro, φ = z and log scales."""
    to_positive = biject_to(constraints.positive)
    nested = batch.task is None

    def evaluate(vector: Tensor) -> tuple[Tensor, Tensor]:
        vector = vector.detach().requires_grad_()
        log_scales = vector[3:5]
        scales = to_positive(log_scales)
        z = vector[5:].unsqueeze(1) if nested else vector[5:]
        values = {
            "mu_alpha": vector[0],
            "beta": vector[1:3],
            "sigma_alpha": scales[0],
            "sigma_y": scales[1],
            "z": z,
        }
        conditioned = pyro.poutine.condition(program, data=values)
        if nested:
            # Padded cells must not count; Pyro's own way is a mask around the program.
            masked = pyro.poutine.trace(conditioned).get_trace(batch.x, batch.y)
            masked.compute_log_prob()
            likelihood = (masked.nodes["y"]["log_prob"] * batch.weight).sum()
            rest = sum(masked.nodes[name]["log_prob_sum"] for name in values)
            total = likelihood + rest + log_scales.sum()
        else:
            trace = pyro.poutine.trace(conditioned).get_trace(
                batch.x, batch.y, task=batch.task, n_tasks=batch.n_tasks
            )
            total = trace.log_prob_sum() + log_scales.sum()
        (gradient,) = torch.autograd.grad(total, vector)
        return total.detach(), gradient

    return evaluate


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / a.abs().max())


def bench_log_joint() -> list[str]:
    """Radon, nested and flat, float32 and float64."""
    lines = ["log joint and gradient, radon (85 counties, 919 houses), microseconds per call", ""]
    lines += [
        "| layout | dtype | eager Pyro | staged | times faster | relative difference |",
        "|---|---|---|---|---|---|",
    ]
    programs: list[tuple[Callable[..., None], Layout]] = [
        (radon_nested, "nested"),
        (radon_flat, "flat"),
    ]
    for program, layout in programs:
        for dtype in (torch.float32, torch.float64):
            lines.append(log_joint_row(program, layout, dtype))
    torch.set_default_dtype(torch.float32)
    return lines


def log_joint_row(program: Callable[..., None], layout: Layout, dtype: torch.dtype) -> str:
    """One layout in one precision; leaves `dtype` as the default."""
    tasks = radon_tasks().to(dtype=dtype)
    torch.set_default_dtype(dtype)
    problem = Problem(program, tasks, layout=layout)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    generator = torch.Generator().manual_seed(SEED)
    vector = (0.1 * torch.randn(90, generator=generator, dtype=torch.float64)).to(dtype)

    def staged_function(v: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
        return log_density(problem, theta, v, b)

    run = Staged(staged_function, tier="compiled").flat(vector, batch)
    data = [t for t in (batch.x, batch.y, batch.weight, batch.task) if t is not None]
    eager = pyro_log_density(program, batch)
    with pyro.validation_enabled(False):
        seconds = interleaved(
            {"eager": lambda: eager(vector), "staged": lambda: run(vector, *data)}
        )
        value, gradient = eager(vector)
        # The program itself, in the same precision, is what the graph must equal.
        own_value, own_gradient = log_density(problem, theta, vector, batch)
    staged_value, staged_gradient = run(vector, *data)
    difference = max(
        relative(value, staged_value), relative(gradient, staged_gradient),
        relative(own_value, staged_value), relative(own_gradient, staged_gradient),
    )  # fmt: skip
    return (
        f"| {layout} | {str(dtype).removeprefix('torch.')} "
        f"| {1e6 * seconds['eager']:.0f} | {1e6 * seconds['staged']:.1f} "
        f"| {seconds['eager'] / seconds['staged']:.1f} | {difference:.1e} |"
    )


def bench_maml() -> list[str]:
    """25 tasks, 10 shots, 5 second-order steps, 1-40-40-1 network, one site per weight."""
    generator = torch.Generator().manual_seed(SEED)
    amplitude = 0.1 + 4.9 * torch.rand(25, 1, generator=generator)
    phase = torch.pi * torch.rand(25, 1, generator=generator)
    x = 10 * torch.rand(25, 20, 1, generator=generator) - 5
    y = amplitude * torch.sin(x[..., 0] + phase)
    problem = Problem(SinusoidNetwork(), Tasks(x, y))
    every = torch.ones(25, 10)
    support = Batch(x[:, :10].contiguous(), y[:, :10].contiguous(), every, None, 25)
    query = Batch(x[:, 10:].contiguous(), y[:, 10:].contiguous(), every.clone(), None, 25)
    strategy = MAML(steps=5, step_size=0.01)
    theta = problem.theta(support)

    def step(theta: dict[str, Tensor], support: Batch, query: Batch) -> tuple[Tensor, list[Tensor]]:
        theta = {k: v.detach().requires_grad_() for k, v in theta.items()}
        loss = strategy.loss(problem, theta, None, support, query, {}).mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(theta.values())))

    graph, compiled = Staged(step, tier="graph"), Staged(step, tier="compiled")
    eager_value, eager_gradient = step(theta, support, query)
    with fresh_cache():
        value, gradient = compiled(theta, support, query)
    graph(theta, support, query)
    seconds = interleaved(
        {
            "eager": lambda: step(theta, support, query),
            "graph": lambda: graph(theta, support, query),
            "compiled": lambda: compiled(theta, support, query),
        },
        rounds=11,
    )
    difference = max(relative(a, b) for a, b in zip(eager_gradient, gradient, strict=True))
    return [
        "MAML meta-gradient: 25 tasks, 10 shots, 5 second-order steps, 1-40-40-1 network, float32, "
        "milliseconds",
        "",
        "| tier | ms | times faster | seconds to stage |",
        "|---|---|---|---|",
        f"| eager | {1e3 * seconds['eager']:.2f} | 1.0 | 0 |",
        f"| graph | {1e3 * seconds['graph']:.2f} | {seconds['eager'] / seconds['graph']:.1f} "
        f"| {graph.seconds_staging:.1f} |",
        f"| compiled | {1e3 * seconds['compiled']:.2f} "
        f"| {seconds['eager'] / seconds['compiled']:.1f} | {compiled.seconds_staging:.1f} |",
        "",
        f"relative difference of the loss {relative(eager_value, value):.1e}, "
        f"of the gradient {difference:.1e}",
    ]


def ess(draws: np.ndarray) -> tuple[float, float]:
    """Smallest and median bulk effective sample size over coordinates of (chains, draws, size)."""
    found = arviz.ess(arviz.convert_to_dataset(draws), method="bulk")["x"].values
    return float(found.min()), float(np.median(found))


def pyro_nuts(transitions: int, jit: bool) -> tuple[np.ndarray, float]:
    """pyro.infer.NUTS on the flat program, one chain: unconstrained draws and seconds."""
    tasks = radon_tasks()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(SEED)
    kernel = pyro.infer.NUTS(radon_flat, jit_compile=jit, ignore_jit_warnings=True)
    sampler = pyro.infer.MCMC(
        kernel, num_samples=transitions, warmup_steps=transitions, disable_progbar=True
    )
    start = time.perf_counter()
    with pyro.validation_enabled(False), contextlib.redirect_stderr(io.StringIO()):
        sampler.run(tasks.flat_x, tasks.flat_y, task=tasks.task, n_tasks=tasks.n_tasks)
    seconds = time.perf_counter() - start
    found = sampler.get_samples()
    columns = [
        found["mu_alpha"][:, None],
        found["beta"],
        found["sigma_alpha"].log()[:, None],
        found["sigma_y"].log()[:, None],
        found["z"],
    ]
    torch.set_default_dtype(torch.float32)
    return torch.cat(columns, 1).numpy()[None], seconds


def bench_nuts(quick: bool) -> list[str]:
    """Effective draws per second on the flat radon program."""
    tasks = radon_tasks()
    transitions = 100 if quick else 500
    lines = [
        "NUTS on radon (90 parameters, flat layout, float64): effective draws per second, "
        "warm-up counted",
        "",
        "| sampler | transitions | seconds | smallest ESS | median ESS | smallest ESS/s "
        "| median ESS/s |",
        "|---|---|---|---|---|---|---|",
    ]
    rates: dict[str, tuple[float, float]] = {}

    def row(name: str, count: int, seconds: float, draws: np.ndarray) -> None:
        least, median = ess(draws)
        rates[name] = (least / seconds, median / seconds)
        lines.append(
            f"| {name} | {count:,} | {seconds:.2f} | {least:.0f} | {median:.0f} "
            f"| {least / seconds:.1f} | {median / seconds:.1f} |"
        )

    for jit in (False, True):
        draws, seconds = pyro_nuts(transitions, jit)
        row("pyro.infer.NUTS" + (" (jit_compile)" if jit else ""), 2 * transitions, seconds, draws)
    for chains, processes in ((1, 1), (4, None)):
        strategy = NUTS(draws=1000, chains=chains, processes=processes)
        with fresh_cache():
            fitted = strategy.fit(radon_flat, tasks, seed=SEED)
        draws = fitted.density.phi[..., 0].reshape(chains, 1000, 85).numpy()
        first = fitted.theta
        heads = [
            first["mu_alpha"][:, None],
            first["beta"],
            first["sigma_alpha"][:, None],
            first["sigma_y"][:, None],
        ]
        whole = np.concatenate([torch.cat(heads, 1).reshape(chains, 1000, 5).numpy(), draws], -1)
        label = f"hbmeta NUTS, {chains} chain{'s' if chains > 1 else ''}"
        row(f"{label}, sampling", chains * 1500, fitted.info["seconds_sampling"], whole)
        row(f"{label}, with compilation, nothing cached", chains * 1500, fitted.seconds.fit, whole)
    lines += [
        "",
        "times the effective draws per second of pyro.infer.NUTS (smallest / median ESS):",
        "",
    ]
    for name, (least, median) in rates.items():
        if name.startswith("hbmeta"):
            for base in ("pyro.infer.NUTS", "pyro.infer.NUTS (jit_compile)"):
                lines.append(
                    f"- {name} against {base}: "
                    f"{least / rates[base][0]:.0f} / {median / rates[base][1]:.0f}"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter runs of pyro.infer.NUTS")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"# Staging\n\n{describe(SEED)}, one thread\n")
    for part in (bench_log_joint, bench_maml, lambda: bench_nuts(arguments.quick)):
        print("\n".join(part()), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
