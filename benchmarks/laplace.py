"""Laplace for many tasks at once against a loop over tasks, and what curvatures of networks take.

    python -m benchmarks.laplace [--quick]

1,000 tasks of a logistic regression with 20 coefficients each and 40 rows, float64, θ given: mode
to 1e-9 nats, exact Hessian, Cholesky factor and evidence. "A loop" does the same one task after the
other: with this library, and with plain torch, whose Newton iteration takes the derivatives that
are known in closed form for this model. Then the curvatures of 100 networks 1-40-40-1 (tanh) with
10 points each around the points of MAML: seconds and peak bytes of tensors.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.machine import describe
from hbmeta import models
from hbmeta.curvatures import Kind
from hbmeta.inference import MAML, Laplace
from hbmeta.memory import peak_bytes
from hbmeta.tasks import Sinusoids, Tasks

SEED = 0
TASKS, SIZE, ROWS = 1000, 20, 40
AIM = 30.0
NETWORKS, SHOTS = 100, 10
KINDS: tuple[Kind, ...] = ("ggn", "kronecker", "diagonal", "last_layer")


def logistic(x: Tensor, y: Tensor | None = None) -> Tensor:
    """φ ~ N(0, I), y ~ Bernoulli(logit = xᵀφ)."""
    with pyro.plate("task", x.shape[0], dim=-2):
        prior = dist.Normal(0.0, 1.0).expand([SIZE]).to_event(1)
        phi = pyro.sample("phi", prior)
        with pyro.plate("point", x.shape[1], dim=-1):
            found: Tensor = pyro.sample("y", dist.Bernoulli(logits=(x * phi).sum(-1)), obs=y)
            return found


def regressions(n_tasks: int) -> Tasks:
    """Tasks from the model itself."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((n_tasks, ROWS, SIZE)) / 2
    eta = (x * rng.standard_normal((n_tasks, 1, SIZE))).sum(-1)
    return Tasks(x, (rng.uniform(size=eta.shape) < 1 / (1 + np.exp(-eta))).astype(float))


def plain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mode, factor of the covariance and evidence of one task, by hand."""
    phi = torch.zeros(SIZE, dtype=x.dtype)
    identity = torch.eye(SIZE, dtype=x.dtype)
    for _ in range(60):
        p = torch.sigmoid(x @ phi)
        gradient = x.T @ (y - p) - phi
        precision = x.T @ ((p * (1 - p)).unsqueeze(-1) * x) + identity
        step = torch.linalg.solve(precision, gradient)
        phi = phi + step
        if float(0.5 * gradient @ step) < 1e-9:
            break
    p = torch.sigmoid(x @ phi)
    precision = x.T @ ((p * (1 - p)).unsqueeze(-1) * x) + identity
    eta = x @ phi
    value = (y * eta - torch.nn.functional.softplus(eta)).sum() - 0.5 * phi @ phi
    evidence = value - 0.5 * torch.logdet(precision)
    return phi, torch.linalg.cholesky(torch.linalg.inv(precision)), evidence


def speed(n_tasks: int, looped: int) -> list[str]:
    """Seconds of one batch, and of loops over `looped` of its tasks scaled to all."""
    tasks = regressions(n_tasks)
    fitted = Laplace(prior=False).fit(logistic, tasks[:2], compile=False)
    fitted.adapt(tasks[:2])
    start = time.perf_counter()
    posterior = fitted.adapt(tasks)
    batched = time.perf_counter() - start
    assert bool(posterior.info["met"].all())
    start = time.perf_counter()
    singles = [fitted.adapt(tasks[i : i + 1]) for i in range(looped)]
    ours = (time.perf_counter() - start) * n_tasks / looped
    assert tasks.y is not None
    start = time.perf_counter()
    by_hand = [plain(tasks.x[i], tasks.y[i]) for i in range(looped)]
    theirs = (time.perf_counter() - start) * n_tasks / looped
    far = max(
        float((a.info["log_evidence"] - posterior.info["log_evidence"][i]).abs())
        + float((b[2] - posterior.info["log_evidence"][i]).abs())
        for i, (a, b) in enumerate(zip(singles, by_hand, strict=True))
    )
    met = "met" if ours / batched >= AIM else "missed"
    share = "" if looped == n_tasks else f", timed on {looped} of them"
    return [
        "| what | seconds | times the batch |",
        "|---|---|---|",
        f"| all {n_tasks:,} tasks at once | {batched:.2f} | 1 |",
        f"| a loop over tasks{share} | {ours:.1f} | {ours / batched:.0f} |",
        f"| a loop in plain torch, derivatives by hand{share} | {theirs:.1f} "
        f"| {theirs / batched:.1f} |",
        "",
        f"- at least {AIM:.0f} times faster than the loop: {met}",
        f"- largest difference of a log evidence between them: {far:.1g} nats",
    ]


def networks(n_tasks: int) -> list[str]:
    """Seconds and peak bytes of each curvature around MAML's points."""
    source = Sinusoids(shots=SHOTS, queries=SHOTS)
    episode = source.sample(n_tasks, seed=SEED)
    model = models.NeuralRegression(hidden=(40, 40), activation="tanh", noise=0.3)
    fitted = MAML(steps=1).fit(model, episode, steps=1, compile=False)
    support = episode.support
    size = fitted.problem.sites.phi_size
    whole = n_tasks * size * size * 4 / 2**20
    lines = ["| curvature | density | seconds | peak, MiB |", "|---|---|---|---|"]
    for kind in KINDS:
        soft = Laplace.soften(fitted, curvature=kind)
        soft.adapt(support)
        start = time.perf_counter()
        density = soft.adapt(support).density
        seconds = time.perf_counter() - start
        peak = peak_bytes(lambda soft=soft: soft.adapt(support)) / 2**20
        lines.append(f"| {kind} | {type(density).__name__} | {seconds:.2f} | {peak:.0f} |")
    return [*lines, "", f"- one dense {size} × {size} matrix per task would take {whole:,.0f} MiB"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="100 tasks, loops over 10; 10 networks"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    print(f"# Laplace\n\n{describe(SEED)}, one thread\n")
    n_tasks, looped = (100, 10) if chosen.quick else (TASKS, 100)
    print(f"## {n_tasks:,} tasks, {SIZE} parameters each\n")
    print("\n".join(speed(n_tasks, looped)) + "\n", flush=True)
    some = 10 if chosen.quick else NETWORKS
    print(f"## {some} networks 1-40-40-1, {SHOTS} points each, float32\n")
    print("\n".join(networks(some)))


if __name__ == "__main__":
    main()
