"""Seconds and memory of a certificate over many tasks and draws, adaptation not counted.

1,000 tasks of 10 rows to adapt to and 10 to predict, a network 1-40-40-1 with a Gaussian over its
1,761 weights per task (MAML's points, softened by Laplace's diagonal), 1,000 draws each: 10 million
predictions by networks that all differ. Wanted: 60 s on two cores, 2 GB. Resident memory is the
peak of the process while it certifies, weights and imports included.

    python -m benchmarks.certificate_speed [--quick]
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings

import torch

from benchmarks.machine import cpu_seconds, describe
from hbmeta import models
from hbmeta.certification import certify
from hbmeta.inference import MAML, Laplace
from hbmeta.tasks import Sinusoids

SEED = 0


def main() -> None:
    """Fits, softens, certifies and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 tasks, 50 draws")
    quick = parser.parse_args().quick
    n_tasks, draws = (50, 50) if quick else (1000, 1000)
    warnings.simplefilter("ignore")
    family = Sinusoids(shots=10, queries=10, dtype=torch.float32)
    maml = MAML(steps=1, step_size=0.01).fit(
        models.NeuralRegression(hidden=(40, 40)), family, steps=200, tasks_per_step=25,
        compile="graph", progress=False, seed=SEED,
    )  # fmt: skip
    soft = Laplace.soften(maml, curvature="diagonal")
    episode = family.sample(n_tasks, seed=SEED + 1)
    print(f"# Speed of certificates\n\n{describe(SEED)}, {torch.get_num_threads()} threads\n")
    print("| bound | tasks | draws | adapting (s) | certifying (s) | processor (s) | peak (MiB) |")
    print("|---|---|---|---|---|---|---|")
    start = time.perf_counter()
    soft.adapt(episode.support)
    adapting = time.perf_counter() - start
    start, cpu = time.perf_counter(), cpu_seconds()
    found = certify(
        soft, episode, bound="meta_test", draws=draws, loss="truncated-squared", scale=5.0
    )
    whole, processor = time.perf_counter() - start, cpu_seconds() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| meta_test | {n_tasks:,} | {draws:,} | {adapting:.1f} | {whole - adapting:.1f} "
        f"| {processor:.1f} | {peak:,.0f} |\n"
    )
    print(f"At most {found.statement.raw:.4f}; {found.statement.measured:.4f} measured.")


if __name__ == "__main__":
    main()
