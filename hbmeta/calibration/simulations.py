"""The two meanings of simulation-based calibration, and the loop over simulations.

    sbc           θ ~ p(θ), φ_i ~ p(φ | θ), y ~ p(y | φ, θ, x);  fit(y);    ranks of θ and some φ_i
    sbc_adapted   φ_i ~ p(φ | θ̂), y ~ p(y | φ, θ̂, x);  adapt(y);            ranks of φ_i

θ̂ is that of the fit; where the fit drew θ, each simulated task has a draw of its own, so that its
prior is what the fit expects of a new task. Simulation k depends on (seed, k) alone, so that a run
that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hbmeta.calibration.ranking import Quantity, Truth, draws_of, ranks_of
from hbmeta.calibration.record import Calibration, Ranks
from hbmeta.errors import ConvergenceError, CurvatureError, DataError
from hbmeta.feeding import training_tasks
from hbmeta.fitted import Fitted
from hbmeta.inference.nuts import require_priors
from hbmeta.inference.strategy import Strategy
from hbmeta.models import HierarchicalModel
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Program
from hbmeta.simulation import Simulated, simulate
from hbmeta.tasks import Tasks, TaskSet
from hbmeta.tasks.checks import check_count, check_seed
from hbmeta.training import show_progress

__all__ = ["sbc", "sbc_adapted"]

_SAVE_EVERY = 10.0

One = Callable[[int], tuple[dict[str, list[int]], float | None]]


def sbc(
    model: Program,
    strategy: Strategy,
    tasks: Tasks | TaskSet,
    *,
    simulations: int = 200,
    draws: int = 99,
    ranked: int = 3,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int = 0,
    record: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **fit: Any,
) -> Calibration:
    """Calibration of a strategy on a program: θ, φ and y from the prior, one fit per simulation.

    Where the program has global sites that the strategy draws, they are ranked too, and tasks
    depend on each other: each has ranks of its own. A strategy that holds θ at a point is judged
    by φ alone, and fails where the uncertainty of θ matters.

    Args:
        model: the program; a ready-made model is bound to `tasks` once, so that priors that are
            scaled by the data stay the same in all simulations.
        strategy: with its settings.
        tasks: the x to simulate on; of y only its kind is read.
        simulations: fits; how many tell a wrong posterior from a right one is measured by
            `benchmarks.calibration`.
        draws: L of each posterior, thinned evenly where chains come; one less than a number with
            many divisors.
        ranked: how many tasks have ranks, where they depend on each other; all of them otherwise.
        quantities: further ones by name, functions of the constrained sites of a task.
        seed: of the simulations, and with it of the fits.
        record: a JSON file to write to on the way and to go on from.
        progress: show a bar; by default where standard error is a terminal.
        fit: further arguments of `strategy.fit`, such as compile or steps.
    Raises:
        UnsupportedModelError: an improper prior, a module parameter without any, a factor, or a
            strategy without draws.
        DataError: a count that is none, no strategy, or a file of another run.
    """
    if not isinstance(strategy, Strategy):
        raise DataError(
            "sbc",
            needed="a strategy after the program",
            found=type(strategy).__name__,
            do="Call sbc(program, Laplace(), tasks).",
        )
    known = training_tasks(tasks, seed)
    bound = model.bind(known) if isinstance(model, HierarchicalModel) else model
    problem = Problem(bound, known)
    require_priors(problem, "sbc")
    strategy.check(problem)
    wanted = quantities or {}
    unnamed = _renamed(known)

    def one(number: int) -> tuple[dict[str, list[int]], float | None]:
        seeds = _seeds(seed, number)
        truth = simulate(problem, {}, unnamed, seeds[0])
        reference = simulate(problem, {}, unnamed, seeds[1])
        fitted = strategy.fit(bound, truth.tasks, seed=seeds[2], progress=False, **fit)
        together = bool(problem.sites.globals)
        positions = range(min(ranked, known.n_tasks) if together else known.n_tasks)
        return _ranked(
            fitted.posterior, Truth([truth], reference), draws, together, positions, known.ids,
            wanted, seeds, fitted.info,
        )  # fmt: skip

    start = _empty(strategy, problem, "joint", draws, seed, known)
    return _run(start, one, simulations, record, progress)


def sbc_adapted(
    fitted: Fitted,
    tasks: Tasks | TaskSet | None = None,
    *,
    simulations: int = 50,
    draws: int = 99,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int = 0,
    record: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Calibration of what a fit says of new tasks: φ and y at its θ, adapted in each simulation.

    Tasks are independent of each other given θ, so that each simulation gives one rank per task and
    quantity.

    Args:
        fitted: the fit; an amortized one is not trained again.
        tasks: the x of the new tasks; those of the fit by default.
        simulations: adaptations to all of the tasks.
        draws: L; see `sbc`.
        quantities: see `sbc`.
        seed: see `sbc`.
        record: see `sbc`.
        progress: see `sbc`.
    Raises:
        UnsupportedModelError, DataError: as of `sbc`.
    """
    given = fitted.tasks if tasks is None else training_tasks(tasks, seed)
    unnamed = _renamed(given.to(device=fitted.problem.device, dtype=fitted.problem.dtype))
    problem, wanted = fitted.problem, quantities or {}
    names = {site.name for site in problem.sites.globals}

    def one(number: int) -> tuple[dict[str, list[int]], float | None]:
        seeds = _seeds(seed, number)
        if not fitted.drawn:
            blocks = [simulate(problem, fitted.theta, unnamed, seeds[0])]
        else:
            stored = next(fitted.theta[name] for name in names).shape[0]
            chosen = np.random.default_rng(seeds[0]).integers(stored, size=len(unnamed))
            blocks = [
                simulate(
                    problem,
                    {k: v[s] if k in names else v for k, v in fitted.theta.items()},
                    unnamed[[task]],
                    seeds[0] + task,
                )
                for task, s in enumerate(chosen.tolist())
            ]
        held = blocks[0].theta
        reference = simulate(problem, held, unnamed, seeds[1])
        posterior = fitted.adapt(_joined(blocks, unnamed), seed=seeds[2])
        return _ranked(
            posterior, Truth(blocks, reference), draws, False, range(len(unnamed)), unnamed.ids,
            wanted, seeds, posterior.info,
        )  # fmt: skip

    start = _empty(fitted.strategy, problem, "adapted", draws, seed, given)
    return _run(start, one, simulations, record, progress)


