"""Posterior approximations side by side on held-out data: scores, distances, seconds.

Scores of task i average over its query points; a table averages over tasks, each counting once:

    s̄ = (1/T) Σ_i s_i,   standard error sd(s_i) / √T,   paired differences s_i − s_i^ref likewise

RMSE = √(mean of the tasks' mean squared errors); its standard error is that of the mean divided by
2 RMSE (delta method), its paired difference's that of mse_i / (2 RMSE) − mse_i^ref / (2 RMSE^ref).
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hbmeta.distances import (
    Distance,
    distance_between,
    given_theta,
    moments_of,
    shared_sites,
)
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.fitted import Fitted
from hbmeta.inference.nuts import trouble
from hbmeta.posterior import TaskPosterior
from hbmeta.predictive import Predictive
from hbmeta.records import Comparison, Row, Score, versions
from hbmeta.tasks import Episode, Tasks, TaskSet

__all__ = ["Comparison", "compare"]

_FEWEST_EFFECTIVE_DRAWS = 100
_WHERE = "compare"

Floats = npt.NDArray[np.float64]


def compare(
    fits: Mapping[str, Fitted],
    data: TaskSet | Episode,
    *,
    reference: str | None = None,
    levels: Sequence[float] = (0.5, 0.9, 0.95),
    draws: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Judge several fits on the query of the same tasks, and their q(φ | S) against a reference.

    A fit that saw these tasks with these supports keeps the posterior that it has of them (and
    takes no time to adapt); others adapt to the supports. Nothing is fitted.

    Args:
        fits: fits by the names that they have in the table.
        data: tasks with support and query. Tasks without a query row are left out and counted.
        reference: the fit that distances and paired differences are to, such as a long NUTS run.
            Without one there are no distances, and differences are to the fit of the lowest NLL.
        levels: probabilities of the central intervals whose coverage is counted.
        draws: draws of (θ, φ) that enter each predictive; four times as many enter the moments.
        seed: of those draws.
    Returns:
        Comparison: printable, `to_frame()`, `to_json()`.
    Raises:
        DataError: no fits, an unknown reference, fits of other columns or units than the first,
            tasks of other columns, no query row.
    Example:
        print(hbmeta.compare({"nuts": nuts, "maml": maml}, new, reference="nuts"))
    """
    _check_arguments(fits, reference, levels, draws)
    episode, without = _episode(data)
    _check_fits(fits, episode)
    posteriors, predictives, seconds = {}, {}, {}
    for name, fitted in fits.items():
        start = time.perf_counter()
        posteriors[name] = fitted.posterior_of(episode.support)
        seconds[name] = time.perf_counter() - start
        predictives[name] = posteriors[name].predict(episode.query, draws=draws, seed=seed)
    tables = {
        name: _scores_by_task(predictives[name], fitted, episode.query, levels)
        for name, fitted in fits.items()
    }
    baseline = reference or min(tables, key=lambda name: float(np.mean(tables[name]["nll"])))
    notes = [f"{name}: {text}" for name, fitted in fits.items() if (text := _leak(fitted, episode))]
    distances = _distances(fits, posteriors, reference, 4 * draws, seed, notes)
    rows = []
    for name, fitted in fits.items():
        against, conditional = distances.get(name, (None, None))
        rows.append(
            Row(
                name=name,
                strategy=fitted.strategy.name,
                settings=fitted.strategy.settings(),
                program=fitted.problem.name,
                theta="draws" if fitted.drawn else "point",
                seed=fitted.seed,
                scores={
                    key: _score(key, values, tables[baseline][key], name == baseline)
                    for key, values in tables[name].items()
                },
                nll_by_task=tuple(tables[name]["nll"].tolist()),
                distance=against,
                distance_given_theta=conditional,
                seconds_fit=fitted.seconds.fit,
                seconds_staging=fitted.seconds.staging,
                seconds_adapt=seconds[name],
            )
        )
    flags = () if reference is None else _flags(fits[reference], posteriors[reference])
    return Comparison(
        rows=tuple(rows),
        reference=reference,
        baseline=baseline,
        ids=tuple(episode.ids),
        points=tuple(episode.query.counts.tolist()),
        support_points=tuple(episode.support.counts.tolist()),
        without_query=tuple(without),
        levels=tuple(float(level) for level in levels),
        draws=draws,
        seed=seed,
        flags=flags,
        notes=tuple(notes),
        versions=versions(),
    )


