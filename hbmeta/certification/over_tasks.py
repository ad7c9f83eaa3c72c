"""A certificate about new tasks of an environment, before their data: `certify`.

Which theorems are computed follows from the arguments, never from the data, so that δ can be
shared among those that compete:

    meta_test     where the fit did not see the tasks, or where `fresh` ones are given
    query_split   where a hyperprior is given
    joint_kl      by name, where the hyperprior is a finite set and posteriors are Gaussian; so are
                  amit_meir, amit_meir_kl and separate_roots

With "best-of" the first two compete at δ/2 each and hold together; the smaller is the certificate.
Under a name that one has all of δ, and the meta-test bound stands beside it at a δ of its own
wherever there are tasks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from hbmeta.bounds.checks import confidence
from hbmeta.certification.assumptions import (
    check_fixed_map,
    check_shots,
    dependence,
    digest,
    episode_of,
    refuse_reuse,
    shared_tasks,
    warranted,
)
from hbmeta.certification.certificate import Certificate, Remark
from hbmeta.certification.hyperpriors import FiniteHyperprior, GaussianHyperprior, soften
from hbmeta.certification.losses import Loss, loss_of
from hbmeta.certification.randomised import finite_query_split, gaussian_query_split, within_tasks
from hbmeta.certification.risks import by_task, row_losses
from hbmeta.certification.statements import OVER_TASKS, WITHIN, Statement, state
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.fitted import Fitted
from hbmeta.records import versions
from hbmeta.rows import unknown_name
from hbmeta.tasks import Episode, Tasks, TaskSet
from hbmeta.tasks.checks import check_count, check_seed

__all__ = ["certify"]

EVALUATION = 0.1
"""Share of a statement's δ that measures a random predictor."""
_WHERE = "certify"

Hyperprior: TypeAlias = GaussianHyperprior | FiniteHyperprior


