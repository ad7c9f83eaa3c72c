"""Certificates against the true risk as tasks grow, and what bounds over tasks are made of.

    python -m benchmarks.certificate_figures [--quick]

The environment is that of thresholds (`benchmarks.certificate_coverage`), whose true risk is known:
labels 1[x > t] with 5 % noise, Gibbs posteriors of 50 samples over 21 thresholds, a hyperposterior
over 21 priors that the same tasks chose. Means over sets of tasks. Writes
docs/images/certificates_by_tasks.png and docs/images/bounds_by_tasks.png, and prints the numbers of
the first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.certificate_coverage import DELTA, thresholds
from hbmeta.certificate_plots import BOUNDS, bounds_by_tasks, certificates_by_tasks
from hbmeta.tables import aligned

TASKS = (10, 20, 50, 100, 200, 500, 1000, 2000)
SAMPLES = 50
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


def main() -> None:
    """Prints the table, writes the figures."""
    parser = argparse.ArgumentParser(description="certificates as tasks grow")
    parser.add_argument("--quick", action="store_true", help="4 sets in place of 40, no figures")
    quick = parser.parse_args().quick
    sets = 4 if quick else 40
    found = [thresholds(n_tasks, SAMPLES, sets) for n_tasks in TASKS]
    print(
        f"# Certificates as tasks grow, δ = {DELTA:g}\n\nThresholds, {SAMPLES} samples per task, "
        f"means over {sets} sets of tasks, seed 0\n\n```"
    )
    rows = [[name, *(f"{one.values[name]:.3f}" for one in found)] for name in BOUNDS]
    rows.append(["true risk", *(f"{one.risk:.3f}" for one in found)])
    print("\n".join(aligned(["", *(f"T = {n:,}" for n in TASKS)], rows)), end="\n```\n")
    if not quick:
        IMAGES.mkdir(parents=True, exist_ok=True)
        certificates_by_tasks(
            TASKS,
            {name: [one.values[name] for one in found] for name in BOUNDS},
            [one.risk for one in found],
            title=f"Thresholds with 5 % noise, {SAMPLES} samples per task, δ = {DELTA:g}",
        ).savefig(IMAGES / "certificates_by_tasks.png", dpi=130)
        bounds_by_tasks().savefig(IMAGES / "bounds_by_tasks.png", dpi=130)


if __name__ == "__main__":
    main()
