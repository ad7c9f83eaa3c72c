"""Every posterior that is stored with the shared data, as a Pyro program that hbmeta reads.

One file per family. Programs are plain functions, as a person would write them: what the tasks
share is drawn outside the plate `task`, what is a task's own inside it. Where a stored definition
knows no groups, or its groups are tied to each other, it is one task with all its parameters as φ.
"""

from benchmarks.posterior_programs import (
    counts,
    crossed,
    dynamics,
    functions,
    growth,
    radon,
    regressions,
    schools,
    votes,
)
from benchmarks.posterior_programs.case import Case, Moments, Reference

__all__ = ["CASES", "Case", "Moments", "Reference"]

CASES: dict[str, Case] = {
    case.name: case
    for family in (schools, radon, growth, regressions, functions, counts, crossed, dynamics, votes)
    for case in family.CASES
}
