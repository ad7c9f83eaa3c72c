"""Posterior approximations side by side on held-out data: scores, distances, seconds.

What each score is, and how it averages over tasks: `hbmeta.scoring`. Oracles, which know the
family that the tasks come from, are scored beside the fits: they say how much is left to gain.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbmeta.distances import (
    Distance,
    distance_between,
    given_theta,
    moments_of,
    shared_sites,
)
from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.inference.nuts import trouble
from hbmeta.posterior import TaskPosterior
from hbmeta.predictive import Predictive
from hbmeta.records import Comparison, versions
from hbmeta.rows import Row, Score, batch_norm_of, transduction, unknown_name
from hbmeta.scoring import Table, score_of, scores_by_task
from hbmeta.tasks import Episode, Tasks, TaskSet
from hbmeta.tasks.checks import check_count

__all__ = ["Comparison", "compare"]

_FEWEST_EFFECTIVE_DRAWS = 100
_WHERE = "compare"


def compare(
    fits: Mapping[str, Fitted],
    data: TaskSet | Episode,
    *,
    reference: str | None = None,
    baseline: str | None = None,
    oracles: Mapping[str, Predictive] | None = None,
    levels: Sequence[float] = (0.5, 0.9, 0.95),
    draws: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Judge several fits on the query of the same tasks, and their q(φ | S) against a reference.

    A fit that saw these tasks with these supports keeps the posterior that it has of them (and
    takes no time to adapt); others adapt to the supports. Nothing is fitted. Classes are scored by
    NLL, joint NLL, accuracy, Brier score and expected calibration error; numbers by NLL, joint NLL,
    RMSE, CRPS and coverage.

    Args:
        fits: fits by the names that they have in the table.
        data: tasks with support and query. Tasks without a query row are left out and counted.
        reference: the fit that distances are to, such as a long NUTS run. Without one there are no
            distances.
        baseline: the fit or oracle that paired differences are to. By default the reference, else
            the fit of the lowest NLL; a fit that saw the held-out points only if it is named.
        oracles: predictives of the query of `data`, by what knows the family of the tasks, in the
            units of y. Rows with scores alone, after the fits.
        levels: probabilities of the central intervals whose coverage is counted.
        draws: draws of (θ, φ) that enter each predictive; four times as many enter the moments.
        seed: of those draws.
    Returns:
        Comparison: printable, `to_frame()`, `to_json()`.
    Raises:
        DataError: no fits, an unknown reference or baseline, fits of other columns or units than
            the first, tasks of other columns, no query row, an oracle of other tasks.
    Example:
        print(hbmeta.compare({"nuts": nuts, "maml": maml}, new, reference="nuts"))
    """
    oracles = {} if oracles is None else oracles
    _check_arguments(fits, levels, draws)
    _check_names(fits, oracles, reference, baseline)
    whole, episode = _episode(data)
    _check_fits(fits, episode)
    _check_oracles(oracles, whole, episode)
    posteriors, seconds, tables = {}, {}, {}
    y = episode.query.flat_y
    assert y is not None
    units = next(iter(fits.values())).units
    for name, predictive in oracles.items():
        tables[name] = scores_by_task(predictive, y, units, levels, name)
    for name, fitted in fits.items():
        start = time.perf_counter()
        posteriors[name] = fitted.posterior_of(episode.support)
        seconds[name] = time.perf_counter() - start
        predictive = posteriors[name].predict(episode.query, draws=draws, seed=seed)
        tables[name] = scores_by_task(predictive, y, units, levels, name)
    leaks = {name: text for name, fitted in fits.items() if (text := _leak(fitted, episode))}
    notes = [f"{name}: {text}" for name, text in leaks.items()]
    notes += [f"{name}: {text}" for name, fitted in fits.items() if (text := _moving(fitted))]
    for name, fitted in fits.items():
        notes += [f"{name}: {text}"] if (text := transduction(fitted)) else []
        if name != reference and "divergences" in fitted.info:
            notes += [f"{name}: {text.rstrip('.')}" for text in trouble(fitted.info)]
    if baseline is None:
        honest = {name: tables[name] for name in fits if name not in leaks}
        baseline = reference if reference in honest else _lowest(honest)
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
                scores=_scores(tables, name, baseline),
                nll_by_task=tuple(tables[name]["nll"].tolist()),
                distance=against,
                distance_given_theta=conditional,
                seconds_fit=fitted.seconds.fit,
                seconds_staging=fitted.seconds.staging,
                seconds_adapt=seconds[name],
                saw_query=name in leaks,
                batch_norm=batch_norm_of(fitted),
            )
        )
    for name in oracles:
        nll = tuple(tables[name]["nll"].tolist())
        rows.append(Row.of_oracle(name, _scores(tables, name, baseline), nll))
    flags = () if reference is None else _flags(fits[reference], posteriors[reference])
    return Comparison(
        rows=tuple(rows),
        reference=reference,
        baseline=baseline,
        ids=tuple(episode.ids),
        points=tuple(episode.query.counts.tolist()),
        support_points=tuple(episode.support.counts.tolist()),
        without_query=tuple(whole.without_query),
        levels=tuple(float(level) for level in levels),
        draws=draws,
        seed=seed,
        flags=flags,
        notes=tuple(notes),
        versions=versions(),
    )


