"""What must be true for a certificate: what can be checked is, the rest is written down.

Checked, and refused where it fails: at least two tasks, each with query rows apart from its
support; no task twice; tasks that served nothing that had to come before them; the support sizes
that were asked for; each task's result the same whether it is adapted to alone or among others.
Flagged, where the data speak against it: tasks that share units and depend on each other through
them; predictions that look at other rows of the query. Everything else the person warrants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hbmeta.bounds.checks import Array
from hbmeta.certification.certificate import Remark
from hbmeta.certification.losses import Loss
from hbmeta.certification.risks import predictive_losses
from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.rows import transduction
from hbmeta.tasks import Episode, Tasks, TaskSet

__all__ = [
    "check_fixed_map",
    "check_shots",
    "dependence",
    "digest",
    "episode_of",
    "refuse_reuse",
    "shared_tasks",
    "warranted",
]

PERMUTATIONS = 999
ALARM = 0.01
"""A flag for dependence goes up by chance in one data set of a hundred."""
CODES = 10
"""A whole-number column of so many values that tasks share may be the code of shared units."""
SEEDS = 20
"""Further seeds that tell a random map of a task from one that looks at the other tasks."""


def episode_of(data: Any, where: str, *, least: int = 2) -> Episode:
    """Support and query of the tasks that are certified on.

    Raises:
        DataError: no split, a task without query, fewer than two tasks, a task twice.
    """
    if not isinstance(data, TaskSet | Episode):
        raise DataError(
            where,
            needed="tasks with support and query (a split TaskSet, an Episode)",
            found=type(data).__name__,
            do="Call .split(..., seed=...) first.",
        )
    whole = data.episode_of_all if isinstance(data, TaskSet) else data
    if whole.without_query or whole.query.flat_y is None:
        raise DataError(
            where,
            needed="query rows with y in every task: the tasks are a sample of the environment",
            found=f"none in task {whole.without_query[0]!r}"
            if whole.without_query
            else "a query without y",
            do="Say before the data which groups are tasks (those of two rows and more), and "
            "certify on these alone; the certificate is then about such groups.",
        )
    if whole.n_tasks < least:
        raise DataError(
            where,
            needed="two tasks or more",
            found=f"{whole.n_tasks}, which says nothing about how tasks vary",
            do="Use certify_task for a certificate about one task.",
        )
    of_task = _rows(whole.all)
    holders = _holders(of_task)
    seen: dict[tuple[bytes, ...], int] = {}
    for position, rows in enumerate(of_task):
        first = seen.setdefault(tuple(sorted(rows)), position)
        # Coin flips repeat by themselves; rows that are in these two tasks alone do not.
        if first != position and all(holders[row] == {first, position} for row in rows):
            raise DataError(
                where,
                needed="tasks that are independent of each other",
                found=f"the same rows in {whole.ids[first]!r} and in {whole.ids[position]!r}",
                do="Leave the copies out.",
            )
    return whole


def _rows(tasks: Tasks) -> list[list[bytes]]:
    """The rows (x, y) of each task as bytes of float64."""
    x = tasks.flat_x.detach().double().cpu()
    if tasks.flat_y is not None:
        y = tasks.flat_y.detach().double().cpu()
        x = torch.cat([x, y if y.ndim == 2 else y.unsqueeze(-1)], 1)
    rows = [row.tobytes() for row in np.ascontiguousarray(x.numpy())]
    offsets, counts = tasks.offsets.tolist(), tasks.counts.tolist()
    return [rows[start : start + n] for start, n in zip(offsets, counts, strict=True)]


def _holders(of_task: list[list[bytes]]) -> dict[bytes, set[int]]:
    """The positions of the tasks that hold a row."""
    out: dict[bytes, set[int]] = {}
    for position, rows in enumerate(of_task):
        for row in rows:
            out.setdefault(row, set()).add(position)
    return out


def shared_tasks(episode: Episode, other: Tasks) -> list[Any]:
    """Ids of tasks whose rows the other tasks hold.

    A row tells tasks apart if one task here and one there hold it. A task is known if one of its id
    has such a row of it, or if another has two and at least half of its own. Where rows are
    discrete and tell nothing apart, tasks are known if most of those of a common id are equal.
    """
    mine, others = _rows(episode.all), _rows(other)
    here, there = _holders(mine), _holders(others)
    out = []
    for position, label in enumerate(episode.ids):
        rows = set(mine[position])
        hits: dict[int, int] = {}
        for row in rows:
            if len(here[row]) == 1 and len(there.get(row, ())) == 1:
                (found,) = there[row]
                hits[found] = hits.get(found, 0) + 1
        if any(other.ids[k] == label or (n >= 2 and 2 * n >= len(rows)) for k, n in hits.items()):
            out.append(label)
    known = {label: sorted(rows) for label, rows in zip(other.ids, others, strict=True)}
    parts = (_rows(episode.support), mine)
    common = [i for i, label in enumerate(episode.ids) if label in known]
    equal = [
        episode.ids[i]
        for i in common
        if any(part[i] and sorted(part[i]) == known[episode.ids[i]] for part in parts)
    ]
    return equal if len(equal) > max(len(out), len(common) // 2) else out


def refuse_reuse(episode: Episode, other: Tasks, what: str, where: str) -> None:
    """Raises DataError where tasks served something that had to come before them."""
    found = shared_tasks(episode, other)
    if found:
        raise DataError(
            where,
            needed=f"tasks that {what} did not see: it has to be fixed before them",
            found=f"{len(found)} of {episode.n_tasks} that it did, such as {found[0]!r}",
            do="Set tasks aside for it, and certify on the others.",
        )


def check_shots(adapted: Tasks, shots: int | None, where: str) -> Remark:
    """The number of points that a task is adapted to is part of the environment."""
    low, high = int(adapted.counts.min()), int(adapted.counts.max())
    if shots is not None and not low == high == shots:
        raise DataError(
            where,
            needed=f"{shots} points to adapt to in every task, as new tasks will have",
            found=f"{low}" if low == high else f"between {low} and {high}",
            do="Split the tasks with that number: more data here than there is another "
            "environment.",
        )
    if shots is not None:
        return Remark("checked", f"every task is adapted to {shots} points, as new ones will be")
    law = f"{low}" if low == high else f"{low} to {high}, by the same law,"
    return Remark("warranted", f"new tasks come with {law} points to adapt to")


def check_fixed_map(
    fitted: Fitted,
    episode: Episode,
    loss: Loss,
    losses: Array,
    *,
    draws: int,
    seed: int,
    where: str,
) -> Remark:
    """Each task adapted to alone gives what it gave among the others; two tasks are tried.

    Raises:
        DataError: it does not, so that posteriors were made from several tasks together.
    """
    last = episode.n_tasks - 1
    for position in {0, last}:
        alone = episode[[position]]
        again = predictive_losses(fitted, alone, loss, draws=draws, seed=seed)[0]
        # One 0-1 loss may turn by rounding, of an exact tie.
        if abs(again - losses[position]) <= 1e-4 + 1e-2 * abs(again):
            continue
        # Few draws and few rows give a random map the same 0-1 losses at many a seed.
        others = (
            predictive_losses(fitted, alone, loss, draws=draws, seed=seed + number)[0]
            for number in range(1, SEEDS + 1)
        )
        if any(other != again for other in others):
            return Remark(
                "warranted",
                "each task is adapted to by one random map of its own support (draws differ with "
                "the batch, so that this could not be seen)",
            )
        raise DataError(
            where,
            needed="each posterior a fixed map of its own task's support",
            found=f"another result for task {episode.ids[position]!r} alone than among the others",
            do="Posteriors trained jointly break the step to a new task: derive each again from "
            "its own support.",
        )
    return Remark("checked", "a task adapted to alone gives what it gives among the others")


def dependence(
    losses: Array, query: Tasks, shared: str | Sequence[Any] | None, where: str
) -> list[Remark]:
    """Whether tasks that meet in a shared unit (a lecturer, a site) have losses that go together.

    With r the loss of a row less the mean of its task and c_tl the sum of r over the rows of task t
    in unit l, Σ_l [(Σ_t c_tl)² − Σ_t c_tl²] sums r r′ over pairs of rows of different tasks in one
    unit. Where units do not matter it is exchangeable under permutations of the units within tasks.

    Args:
        losses: (rows,) of the query.
        query: the tasks' query.
        shared: a column of x, or a label per row; None tries columns that may be codes.
        where: who asks.
    """
    columns: dict[str, Any] = {}
    x = query.flat_x.detach().double().cpu().numpy()
    if isinstance(shared, str):
        if shared not in query.features:
            raise DataError(
                where,
                needed=f"shared as a column of x, one of {', '.join(query.features)}",
                found=repr(shared),
                do="Or pass the label of every row of the query.",
            )
        columns[shared] = x[:, query.features.index(shared)]
    elif shared is not None:
        columns["shared"] = np.asarray(shared)
        if columns["shared"].shape != (query.n_points,):
            raise DataError(
                where,
                needed=f"shared with a label for each of the {query.n_points} query rows",
                found=f"shape {columns['shared'].shape}",
                do="Give them in the order of episode.query.flat_x.",
            )
    elif len(query.features) <= 64:
        whole = {n: x[:, j] for j, n in enumerate(query.features) if (x[:, j] % 1 == 0).all()}
        columns = {n: values for n, values in whole.items() if len(np.unique(values)) >= CODES}
    task = query.task.cpu().numpy()
    out = []
    for name, values in columns.items():
        levels = np.unique(values, return_inverse=True)[1]
        p, met = _permutation_test(losses, task, levels, query.n_tasks)
        if met == 0:
            continue
        if p <= ALARM / len(columns):
            out.append(
                Remark(
                    "flag",
                    f"tasks depend on each other: those that share a value of {name!r} have losses "
                    f"that go together (p = {p:.3g}, {met} values are shared). The certificate "
                    "holds, if at all, for new tasks that meet these same units, given them",
                )
            )
        elif shared is not None:
            text = f"no dependence seen between tasks that share a value of {name!r} (p = {p:.2g})"
            out.append(Remark("checked", text))
    return out


def _permutation_test(losses: Array, task: Any, levels: Any, n_tasks: int) -> tuple[float, int]:
    """p-value, and how many units are met by two tasks or more."""
    n_levels = int(levels.max()) + 1
    cells = np.unique(np.stack([levels, task]), axis=1)
    met = int((np.bincount(cells[0], minlength=n_levels) >= 2).sum())
    counts = np.bincount(task, minlength=n_tasks)
    centred = losses - (np.bincount(task, losses, n_tasks) / counts)[task]

    def statistic(of: Any) -> float:
        by_level = np.bincount(of, centred, n_levels)
        _, cell = np.unique(of * n_tasks + task, return_inverse=True)
        return float(np.square(by_level).sum() - np.square(np.bincount(cell, centred)).sum())

    generator = np.random.default_rng(0)
    order = np.argsort(task, kind="stable")
    own = statistic(levels)
    above = 0
    for _ in range(PERMUTATIONS):
        shuffled = levels.copy()
        # Sorting by (task, noise) permutes the levels within each task.
        shuffled[order] = levels[np.lexsort((generator.random(len(task)), task))]
        above += statistic(shuffled) >= own - 1e-12
    return (1 + above) / (1 + PERMUTATIONS), met


def warranted(fitted: Fitted, *, loss: Loss, hyperprior: bool, choices: int) -> list[Remark]:
    """What no program can see."""
    out = ["the tasks are an independent sample of the environment that new tasks come from"]
    if loss.constant is not None:
        out.append(f"the constant {loss.constant:g} of the loss was fixed before these data")
    if hyperprior:
        out.append("the hyperprior and the model were fixed before any of these tasks were seen")
    if choices == 1:
        out.append(
            "these tasks chose nothing else (an architecture, a step size, a checkpoint, a fit "
            "among several)"
        )
    schema = fitted.schema
    if schema is not None and any(c.location != 0 or c.scale != 1 for c in (*schema.x, schema.y)):
        out.append("the constants that standardise the table were not taken from these tasks")
    remarks = [Remark("warranted", text) for text in out]
    text = transduction(fitted)
    return [*remarks, Remark("flag", text)] if text else remarks


def digest(episode: Episode) -> str:
    """SHA-256 of ids, support and query."""
    found = hashlib.sha256(repr(episode.ids).encode())
    for part in (episode.support, episode.query):
        for rows in _rows(part):
            found.update(len(rows).to_bytes(8, "little"))
            found.update(b"".join(rows))
    return found.hexdigest()