def certify(
    fitted: Fitted,
    tasks: TaskSet | Episode,
    *,
    delta: float = 0.05,
    bound: str = "best-of",
    loss: str | None = None,
    scale: float | None = None,
    p_min: float | None = None,
    hyperprior: Hyperprior | None = None,
    fresh: TaskSet | Episode | None = None,
    shots: int | None = None,
    choices: int = 1,
    used: Sequence[Tasks] = (),
    shared: str | Sequence[Any] | None = None,
    draws: int = 200,
    evaluations: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
) -> Certificate:
    """An upper bound on the expected loss on a new task, with probability at least 1 − δ.

    It is about the environment that the tasks are an independent sample of, with supports of the
    same sizes, and about the average new task; `certify_task` is about one task after its data.

    Args:
        fitted: what is certified.
        tasks: support and query of the tasks to certify on, two or more.
        delta: probability with which the certificate may fail.
        bound: "best-of", or a theorem by its name in `hbmeta.bounds`.
        loss: "zero-one" (the default for classes), "clipped-nll" or "truncated-squared".
        scale: error, in the units of y, from which the truncated squared loss is 1.
        p_min: probability below which the clipped log loss is 1.
        hyperprior: for a θ that is random around θ̂ (`GaussianHyperprior`), or chosen among fits
            (`FiniteHyperprior`), which may then have been fitted on the tasks.
        fresh: tasks that the fit did not see, for the meta-test bound; by default `tasks`, where it
            did not see these.
        shots: points that new tasks will be adapted to, to be checked: of the support, or all of
            a task's for the theorems that pay within tasks.
        choices: between how many fits or settings these tasks chose; δ is divided by it.
        used: tasks that chose anything, to be told apart from these.
        shared: a column of x (or the label of each query row) that tasks have in common, such as
            the lecturers of students: whether they depend on each other through it is tested.
        draws: draws of q(φ | S) that enter a prediction.
        evaluations: M, draws of θ or of φ that measure a random predictor.
        seed: of everything random.
        progress: show progress; by default where standard error is a terminal.
    Returns:
        Certificate: printable, `to_json()`, `check()`.
    Raises:
        DataError: an assumption that the data contradict, or arguments that make no certificate.
        UnsupportedModelError: the theorem does not cover this fit, such as a point mass where a KL
            is paid.
    Example:
        print(hbmeta.certify(fit, new, loss="truncated-squared", scale=2.0))
    """
    _check(fitted, delta, bound, choices, draws, evaluations)
    seed = check_seed(seed, where=_WHERE)
    chosen = loss_of(fitted.problem, loss, p_min=p_min, scale=scale, where=_WHERE)
    episode = episode_of(tasks, _WHERE)
    for other in used:
        refuse_reuse(episode, other, "the choice of a fit or a setting", _WHERE)
    known = shared_tasks(episode, fitted.tasks)
    test = None if known else episode
    if fresh is not None:
        test = episode_of(fresh, _WHERE)
        refuse_reuse(test, fitted.tasks, "training", _WHERE)
        refuse_reuse(episode, test.all, "the meta-test bound", _WHERE)
        for other in used:
            refuse_reuse(test, other, "the choice of a fit or a setting", _WHERE)
    names = _names(bound, hyperprior, test, known, episode)
    if hyperprior is not None:
        _check_hyperprior(hyperprior, fitted, episode)
    each = delta / choices / len(names)
    rows = row_losses(fitted, episode, chosen, draws=draws, seed=seed, progress=progress)
    losses = by_task(rows, episode.query)
    # The theorems that pay within tasks adapt to all rows of a task.
    adapted = episode.all if names[0] in WITHIN else episode.support
    remarks = [
        check_shots(adapted, shots, _WHERE),
        check_fixed_map(
            fitted, episode, chosen, losses, draws=draws, seed=seed, where=_WHERE
        ),
        *dependence(rows.cpu().numpy(), episode.query, shared, _WHERE),
        *warranted(fitted, loss=chosen, hyperprior=hyperprior is not None, choices=choices),
    ]  # fmt: skip
    if not known:
        remarks.append(Remark("checked", "the fit saw none of these tasks"))
    statements: list[Statement] = []
    for name in names:
        if name == "meta_test":
            assert test is not None
            statements.append(_meta_test(fitted, test, episode, chosen, losses, each, draws, seed))
            continue
        assert hyperprior is not None
        paid = {"delta": (1 - EVALUATION) * each, "evaluation_delta": EVALUATION * each}
        if name in WITHIN and isinstance(hyperprior, FiniteHyperprior):
            inputs = within_tasks(
                name,
                hyperprior,
                episode,
                chosen,
                evaluations=evaluations,
                seed=seed,
                progress=progress,
                **paid,
            )
        elif isinstance(hyperprior, FiniteHyperprior):
            inputs = finite_query_split(
                hyperprior, episode, chosen, delta=each, draws=draws, seed=seed
            )
        else:
            inputs = gaussian_query_split(
                soften(fitted, hyperprior, _WHERE),
                hyperprior,
                episode,
                chosen,
                draws=draws,
                evaluations=evaluations,
                seed=seed,
                progress=progress,
                **paid,
            )
        statements.append(state(name, inputs))
    remarks.sort(key=lambda remark: ("flag", "checked", "warranted").index(remark.kind))
    best = int(np.argmin([one.raw for one in statements]))
    if "meta_test" not in names and test is not None:
        own = delta / choices
        beside = _meta_test(fitted, test, episode, chosen, losses, own, draws, seed, beside=True)
        statements.append(beside)
    data = {"tasks": digest(episode)}
    if fresh is not None:
        assert test is not None
        data["fresh"] = digest(test)
    counts = episode.support.counts, episode.query.counts
    return Certificate(
        question="over tasks",
        statements=tuple(statements),
        chosen=best,
        delta=float(delta),
        choices=choices,
        loss=(chosen.name, chosen.constant),
        predictor=_predictor(statements[best], fitted, hyperprior),
        n_tasks=episode.n_tasks,
        shots=(int(counts[0].min()), int(counts[0].max())),
        queries=(int(counts[1].min()), int(counts[1].max())),
        strategy=fitted.strategy.name,
        strategy_settings=fitted.strategy.settings(),
        program=fitted.problem.name,
        settings={
            "delta": float(delta), "bound": bound, "loss": chosen.name, "scale": scale,
            "p_min": p_min, "shots": shots, "choices": choices, "draws": draws,
            "evaluations": evaluations, "seed": seed,
        },
        data=data,
        remarks=tuple(remarks),
        versions=versions(),
    )  # fmt: skip


