"""Effective draws per second of NUTS, against other samplers on the same posteriors.

    python benchmarks/samplers.py [--quick] [--only NAME ...] [--peers NAME ...] [--pyro-draws N]

Radon (919 houses, 85 counties, non-centered), eight schools (non-centered), and item response: 300
persons by 20 items, logit P(y_ij = 1) = a_j (θ_i − b_j), simulated. Each sampler runs in a process
of its own with empty caches, four chains one after another on one thread (Pyro a single chain, and
fewer draws, for time's sake). Effective draws per second are the smallest bulk effective sample
size over the level-1 parameters and φ, per second of warm-up and draws without compiling. The first
draw comes after compiling and warm-up. That the posteriors are the same is shown by the largest
difference of a mean from hbmeta's, in sds. The second table holds the aims: at least 20 times the
rate of `pyro.infer.NUTS`, that of NumPyro, half of that of PyMC with nutpie, and a first draw no
later than NumPyro's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.programs import (  # noqa: E402
    eight_schools,
    eight_schools_tasks,
    radon_flat,
    radon_tasks,
)
from benchmarks.sampler_peers import PEERS, Work, entries, installed, missing  # noqa: E402
from hbmeta.tasks import Tasks  # noqa: E402

PERSONS, ITEMS = 300, 20
SEED = 0
WARMUP, DRAWS, CHAINS = 500, 1000, 4
NAMES = ("radon", "eight schools", "item response")
# Eager Pyro takes a millisecond and more for each of some 15,000 gradients per 1,000 draws.
PYRO = ("Pyro", "Pyro, jit_compile")
# At least so many times the effective draws per second of a peer.
AIMS = {"Pyro": 20.0, "NumPyro": 1.0, "PyMC + nutpie": 0.5}


def item_response(x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int) -> None:
    """x holds the item's number; persons are the tasks, items are level 1."""
    slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([ITEMS]).to_event(1))
    difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0).expand([ITEMS]).to_event(1))
    with pyro.plate("task", n_tasks):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    item = x[:, 0].long()
    with pyro.plate("point", x.shape[0]):
        logit = slope[item] * (ability[task] - difficulty[item])
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)


def item_response_tasks(seed: int = SEED) -> Tasks:
    """Answers of 300 persons to 20 items, drawn from the model."""
    rng = np.random.default_rng(seed)
    slope, difficulty = np.exp(0.5 * rng.standard_normal(ITEMS)), 1.5 * rng.standard_normal(ITEMS)
    ability = rng.standard_normal((PERSONS, 1))
    p = 1 / (1 + np.exp(-slope * (ability - difficulty)))
    y = torch.from_numpy((rng.random(p.shape) < p).astype(float))
    item = torch.arange(ITEMS, dtype=torch.float64).expand(PERSONS, ITEMS)
    return Tasks(item[..., None], y, features=("item",))


def work_of(name: str, draws: int, warmup: int = WARMUP) -> Work:
    """A posterior by name."""
    program, tasks = {
        "radon": (radon_flat, radon_tasks),
        "eight schools": (eight_schools, eight_schools_tasks),
        "item response": (item_response, item_response_tasks),
    }[name]
    found = tasks()
    return Work(name, program, found.to(dtype=torch.float64), CHAINS, warmup, draws)


def measure(peer: str, name: str, draws: int, warmup: int) -> dict[str, Any]:
    """Runs one sampler here; what it took, and means and sds by parameter."""
    torch.set_num_threads(1)
    run = installed()[peer](work_of(name, draws, warmup))
    least, means = np.inf, {}
    for parameter, value in run.draws.items():
        columns = entries(value) if value.ndim > 2 else value[..., None]
        for k in range(columns.shape[-1]):
            label = parameter if "[" in parameter or columns.shape[-1] == 1 else None
            label = label or f"{parameter}[{k + 1}]"
            one = columns[..., k]
            least = min(least, float(arviz.ess(one, method="bulk")))
            means[label] = (float(one.mean()), float(one.std()))
    return {"first": run.first, "seconds": run.seconds, "ess": least, "means": means}


def measure_apart(peer: str, name: str, draws: int, warmup: int) -> dict[str, Any]:
    """The same in a process of its own, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TMPDIR": folder,
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "PYTENSOR_FLAGS": f"base_compiledir={folder}/pytensor",
            "NUMBA_CACHE_DIR": f"{folder}/numba",
        }
        command = [sys.executable, "-m", "benchmarks.samplers", "--measure", peer, name]
        command += [str(draws), str(warmup)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def difference(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest difference of a mean of a shared parameter, in sds."""
    shared = found["means"].keys() & reference["means"].keys()
    pairs = [(found["means"][key][0], *reference["means"][key]) for key in shared]
    return max((abs(mean - other) / sd for mean, other, sd in pairs), default=float("nan"))


def line(name: str, peer: str, found: dict[str, Any], ours: dict[str, Any]) -> str:
    """One row of the table."""
    rate, our_rate = found["ess"] / found["seconds"], ours["ess"] / ours["seconds"]
    return (
        f"| {name} | {peer} | {rate:,.1f} | {our_rate / rate:.2f} | {found['first']:.1f} "
        f"| {found['ess']:,.0f} | {found['seconds']:.1f} | {difference(found, ours):.2f} |"
    )


def against_aims(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """A table of hbmeta's rate over each peer's and of the first draws, by posterior."""
    lines = [
        "| posterior | measure | hbmeta | peer | ratio | aim | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        ours = found["hbmeta"]
        rate = ours["ess"] / ours["seconds"]
        for peer, aim in AIMS.items():
            if peer in found:
                other = found[peer]["ess"] / found[peer]["seconds"]
                met = "yes" if rate >= aim * other else "no"
                measure = f"effective draws / s, {peer}"
                lines.append(
                    f"| {name} | {measure} | {rate:,.1f} | {other:,.1f} | {rate / other:.2f} "
                    f"| ≥ {aim:g} | {met} |"
                )
        if "NumPyro" in found:
            first, other = ours["first"], found["NumPyro"]["first"]
            lines.append(
                f"| {name} | first draw (s), NumPyro | {first:.1f} | {other:.1f} "
                f"| {first / other:.2f} | ≤ 1 | {'yes' if first <= other else 'no'} |"
            )
    return lines


def main() -> int:
    """Parses the arguments, measures, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few draws")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), metavar="NAME")
    parser.add_argument("--pyro-draws", type=int, default=200, help="of its single chain")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.measure:
        peer, name, draws, warmup = arguments.measure
        print(json.dumps(measure(peer, name, int(draws), int(warmup))))
        return 0
    print(f"# Samplers\n\n{describe(SEED)}; {CHAINS} chains of {DRAWS} draws, one thread\n")
    print(
        "| posterior | sampler | effective draws / s | hbmeta is faster by | first draw (s) "
        "| smallest ESS | warm-up and draws (s) | largest difference of a mean (sd) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    peers = [p for p in installed() if p == "hbmeta" or p in (arguments.peers or installed())]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in arguments.only:
        found = results.setdefault(name, {})
        for peer in peers:
            draws = arguments.pyro_draws if peer in PYRO else DRAWS
            draws, warmup = (draws // 10, WARMUP // 5) if arguments.quick else (draws, WARMUP)
            found[peer] = measure_apart(peer, name, draws, warmup)
            print(line(name, peer, found[peer], found["hbmeta"]), flush=True)
    print("\n" + "\n".join(against_aims(results)))
    if missing():
        print(f"\nNot installed: {', '.join(missing())}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
