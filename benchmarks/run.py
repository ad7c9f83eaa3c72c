"""Runs the benchmarks, prints their tables and keeps them under benchmarks/results.

    python -m benchmarks.run [staging] [meta_gradient] [memory] [sinusoid] [posteriors]
        [bayesian_maml] [laplace] [samplers] [scale] [studies] [formulas] [certificate_coverage]
        [certificate_figures] [certificates] [certificate_speed] [calibration]
        [meta_mnist] [--quick]

`posteriors`, `scale`, `formulas`, `certificates` and `meta_mnist` need the stored data
($HBMETA_DATA or ../shared/data) and say so where they are missing; `posteriors` and `scale` keep
their results in results/posteriors and results/scale. `studies` takes a quarter of an hour and
`sinusoid` an hour (its fits are kept in results/sinusoid). Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.programs import data_folder
from hbmeta.files import write_text

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    *("staging", "meta_gradient", "memory", "sinusoid", "posteriors"),
    *("bayesian_maml", "laplace", "samplers", "scale", "studies", "formulas"),
    *("certificate_coverage", "certificate_figures", "certificates", "certificate_speed"),
    *("calibration", "meta_mnist"),
)
STORED = ("posteriors", "scale", "formulas", "certificates", "meta_mnist")
WITH_QUICK = (
    *("staging", "meta_gradient", "memory", "sinusoid", "posteriors"),
    *("bayesian_maml", "samplers", "scale", "formulas"),
    *("certificate_coverage", "certificate_figures", "certificates", "certificate_speed"),
    *("calibration", "meta_mnist"),
)


def run(name: str, extra: list[str]) -> int:
    """One benchmark, its output shown as it comes and kept if it succeeds."""
    if name in STORED and not data_folder().is_dir():
        print(f"{name}: left out, {data_folder()} does not exist (set HBMETA_DATA)")
        return 0
    command = [sys.executable, "-m", f"benchmarks.{name}", *extra]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode == 0 and not extra:
        write_text(ROOT / "benchmarks" / "results" / f"{name}.md", "".join(lines).strip() + "\n")
    return process.returncode


def main() -> int:
    """Parses the arguments and runs what they name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"among {', '.join(NAMES)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="shorter runs, not kept")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known are {', '.join(NAMES)}")
    status = 0
    for name in arguments.names or NAMES:
        quick = ["--quick"] if arguments.quick and name in WITH_QUICK else []
        status |= run(name, quick)
    return status


if __name__ == "__main__":
    sys.exit(main())