def _check(fitted: Any, delta: Any, bound: str, choices: Any, draws: Any, evaluations: Any) -> None:
    if not isinstance(fitted, Fitted):
        raise DataError(
            _WHERE,
            needed="what fit returns",
            found=type(fitted).__name__,
            do="Call strategy.fit(model, tasks) first: the posterior is made anew from each task.",
        )
    confidence(delta, _WHERE)
    for value, name in ((choices, "choices"), (draws, "draws"), (evaluations, "evaluations")):
        check_count(value, name, where=_WHERE)
    names = ("best-of", *OVER_TASKS)
    if bound not in names:
        raise unknown_name(bound, names, needed="a bound of", where=_WHERE)


def _names(
    bound: str, hyperprior: Hyperprior | None, test: Episode | None, known: list[Any],
    episode: Episode,
) -> list[str]:  # fmt: skip
    """The theorems that compete."""
    if bound == "best-of":
        names = ["query_split"] if hyperprior is not None else []
        names += ["meta_test"] if test is not None else []
    else:
        names = [bound]
    if not names or (names == ["meta_test"] and test is None):
        raise DataError(
            _WHERE,
            needed="tasks that the fit did not see, or a hyperprior to pay for having seen them",
            found=f"{len(known)} of {episode.n_tasks} tasks that it was fitted on, such as "
            f"{known[0]!r}",
            do="Pass new tasks, or hyperprior=GaussianHyperprior(...).",
        )
    if hyperprior is None and names[0] != "meta_test":
        raise UnsupportedModelError(
            _WHERE,
            needed=f"a hyperprior for {names[0]}",
            found="a point mass at θ̂, whose KL from any hyperprior with a density is infinite",
            do='Pass hyperprior=GaussianHyperprior(...), or use bound="meta_test" on fresh tasks.',
        )
    if names[0] in WITHIN and not isinstance(hyperprior, FiniteHyperprior):
        raise UnsupportedModelError(
            _WHERE,
            needed=f"a FiniteHyperprior for {names[0]}: the expected KL within tasks has to be "
            "known, not estimated",
            found=type(hyperprior).__name__,
            do='Use bound="query_split", which has no KL within tasks.',
        )
    return names


def _check_hyperprior(hyperprior: Hyperprior, fitted: Fitted, episode: Episode) -> None:
    """𝒫 saw none of the tasks that are certified on."""
    if isinstance(hyperprior, FiniteHyperprior):
        for fit in hyperprior.fits:
            refuse_reuse(episode, fit.tasks, "a fit of the hyperprior", _WHERE)
            if fit.tasks.features != fitted.tasks.features or fit.units != fitted.units:
                raise DataError(
                    _WHERE,
                    needed="fits of the hyperprior with the columns and units of the certified one",
                    found=f"{list(fit.tasks.features)}, {fit.units}",
                    do="Fit all of them on tasks of one table.",
                )
    elif isinstance(hyperprior.centre, Fitted):
        refuse_reuse(episode, hyperprior.centre.tasks, "the centre of the hyperprior", _WHERE)


def _meta_test(
    fitted: Fitted,
    test: Episode,
    episode: Episode,
    loss: Loss,
    losses: Any,
    delta: float,
    draws: int,
    seed: int,
    *,
    beside: bool = False,
) -> Statement:
    if test is not episode:
        losses = by_task(row_losses(fitted, test, loss, draws=draws, seed=seed), test.query)
    inputs = {"losses": losses.tolist(), "n_tasks": test.n_tasks, "delta": delta}
    return state("meta_test", inputs, beside=beside)


def _predictor(one: Statement, fitted: Fitted, hyperprior: Hyperprior | None) -> str:
    name = fitted.strategy.name
    if one.bound == "meta_test":
        return f"{name} as fitted"
    after = (
        "φ drawn from the posterior of each task"
        if one.bound in WITHIN
        else "then adapted to each task"
    )
    if isinstance(hyperprior, FiniteHyperprior):
        return f"one of {len(hyperprior.fits)} fits drawn by weight, {after}"
    hyper = one.inputs["hyper"]
    return f"{name} at θ drawn from N(θ̂, {hyper['sd']:g}² I), D = {hyper['dimension']}, {after}"
