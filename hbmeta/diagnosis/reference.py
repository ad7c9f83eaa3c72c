"""A posterior to judge by, made on the spot from the program and the rows, and checked itself.

From cheap to dear, the first that passes its own check:

    given θ          weighted draws of p(φ | S, θ) around the mode, where no θ has a distribution:
                     there is none, or its parts are module parameters without priors. k̂ per task.
    nested Laplace   θ integrated out (`NestedLaplace`), k̂ of the weights of θ and of φ.
    NUTS             R̂ ≤ 1.01, 400 effective draws, no divergences.

It is of all rows that are known: those of the tasks in question, and those of the other tasks of
the fit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hbmeta.conditional import conditional
from hbmeta.densities import Empirical
from hbmeta.diagnosis.records import Symptom
from hbmeta.errors import DataError, HbmetaError
from hbmeta.fitted import Fitted
from hbmeta.importance import largest_k, pareto_smoothed
from hbmeta.inference import NUTS, NestedLaplace
from hbmeta.inference.nuts import trouble
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Episode, Tasks, TaskSet

__all__ = ["Choice", "Reference", "find_reference", "reference_fit", "support_of"]

Choice = Literal["auto", "nested", "nuts"]

# Fewer effective draws leave standard errors of means above a tenth of a standard deviation.
_FEWEST = 200
# Share of the draws of φ given θ that must be useful for k̂ of θ's weights to be the whole story.
_EFFICIENT = 0.1
# A NUTS that nobody asked for by name runs for so many numbers at most: seconds.
_SMALL = 1000
_NUTS = {"draws": 1000, "warmup": 1000, "target_accept": 0.95}


@dataclass(frozen=True)
class Reference:
    """Draws to judge by.

    Attributes:
        words: what they are, and how good.
        posterior: of the tasks in question.
        usable: (tasks,) whether they can be relied on.
        effective: (tasks,) effective number of draws.
        level_one: constrained level-1 sites (draws, *shape), where they are drawn.
    """

    words: str
    posterior: TaskPosterior
    usable: Tensor
    effective: Tensor
    level_one: dict[str, Tensor]


def reference_fit(
    fitted: Fitted,
    tasks: Tasks | TaskSet | Episode | None = None,
    *,
    reference: Choice = "auto",
    draws: int = 2000,
    seed: int = 0,
) -> Fitted | None:
    """What `diagnose` judges by, fitted once for several fits of one program to the same rows.

    Args:
        fitted: any of them.
        tasks: whose posterior; those of the fit by default. Of a TaskSet or an Episode the support.
        reference: which kinds may be tried, as in `diagnose`.
        draws: of nested Laplace.
        seed: of all that is random.
    Returns:
        for `diagnose(…, reference=…)`; None where every fit has to be judged given its own θ,
        because no level-1 site has a prior, or where nothing could be fitted.
    Raises:
        DataError: no tasks.
    """
    if not fitted.problem.sites.globals:
        return None
    return _fitted(fitted, support_of(fitted, tasks), reference, draws, seed)[0]


def find_reference(
    fitted: Fitted, support: Tasks, choice: Choice | Fitted, draws: int, seed: int
) -> tuple[Reference | None, list[Symptom]]:
    """The first reference that passes its check; else the last that there is, or None.

    Args:
        fitted: whose program, and whose θ where θ has no distribution.
        support: the tasks in question.
        choice: which kinds may be tried, or a fit of one.
        draws: of each kind but NUTS.
        seed: of all of them.
    Returns:
        the reference, and a symptom for each kind that was tried in vain.
    Raises:
        DataError: a fit of another program or of other rows.
    """
    if isinstance(choice, Fitted):
        _check_same(choice, fitted, support)
        reference, why = _judged(choice, support)
        return reference, [_none(choice.strategy.name, why)] if why else []
    if not fitted.problem.sites.globals and choice != "nuts":
        return _given_theta(fitted, support, draws, seed)
    found, symptoms = _fitted(fitted, support, choice, draws, seed)
    return (None if found is None else _judged(found, support)[0]), symptoms


def support_of(fitted: Fitted, tasks: object) -> Tasks:
    """The rows that a posterior is asked for: those of the fit where nothing is given."""
    support = tasks.support if isinstance(tasks, TaskSet | Episode) else tasks
    if support is None:
        support = fitted.tasks
    if not isinstance(support, Tasks) or not support.n_tasks:
        raise DataError(
            "diagnose",
            needed="one task or more, as Tasks, a TaskSet or an Episode",
            found="none" if isinstance(support, Tasks) else type(support).__name__,
            do="Leave tasks out for those of the fit.",
        )
    return support


def _fitted(
    fitted: Fitted, support: Tasks, choice: Choice, draws: int, seed: int
) -> tuple[Fitted | None, list[Symptom]]:
    """The first fit that passes its check, else the last; and why others did not."""
    symptoms: list[Symptom] = []
    sites = fitted.problem.sites
    numbers = sites.theta_size + support.n_tasks * sites.phi_size
    kinds: list[NestedLaplace | NUTS] = []
    if choice != "nuts":
        kinds.append(NestedLaplace(draws=draws))
    if choice == "nuts" or (choice == "auto" and numbers <= _SMALL):
        kinds.append(NUTS(**_NUTS))  # type: ignore[arg-type]
    last = None
    for strategy in kinds:
        # Whether "auto" compiles hangs on the clock, and the last bits on that.
        compile = "compiled" if isinstance(strategy, NUTS) else False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it warns of is read from its info
                last = strategy.fit(
                    fitted.model,
                    _all_rows(fitted, support),
                    seed=seed,
                    compile=compile,
                    progress=False,
                )
        except HbmetaError as error:
            symptoms.append(_none(strategy.name, f"needed {error.needed}; found {error.found}"))
            continue
        why = _judged(last, support)[1]
        if not why:
            break
        symptoms.append(_none(strategy.name, why))
    return last, symptoms


def _judged(found: Fitted, support: Tasks) -> tuple[Reference, str]:
    """The reference that a fit is, and what its own diagnostics complain of."""
    n_tasks, info, strategy = support.n_tasks, found.info, found.strategy
    if isinstance(strategy, NUTS):
        number = float(info["ess_bulk"].min())
        words = f"NUTS ({number:,.0f} effective draws)"
        why = "; ".join(trouble(info))
    else:
        assert isinstance(strategy, NestedLaplace)
        k, number = info["pareto_k"], min(info["effective_draws"], float(strategy.draws))
        efficient = float(info["proposal_efficiency"].min())
        good = k <= info["threshold"] and number >= _FEWEST and efficient >= _EFFICIENT
        words = f"nested Laplace (k̂ = {k:.2f}, {number:,.0f} effective draws)"
        why = f"k̂ = {k:.2f}, {number:,.0f} effective draws, {efficient:.2f} of those of φ useful"
        why = "" if good else why
    posterior = found.posterior.select(support.ids)
    usable = torch.full((n_tasks,), not why)
    effective = torch.full((n_tasks,), number, dtype=torch.float64)
    return Reference(words, posterior, usable, effective, found.globals()), why


def _check_same(reference: Fitted, fitted: Fitted, support: Tasks) -> None:
    """A reference knows the same program and the same rows, no more and no less."""
    rows = _all_rows(fitted, support)
    shapes = [
        [(site.name, site.unconstrained_shape) for site in (*sites.globals, *sites.locals)]
        for sites in (reference.problem.sites, fitted.problem.sites)
    ]
    wrong = None
    if not isinstance(reference.strategy, NestedLaplace | NUTS):
        wrong = f"one of {reference.strategy.name}"
    elif reference.problem.name != fitted.problem.name or shapes[0] != shapes[1]:
        wrong = f"one of the program {reference.problem.name}, not of {fitted.problem.name}"
    elif reference.tasks.n_tasks != rows.n_tasks or not all(reference.saw(rows)):
        wrong = "one that was fitted to other rows"
    if wrong is not None:
        raise DataError(
            "diagnose",
            needed="as reference a fit of NestedLaplace or NUTS, of the same program to the rows "
            "of these tasks and of the fit's",
            found=wrong,
            do="Take hbmeta.diagnosis.reference_fit(fitted, tasks), or leave reference out.",
        )


def _given_theta(
    fitted: Fitted, support: Tasks, draws: int, seed: int
) -> tuple[Reference | None, list[Symptom]]:
    problem = fitted.problem
    tasks = support.to(device=problem.device, dtype=problem.dtype)
    try:
        density, info = conditional(
            problem, fitted.theta, problem.batch(tasks), draws=draws, seed=seed
        )
    except HbmetaError as error:
        return None, [_none("p(φ | S, θ)", f"needed {error.needed}; found {error.found}")]
    good = (info["converged"] & info["positive"]).cpu()
    effective = info["effective_draws"].double().cpu()
    if isinstance(density, Empirical):
        assert density.log_weights is not None
        rounding = torch.full_like(density.log_weights[0], 1e-9)
        smoothed, k = pareto_smoothed(density.log_weights, rounding)
        density = Empirical(density.phi, smoothed)
        good = good & (k.cpu() <= largest_k(draws)) & (effective >= _FEWEST)
        words = f"weighted draws around the modes, k̂ up to {float(k.max()):.2f}"
    else:
        words = "the exact Gaussian"
    at = " at the θ of the fit, which has no prior" if fitted.theta else ""
    bad = int((~good).sum())
    symptoms = [_none("p(φ | S, θ)", f"{bad} of {len(good)} tasks, {words}")] if bad else []
    posterior = TaskPosterior(problem, fitted.theta, density, tasks)
    return Reference(f"p(φ | S, θ){at} ({words})", posterior, good, effective, {}), symptoms


def _all_rows(fitted: Fitted, support: Tasks) -> Tasks:
    """The tasks in question first, and those of the fit that are not among them."""
    known = set(support.ids)
    new = [i for i in fitted.tasks.ids if i not in known]
    if not new:
        return support
    others = fitted.tasks.select(new)
    ys = [part.flat_y for part in (support, others)]
    return Tasks.from_flat(
        torch.cat([support.flat_x, others.flat_x.to(support.flat_x)]),
        None if ys[0] is None or ys[1] is None else torch.cat([ys[0], ys[1].to(ys[0])]),
        torch.cat([support.task, others.task + support.n_tasks]),
        support.n_tasks + others.n_tasks,
        ids=[*support.ids, *others.ids],
        features=support.features,
    )


def _none(kind: str, why: str) -> Symptom:
    do = 'Pass reference="nuts", or a NUTS fit of your own.'
    if kind == NUTS.__name__:
        do = "Pass as reference a NUTS fit of your own, longer and with a higher target_accept."
    return Symptom(
        name=f"reference by {kind}",
        about="reference",
        measured=why.rstrip("."),
        sure="its own check failed, which says nothing of the fit",
        means="nothing was judged by it.",
        do=do,
    )