def _scores(tables: Mapping[str, Table], name: str, baseline: str | None) -> dict[str, Score]:
    """The scores of a row, with paired differences where the baseline is another and has them."""
    other = {} if baseline is None or name == baseline else tables[baseline]
    return {key: score_of(key, values, other.get(key)) for key, values in tables[name].items()}


def _lowest(tables: Mapping[str, Table]) -> str | None:
    """The name of the lowest finite NLL."""
    found = {name: float(np.mean(table["nll"])) for name, table in tables.items()}
    finite = [name for name, value in found.items() if math.isfinite(value)]
    return min(finite, key=lambda name: found[name]) if finite else None


def _moving(fitted: Fitted) -> str:
    """Says so where training ended before θ had settled."""
    names = fitted.info.get("still_moving")
    return f"theta was still moving at the end ({_some(names)}); raise steps" if names else ""


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


def _check_arguments(fits: Mapping[str, Fitted], levels: Sequence[float], draws: int) -> None:
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
    check_count(draws, "draws", where=_WHERE)
    several = isinstance(levels, Sequence | np.ndarray) and np.ndim(levels) == 1
    if not several or not all(isinstance(p, float) and 0.0 < p < 1.0 for p in levels):
        raise DataError(
            _WHERE,
            needed="levels between 0 and 1, in a tuple",
            found=f"levels={levels!r}",
            do="Pass levels=(0.5, 0.9).",
        )


def _check_names(
    fits: Mapping[str, Fitted],
    oracles: Mapping[str, Predictive],
    reference: str | None,
    baseline: str | None,
) -> None:
    if not isinstance(oracles, Mapping):
        raise DataError(
            _WHERE,
            needed="oracles by name",
            found=type(oracles).__name__,
            do='Pass oracles={"exact": predictive}.',
        )
    for name, predictive in oracles.items():
        if not isinstance(predictive, Predictive) or not isinstance(name, str) or name in fits:
            raise DataError(
                _WHERE,
                needed="oracles that are predictives, by names that no fit has",
                found=f"{type(predictive).__name__} under {name!r}",
                do='Pass oracles={"exact": predictive}.',
            )
    for what, chosen, names in (
        ("reference as one of the fits", reference, list(fits)),
        ("baseline as one of the rows", baseline, [*fits, *oracles]),
    ):
        if chosen is not None and chosen not in names:
            raise unknown_name(chosen, names, needed=f"{what}:", where=_WHERE)


def _episode(data: TaskSet | Episode) -> tuple[Episode, Episode]:
    """All tasks, and those with a query."""
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
    return whole, whole[whole.query.counts.nonzero()[:, 0]]


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


def _check_oracles(oracles: Mapping[str, Predictive], whole: Episode, episode: Episode) -> None:
    """Each predicts the rows of the query, with or without the tasks that have none."""
    for name, predictive in oracles.items():
        tasks = predictive.tasks
        query = next((q for q in (whole.query, episode.query) if q.ids == tasks.ids), None)
        if query is None or query.counts.tolist() != tasks.counts.tolist():
            raise DataError(
                _WHERE,
                needed=f"a prediction of the {whole.query.n_points} query rows of these "
                f"{whole.n_tasks} tasks, in their order",
                found=f"oracle {name!r} of {tasks.n_points} rows of {tasks.n_tasks} tasks"
                + ("" if query is None else ", other numbers of rows by task"),
                do="Make the oracle from the same episode.",
            )
        if not _same_inputs(query, tasks):
            raise DataError(
                _WHERE,
                needed="a prediction at the x of the query",
                found=f"oracle {name!r} of tasks of the same ids and sizes, with another x",
                do="Make the oracle from the same episode, drawn with the same seed.",
            )


def _same_inputs(first: Tasks, second: Tasks) -> bool:
    """Whether x is the same, but for the rounding of single precision."""
    a, b = (tasks.flat_x.detach().double().cpu() for tasks in (first, second))
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6))


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
    if fits[reference].theta and not fits[reference].drawn:
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
        if not fitted.drawn and (text := _without_prior(fitted)):
            notes.append(f"{name}: no distance given θ: {text}")
        elif not fitted.drawn:
            exact, remark = given_theta(fitted, own.support, draws, seed)
            if remark:
                notes.append(f"{name}: p(φ | S, θ): {remark}")
            if exact is not None:
                sites = shared_sites(exact, own)
                conditional = distance_between(known[name], moments_of(exact, draws, seed), sites)
        found[name] = (against, conditional)
    return found


def _without_prior(fitted: Fitted) -> str:
    """Why p(φ | S, θ) at the θ of a fit means nothing, where p(φ | θ) was not estimated."""
    if untouched := fitted.info.get("untouched"):
        return f"the fit did not estimate {_some(untouched)}"
    if not fitted.strategy.keeps_prior:
        return f"{fitted.strategy.name} drops p(φ | θ)"
    return ""


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
