"""A posterior to be sampled: a program, its tasks, and what is stored about its parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.programs import read_zip
from hbmeta.tasks import Tasks

Draws = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Moments:
    """Mean and sd of a parameter, and the Monte Carlo standard error of each (NaN if unknown)."""

    mean: float
    sd: float
    error_mean: float = 0.0
    error_sd: float = 0.0


@dataclass(frozen=True)
class Reference:
    """What is stored about a posterior, by the names that our program's sites give.

    Attributes:
        source: where it comes from, in a few words.
        moments: of each parameter; "log tau" is the logarithm of tau.
    """

    source: str
    moments: Mapping[str, Moments]


def no_reference(folder: Path) -> tuple[Reference, ...]:
    """For a posterior about which nothing is stored."""
    return ()


@dataclass(frozen=True)
class Case:
    """One stored definition, as a program that hbmeta reads.

    Attributes:
        name: the file under posteriordb/posteriors or reference_hierarchical that defines it.
        program: the program, sites named as the references name them.
        tasks: its data, from the folder of shared data.
        references: what is stored about it.
        log: parameters with a heavy tail, judged on the log scale where draws are stored.
        ess: bulk effective draws to reach for every parameter.
        target_accept: of NUTS.
        note: what differs from the stored definition, and why that does not matter.
    """

    name: str
    program: Callable[..., None]
    tasks: Callable[[Path], Tasks]
    references: Callable[[Path], tuple[Reference, ...]] = no_reference
    log: tuple[str, ...] = ()
    ess: int = 4000
    target_accept: float = 0.8
    note: str = ""


@dataclass(frozen=True)
class Table:
    """The columns of a stored data set, by name."""

    values: Mapping[str, Any] = field(repr=False)

    def column(self, name: str) -> torch.Tensor:
        """Numbers, in double precision."""
        return torch.tensor(self.values[name], dtype=torch.float64)

    def index(self, name: str) -> torch.Tensor:
        """A group index that starts at 1, from 0 on."""
        return torch.tensor(self.values[name], dtype=torch.int64) - 1


def posteriordb(folder: Path, name: str) -> Table:
    """A data set of posteriordb."""
    return Table(read_zip(folder / "posteriordb" / "data" / "data" / f"{name}.json.zip"))


def grouped(
    columns: Mapping[str, torch.Tensor], y: torch.Tensor, task: torch.Tensor, n_tasks: int
) -> Tasks:
    """Rows with a group index; ids are those of the stored data, from 1 on."""
    x = torch.stack([value.double() for value in columns.values()], -1)
    ids = list(range(1, n_tasks + 1))
    return Tasks.from_flat(x, y, task, n_tasks, ids=ids, features=tuple(columns))


def one_task(columns: Mapping[str, torch.Tensor], y: torch.Tensor) -> Tasks:
    """All rows as one task."""
    return grouped(columns, y, torch.zeros(len(y), dtype=torch.int64), 1)


def stored_draws(name: str, log: Sequence[str] = ()) -> Callable[[Path], tuple[Reference, ...]]:
    """Reference draws of posteriordb; the parameters named in `log` on the log scale.

    Their own Monte Carlo errors come from the effective sample size of the stored chains.
    """

    def load(folder: Path) -> tuple[Reference, ...]:
        path = folder / "posteriordb/reference_posteriors/draws/draws" / f"{name}.json.zip"
        chains = read_zip(path)
        moments = {}
        for parameter in chains[0]:
            draws = np.asarray([chain[parameter] for chain in chains], dtype=np.float64)
            label = parameter
            if parameter in log:
                draws, label = np.log(draws), f"log {parameter}"
            moments[label] = moments_of_chains(draws)
        return (Reference("posteriordb, 10,000 draws", moments),)

    return load


def moments_of_chains(draws: npt.NDArray[np.float64]) -> Moments:
    """Of (chains, draws)."""
    mean, sd = float(draws.mean()), float(draws.std())
    # sd = √m₂, so that its error is that of m₂ over 2 sd.
    return Moments(mean, sd, _error(draws), _error((draws - mean) ** 2) / (2 * sd))


def _error(draws: npt.NDArray[np.float64]) -> float:
    """Monte Carlo standard error of the mean."""
    return float(arviz.mcse(arviz.convert_to_dataset(draws), method="mean")["x"])


def computed(name: str) -> Callable[[Path], tuple[Reference, ...]]:
    """Moments by quadrature, whose error is below 1e-5 sd."""

    def load(folder: Path) -> tuple[Reference, ...]:
        path = folder / "reference_hierarchical" / "computed" / f"{name}.moments.json"
        return (Reference("quadrature", moments_of_file(path)),)

    return load


def moments_of_file(path: Path) -> dict[str, Moments]:
    """Stored mean and sd of every parameter."""
    stored = json.loads(path.read_text())
    sd = next(key for key in stored if "sd" in key or "std" in key)
    rows = zip(stored["names"], stored["mean_value"], stored[sd], strict=True)
    return {name: Moments(mean, spread) for name, mean, spread in rows}


def stan_benchmarks(name: str, draws: int) -> Callable[[Path], tuple[Reference, ...]]:
    """Published mean and sd of stat_comp_benchmarks, from so many draws, to five digits."""

    def load(folder: Path) -> tuple[Reference, ...]:
        path = folder / "reference_hierarchical" / "stat_comp_benchmarks" / f"{name}.params"
        moments = {}
        for line in path.read_text().splitlines():
            parameter, mean, sd = line.split()
            error = float(sd) / math.sqrt(draws)
            moments[parameter] = Moments(float(mean), float(sd), error, error / math.sqrt(2))
        return (Reference(f"stat_comp_benchmarks, {draws:,} draws", moments),)

    return load


def bugs(name: str) -> Callable[[Path], tuple[Reference, ...]]:
    """Mean and sd that the BUGS manual prints; their Monte Carlo error is not stored."""

    def load(folder: Path) -> tuple[Reference, ...]:
        path = folder / "reference_hierarchical" / "bugs" / "bugs_published_results.json"
        stored = json.loads(path.read_text())["examples"][name]["results"]
        moments = {
            parameter: Moments(row["mean"], row["sd"], math.nan, math.nan)
            for parameter, row in stored.items()
        }
        return (Reference("BUGS manual", moments),)

    return load


def together(
    *loaders: Callable[[Path], tuple[Reference, ...]],
) -> Callable[[Path], tuple[Reference, ...]]:
    """Several references of one posterior."""
    return lambda folder: tuple(found for load in loaders for found in load(folder))