def _leak(fitted: Fitted, episode: Episode) -> str:
    """Says so where the fit has seen the query: fit(model, episode) trains on all its rows."""
    known = set(fitted.tasks.ids)
    shared = [i for i in episode.ids if i in known]
    if not shared or not fitted.tasks.select(shared).same_data(episode.all.select(shared)):
        return ""
    return (
        f"was fitted on the held-out points of {len(shared)} of these tasks, so its scores are no "
        "test. Fit on episode.support, or compare on other tasks"
    )


# What may come in


def _check_arguments(
    fits: Mapping[str, Fitted], reference: str | None, levels: Sequence[float], draws: int
) -> None:
    if not isinstance(fits, Mapping) or not fits:
        raise DataError(
            _WHERE,
            needed="one fit or more by name",
            found="none" if isinstance(fits, Mapping) else type(fits).__name__,
            do='Pass {"nuts": NUTS().fit(model, tasks), ...}.',
        )
    for name, fitted in fits.items():
        if not isinstance(fitted, Fitted) or not isinstance(name, str):
            raise DataError(
                _WHERE,
                needed="what fit returns, by a name that is text",
                found=f"{type(fitted).__name__} under {name!r}",
                do="Call strategy.fit(model, tasks) first.",
            )
    if reference is not None and reference not in fits:
        near = difflib.get_close_matches(str(reference), list(fits), n=1, cutoff=0.0)
        raise DataError(
            _WHERE,
            needed=f"reference as one of the fits: {', '.join(map(repr, fits))}",
            found=repr(reference),
            do=f"The nearest name is {near[0]!r}.",
        )
    if not all(0.0 < level < 1.0 for level in levels) or draws < 1:
        raise DataError(
            _WHERE,
            needed="levels between 0 and 1, and draws of 1 or more",
            found=f"levels={tuple(levels)}, draws={draws}",
            do="Pass levels=(0.5, 0.9).",
        )


def _episode(data: TaskSet | Episode) -> tuple[Episode, tuple[Any, ...]]:
    """The tasks with a query, and the ids of those without."""
    if not isinstance(data, TaskSet | Episode):
        raise DataError(
            _WHERE,
            needed="tasks with support and query (a split TaskSet, an Episode)",
            found=type(data).__name__,
            do="Call .split(..., seed=...) first.",
        )
    whole = data.episode_of_all if isinstance(data, TaskSet) else data
    if whole.query.n_points == 0 or whole.query.flat_y is None:
        raise DataError(
            _WHERE,
            needed="query rows with y",
            found=f"no query row in any of {whole.n_tasks} tasks"
            if whole.query.n_points == 0
            else "a query without y",
            do="Split tasks of two or more rows, with y.",
        )
    return whole[whole.query.counts.nonzero()[:, 0]], whole.without_query


def _check_fits(fits: Mapping[str, Fitted], episode: Episode) -> None:
    first_name, first = next(iter(fits.items()))
    for name, fitted in fits.items():
        if fitted.tasks.features != episode.support.features:
            raise DataError(
                _WHERE,
                needed=f"fits of the features {list(episode.support.features)} of the tasks",
                found=f"{list(fitted.tasks.features)} in {name!r}",
                do="Fit and compare on the same columns in the same order.",
            )
        if fitted.units != first.units:
            raise DataError(
                _WHERE,
                needed=f"y in the units of {first_name!r} ({first.units})",
                found=f"{fitted.units} in {name!r}",
                do="Fit all of them on the TaskSet of one data frame, not on its bare tasks.",
            )


# Scores