def _ranked(
    posterior: TaskPosterior,
    truth: Truth,
    draws: int,
    together: bool,
    positions: Sequence[int],
    labels: Sequence[Any],
    quantities: Mapping[str, Quantity],
    seeds: tuple[int, int, int],
    info: Mapping[str, Any],
) -> tuple[dict[str, list[int]], float | None]:
    """The ranks of one simulation, and the effective draws per kept draw."""
    drawn = draws_of(posterior, draws, seeds[2])
    found = ranks_of(
        posterior.problem,
        drawn,
        truth,
        together=together,
        ranked=positions,
        labels=labels,
        quantities=quantities,
        generator=torch.Generator().manual_seed(seeds[1]),
    )
    measured = next((info[key] for key in ("ess_bulk", "effective_draws") if key in info), None)
    return found, None if measured is None else float(measured.min()) / draws


def _run(
    start: Calibration,
    one: One,
    simulations: int,
    record: str | os.PathLike[str] | None,
    progress: bool | None,
) -> Calibration:
    """All simulations that are not in the record yet; failures of the strategy are counted."""
    simulations = check_count(simulations, "simulations", where="sbc")
    found = _resumed(start, record)
    ranks = {q.name: list(q.ranks) for q in found.quantities}
    saved = time.monotonic()
    done = found.simulations + found.failed
    bar = tqdm(total=simulations, initial=min(done, simulations), desc="SBC",
               disable=not show_progress(progress))  # fmt: skip
    with bar:
        for number in range(done, simulations):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of one short fit among hundreds
                    new, thinning = one(number)
            except (ConvergenceError, CurvatureError) as error:
                found = replace(found, failed=found.failed + 1, reason=found.reason or str(error))
            else:
                for name, values in new.items():
                    ranks.setdefault(name, []).extend(values)
                found = _counted(found, thinning)
            bar.update()
            if record is not None and time.monotonic() - saved > _SAVE_EVERY:
                _with(found, ranks).to_json(record)
                saved = time.monotonic()
    found = _with(found, ranks)
    if record is not None:
        found.to_json(record)
    return found


def _counted(found: Calibration, thinning: float | None) -> Calibration:
    """One more simulation, and the running mean of what its draws are worth."""
    count = found.simulations
    if thinning is not None:
        thinning = ((found.thinning or 0.0) * count + thinning) / (count + 1)
    return replace(found, simulations=count + 1, thinning=thinning)


def _with(found: Calibration, ranks: Mapping[str, Sequence[int]]) -> Calibration:
    quantities = tuple(Ranks(name, tuple(r), found.draws) for name, r in ranks.items())
    return replace(found, quantities=quantities)


def _resumed(start: Calibration, record: str | os.PathLike[str] | None) -> Calibration:
    if record is None or not Path(record).exists():
        return start
    found = Calibration.from_json(Path(record).read_text(encoding="utf-8"))
    for name in ("strategy", "settings", "program", "meaning", "draws", "seed", "data"):
        if getattr(found, name) != getattr(start, name):
            raise DataError(
                str(record),
                needed=f"the record of a run with {name}={getattr(start, name)!r}",
                found=repr(getattr(found, name)),
                do="Name another file, or go on with the settings of that run.",
            )
    return found


def _empty(
    strategy: Strategy, problem: Problem, meaning: str, draws: int, seed: int, tasks: Tasks
) -> Calibration:
    draws = check_count(draws, "draws", where="sbc")
    parts = (tasks.flat_x, tasks.task, tasks.flat_y)
    digest = hashlib.sha256()
    for part in parts:
        if part is not None:
            digest.update(part.double().cpu().numpy().tobytes())
    settings = json.dumps(strategy.settings())
    seed = check_seed(seed, where="sbc")
    data = digest.hexdigest()[:16]
    return Calibration(
        strategy.name, settings, problem.name, meaning, 0, draws, seed, (), data=data
    )


def _joined(blocks: Sequence[Simulated], like: Tasks) -> Tasks:
    """The blocks' tasks as one batch."""
    if len(blocks) == 1:
        return blocks[0].tasks
    ys = [block.tasks.flat_y for block in blocks]
    y = torch.cat([y for y in ys if y is not None])
    return Tasks.from_flat(
        like.flat_x, y, like.task, like.n_tasks, ids=like.ids, features=like.features
    )


def _renamed(tasks: Tasks) -> Tasks:
    """The same x under labels that no fit knows."""
    ids = [f"simulated {number}" for number in range(tasks.n_tasks)]
    return Tasks.from_flat(
        tasks.flat_x, None, tasks.task, tasks.n_tasks, ids=ids, features=tasks.features
    )


def _seeds(seed: int, number: int) -> tuple[int, int, int]:
    """Of the draw, of the point to measure from and of ties, and of the fit."""
    state = np.random.SeedSequence([seed, number]).generate_state(3, np.uint32)
    first, second, third = (int(s >> 1) for s in state)
    return first, second, third
