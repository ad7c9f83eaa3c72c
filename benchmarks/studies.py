"""The studies of families with known truth in full: `hbmeta compare linear|clusters|gp|sinusoid`.

Prints what the command prints, as Markdown; `--figures DIR` writes the figures too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.machine import describe
from hbmeta.studies import STUDIES, write

ORDER = ("linear", "clusters", "gp", "sinusoid")


def main() -> None:
    """Runs all studies, one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all by default")
    parser.add_argument("--figures", type=Path, help="folder for figures and tables")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"# Families with known truth\n\n{describe(arguments.seed)}")
    for name in arguments.names or ORDER:
        outcome = STUDIES[name](
            seed=arguments.seed, say=lambda line: print(line, file=sys.stderr, flush=True)
        )
        print(f"\n## hbmeta compare {name}\n\n```text\n{outcome}\n```", flush=True)
        if arguments.figures is not None:
            write(arguments.figures / name, outcome)


if __name__ == "__main__":
    main()
