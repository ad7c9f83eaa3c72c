"""One call for all checks, and what they say together of every parameter and every task."""

from __future__ import annotations

import math
import time

import torch

from hbmeta.densities import Delta
from hbmeta.diagnosis.chains import mixes, symptoms_of_draws
from hbmeta.diagnosis.observations import symptoms_of_model
from hbmeta.diagnosis.records import Diagnosis, Parameter, Symptom, Task, Verdict
from hbmeta.diagnosis.reference import Choice, Reference, find_reference, support_of
from hbmeta.diagnosis.verdicts import judged_parameters
from hbmeta.diagnosis.weights import Corrected, correct, symptoms_of_weights
from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior
from hbmeta.records import versions
from hbmeta.tasks import Episode, Tasks, TaskSet
from hbmeta.tasks.checks import check_count, check_seed

_WHERE = "diagnose"
_CHOICES = ("auto", "nested", "nuts", None)
# Median sd ratio of a fit that holds θ at a point, below which that is worth a word.
_NARROW = 0.95

__all__ = ["diagnose"]


def diagnose(
    fitted: Fitted,
    tasks: Tasks | TaskSet | Episode | None = None,
    *,
    reference: Choice | Fitted | None = "auto",
    draws: int = 2000,
    seed: int = 0,
) -> Diagnosis:
    """Whether the posterior of these tasks is wrong, told without a reference at hand.

    What it looks at: R̂, effective draws and divergences of draws; Pareto k̂ of q(φ | S) and the
    moments that its weights correct q's to; a reference that it makes itself by importance sampling
    around modes with θ integrated out, or by NUTS, and that it judges by only where the reference's
    own check passes; and, apart from all that, whether the model predicts its observations.

    Verdicts take the Monte Carlo errors of both sides into account; what cannot be told is
    "unverified". A point estimate has no spread, so that its posterior is wrong;
    `verdict_of_means` judges what it has. A second mode that nothing found is not seen.

    Args:
        fitted: of any strategy.
        tasks: whose posterior; those of the fit by default. Of a TaskSet or an Episode the support.
        reference: "nested" tries importance sampling alone, "nuts" NUTS alone, "auto" NUTS after
            importance sampling where that cannot be relied on and there are few parameters; a fit
            of NestedLaplace or NUTS that is there already (`hbmeta.diagnosis.reference_fit` makes
            one for several fits); None goes by the fit's own diagnostics.
        draws: of the reference and of the weights of q.
        seed: of all that is random; the caller's random state is left alone.
    Returns:
        Diagnosis: printable, `to_frame()`, `to_json()`.
    Raises:
        DataError: no fit, no tasks, or settings out of range.
    References:
        Yao, Vehtari, Simpson, Gelman (2018), ICML, for k̂ of approximations. Vehtari et al. (2021),
        Bayesian Analysis 16(2), for R̂ and effective draws.
    Example:
        print(hbmeta.diagnose(Laplace().fit(model, tasks)))
    """
    start = time.perf_counter()
    _check_arguments(fitted, reference, draws)
    seed = check_seed(seed, where=_WHERE)
    support = support_of(fitted, tasks)
    posterior = fitted.posterior_of(support)
    symptoms = symptoms_of_draws(fitted, posterior)
    corrected = correct(posterior, draws, seed)
    symptoms += symptoms_of_weights(corrected, draws)
    judge, of_reference = None, list[Symptom]()
    if reference is not None:
        judge, of_reference = find_reference(fitted, posterior.support, reference, draws, seed)
    trusted = judge is not None and bool(judge.usable.all())
    parameters = judged_parameters(fitted, posterior, judge, corrected, seed)
    symptoms += _symptoms_of_spread(fitted, posterior, parameters if trusted else [])
    shown = judge.posterior if judge is not None and trusted else posterior
    symptoms += symptoms_of_model(shown, trusted, seed)
    theta = "draws" if fitted.drawn else "point" if fitted.theta else "none"
    return Diagnosis(
        strategy=fitted.strategy.name,
        program=fitted.problem.name,
        theta=theta,
        reference=_words(fitted, judge, corrected),
        parameters=tuple(parameters),
        tasks=tuple(_tasks(posterior, parameters, corrected)),
        symptoms=(*symptoms, *of_reference),
        seed=seed,
        seconds=time.perf_counter() - start,
        versions=versions(),
    )


def _check_arguments(fitted: object, reference: object, draws: int) -> None:
    if not isinstance(fitted, Fitted):
        raise DataError(
            _WHERE,
            needed="what fit returns",
            found=type(fitted).__name__,
            do="Call strategy.fit(model, tasks) first.",
        )
    if not isinstance(reference, Fitted) and reference not in _CHOICES:
        raise DataError(
            _WHERE,
            needed='reference as "auto", "nested", "nuts", a fit of NestedLaplace or NUTS, or None',
            found=repr(reference),
            do='Leave it out for "auto".',
        )
    check_count(draws, "draws", where=_WHERE)
    if draws < 200:
        raise DataError(
            _WHERE, needed="200 draws or more", found=str(draws), do="Leave it out for 2000."
        )


def _symptoms_of_spread(
    fitted: Fitted, posterior: TaskPosterior, parameters: list[Parameter]
) -> list[Symptom]:
    """A point in the place of a posterior, and a θ whose own uncertainty is left out."""
    if isinstance(posterior.density, Delta):
        return [
            Symptom(
                name="point estimate",
                about="approximation",
                measured="standard deviation 0 in every parameter of every task",
                sure="by construction",
                means="means can be right; intervals, probabilities and decisions that weigh risks "
                "cannot.",
                do="Use Laplace.soften(fitted) for a Gaussian around it, or Laplace.",
            )
        ]
    known = [p.sd_ratio for p in parameters if p.task is not None and math.isfinite(p.sd_ratio)]
    if fitted.drawn or not fitted.problem.sites.globals or not known:
        return []
    median = float(torch.tensor(known).median())
    if median >= _NARROW:
        return []
    return [
        Symptom(
            name="θ at a point",
            about="approximation",
            measured=f"a median standard deviation of {median:.2f} of the one with θ integrated "
            "out",
            sure="from the same reference as the verdicts",
            means="intervals of task parameters are too narrow by what is not known about θ, or "
            "by q's own error.",
            do="Use NestedLaplace, NUTS, or Variational(theta='distribution').",
        )
    ]


def _tasks(
    posterior: TaskPosterior, parameters: list[Parameter], corrected: Corrected | None
) -> list[Task]:
    by_task: dict[object, list[Parameter]] = {i: [] for i in posterior.ids}
    for parameter in parameters:
        if parameter.task is not None:
            by_task[parameter.task].append(parameter)
    out = []
    for position, (task, own) in enumerate(by_task.items()):
        verdicts = {p.verdict for p in own}
        verdict: Verdict = "right" if verdicts == {"right"} else "unverified"
        if "wrong" in verdicts:
            verdict = "wrong"
        known = [p for p in own if math.isfinite(p.shift)]
        worst = max(known, key=lambda p: p.distance).label if known else ""
        k = math.nan if corrected is None else float(corrected.pareto_k[position])
        out.append(Task(task, verdict, worst, k))
    return out


def _words(fitted: Fitted, judge: Reference | None, corrected: Corrected | None) -> str:
    if judge is not None and bool(judge.usable.any()):
        return judge.words
    if judge is None and corrected is not None and bool(corrected.usable.any()):
        return "the weights of q given θ, which can find it wrong but not right"
    return "its own R̂, effective draws and divergences" if mixes(fitted) else ""