def _scores_by_task(
    predictive: Predictive, fitted: Fitted, query: Tasks, levels: Sequence[float]
) -> dict[str, Floats]:
    """Each score (tasks,), averaged over a task's query points; "rmse" holds squared errors."""
    assert query.flat_y is not None
    y = query.flat_y
    labels = not y.is_floating_point()
    if not labels:  # tasks hold y as it was encoded; scores are in the units of the table
        y = fitted.units.location + fitted.units.scale * y.double()

    def per_task(padded: Tensor) -> Floats:
        rows = query.unpad(padded).detach().double().cpu()
        rows = rows.reshape(len(rows), -1).mean(-1)
        total = torch.zeros(query.n_tasks, dtype=rows.dtype).index_add(0, query.task.cpu(), rows)
        return (total / query.counts.cpu()).numpy()

    joint = predictive.log_prob(y, joint=True).detach().double().cpu()
    found = {
        "nll": per_task(-predictive.log_prob(y)),
        "joint_nll": (-joint / query.counts.cpu()).numpy(),
    }
    if labels:
        return found
    try:
        error = predictive.mean - query.pad(y.to(predictive.mean))
        found["rmse"] = per_task(error.square())
        found["crps"] = per_task(predictive.crps(y))
        for level in levels:
            found[f"coverage_{level:g}"] = per_task(predictive.coverage(y, level).double())
    except UnsupportedModelError:
        pass  # a response of classes that is given as numbers has log densities alone
    return found


def _score(key: str, values: Floats, baseline: Floats, is_baseline: bool) -> Score:
    """The mean over tasks and its standard error, and the paired difference to the baseline."""
    mean, other = float(np.mean(values)), float(np.mean(baseline))
    if key != "rmse":
        if is_baseline:
            return Score(mean, _standard_error(values))
        return Score(
            mean, _standard_error(values), mean - other, _standard_error(values - baseline)
        )
    root, root_other = math.sqrt(mean), math.sqrt(other)
    # d √m = dm / (2 √m)
    influence = values / (2 * root) if root > 0 else values
    if is_baseline:
        return Score(root, _standard_error(influence))
    other_influence = baseline / (2 * root_other) if root_other > 0 else baseline
    return Score(
        root,
        _standard_error(influence),
        root - root_other,
        _standard_error(influence - other_influence),
    )


def _standard_error(values: Floats) -> float:
    """sd / √T over tasks; NaN for one task or values that are not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


# Distances


def _distances(
    fits: Mapping[str, Fitted],
    posteriors: Mapping[str, TaskPosterior],
    reference: str | None,
    draws: int,
    seed: int,
    notes: list[str],
) -> dict[str, tuple[Distance | None, Distance | None]]:
    """Per fit: the distance to the reference, and to its own p(φ | S, θ)."""
    if reference is None:
        return {}
    if not fits[reference].drawn:
        notes.append(
            f"the reference {reference!r} holds θ at a point, so that distances to it say nothing "
            "about the uncertainty of θ"
        )
    known = {name: moments_of(posterior, draws, seed) for name, posterior in posteriors.items()}
    found: dict[str, tuple[Distance | None, Distance | None]] = {}
    for name, fitted in fits.items():
        if name == reference:
            continue
        own = posteriors[name]
        sites = shared_sites(posteriors[reference], own)
        against = distance_between(known[name], known[reference], sites)
        if against is None:
            why = "no varying local site" if sites else "no local site of the same name and shape"
            notes.append(f"{name}: no distance to {reference!r}: {why} in common")
        conditional = None
        if not fitted.drawn:
            exact, remark = given_theta(fitted, own.support, draws, seed)
            if remark:
                notes.append(f"{name}: p(φ | S, θ): {remark}")
            if exact is not None:
                sites = shared_sites(exact, own)
                conditional = distance_between(known[name], moments_of(exact, draws, seed), sites)
        found[name] = (against, conditional)
    return found


def _flags(fitted: Fitted, posterior: TaskPosterior) -> tuple[str, ...]:
    """Why the reference is not to be trusted, in words."""
    flags = []
    if "divergences" in fitted.info:
        flags += trouble(fitted.info)
        r_hat = fitted.info.get("r_hat")
        if r_hat is None or not bool(torch.isfinite(r_hat).all()):
            flags.append("split R̂ is not known. Run two chains or more, of 4 draws or more.")
    effective = posterior.info.get("effective_draws")
    if isinstance(effective, Tensor):
        few = int((effective < _FEWEST_EFFECTIVE_DRAWS).sum())
        if few:
            worst = posterior.ids[int(effective.argmin())]
            flags.append(
                f"{few} of {len(effective)} adapted tasks leave fewer than "
                f"{_FEWEST_EFFECTIVE_DRAWS} effective draws (least: {float(effective.min()):.0f}, "
                f"{worst!r}). Fit these tasks together with the others."
            )
    return tuple(flags)
