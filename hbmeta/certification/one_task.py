"""A certificate about one task, after its data: `certify_task`.

It does not say how the fit does on the average new task (that is `certify`, before data), but how
it does on new points of this one:

    new_task   a Gaussian posterior Q from all of S against the learned prior P_θ̂, which other tasks
               taught and which is therefore fixed as far as S is concerned: no hyper-KL is paid,
               R(Q) ≤ kl⁻¹(R̂_S(Q), (KL(Q‖P_θ̂) + log(2√m/δ)) / m), Q drawn anew for each point;
    hold_out   any predictor, a point mass too: adapt on S, certify on the rest U of the task.
"""

from __future__ import annotations

from hbmeta.bounds.checks import confidence
from hbmeta.certification.assumptions import digest, refuse_reuse
from hbmeta.certification.certificate import Certificate, Remark
from hbmeta.certification.losses import loss_of
from hbmeta.certification.over_tasks import EVALUATION
from hbmeta.certification.risks import gibbs_losses, predictive_losses
from hbmeta.certification.statements import state
from hbmeta.certification.task_priors import task_kls
from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.records import versions
from hbmeta.tasks import Episode, Tasks
from hbmeta.tasks.checks import check_count, check_seed

__all__ = ["certify_task"]

_WHERE = "certify_task"


def certify_task(
    fitted: Fitted,
    task: Tasks | Episode,
    *,
    delta: float = 0.05,
    loss: str | None = None,
    scale: float | None = None,
    p_min: float | None = None,
    draws: int = 200,
    evaluations: int = 1000,
    seed: int = 0,
) -> Certificate:
    """An upper bound on the expected loss on new points of one task, after its data.

    Args:
        fitted: a fit that did not see the task.
        task: all of its rows as `Tasks`, for a Gaussian posterior from all of them (`new_task`); or
            an `Episode`, whose support is adapted to and whose query is certified on (`hold_out`).
        delta: probability with which the certificate may fail.
        loss: as for `certify`.
        scale: as for `certify`.
        p_min: as for `certify`.
        draws: draws of q(φ | S) that enter a prediction (`hold_out`).
        evaluations: fresh draws φ ~ Q that measure its empirical risk (`new_task`).
        seed: of everything random.
    Raises:
        DataError: other than one task, no rows, or a task that the fit saw.
        UnsupportedModelError: a posterior or a task prior whose KL is infinite or not known.
    """
    confidence(delta, _WHERE)
    seed = check_seed(seed, where=_WHERE)
    for value, name in ((draws, "draws"), (evaluations, "evaluations")):
        check_count(value, name, where=_WHERE)
    chosen = loss_of(fitted.problem, loss, p_min=p_min, scale=scale, where=_WHERE)
    held = isinstance(task, Episode)
    if isinstance(task, Tasks):
        task = Episode(task, task.keep(task.task < 0))
    certified = task.query if held else task.support
    if task.n_tasks != 1 or not certified.n_points or certified.flat_y is None:
        raise DataError(
            _WHERE,
            needed="one task, with rows and their y to certify on",
            found=f"{task.n_tasks} tasks, {certified.n_points} rows",
            do="Pass tasks[[position]]; certify is about many tasks.",
        )
    refuse_reuse(task, fitted.tasks, "training", _WHERE)
    m = certified.n_points
    inputs: dict[str, object] = {"samples": [m], "n_tasks": 1}
    name = fitted.strategy.name
    if held:
        losses = predictive_losses(fitted, task, chosen, draws=draws, seed=seed)
        inputs |= {"losses": losses.tolist(), "delta": float(delta)}
        predictor = f"{name}, adapted to {task.support.n_points} other points of it"
        remark = "the held-out points chose nothing, neither the adaptation nor when it stops"
    else:
        posterior = fitted.adapt(task.support, seed=seed)
        kls = task_kls(posterior, _WHERE)
        risks = gibbs_losses(posterior, task.support, chosen, draws=evaluations, seed=seed)
        inputs |= {
            "draws": risks[:, 0].tolist(),
            "evaluation_delta": EVALUATION * delta,
            "task_kls": kls.tolist(),
            "delta": (1 - EVALUATION) * delta,
        }
        predictor = f"φ drawn from the posterior of {name}"
        remark = "the prior at θ̂ was chosen before the data of this task"
    statement = state("hold_out" if held else "new_task", inputs)
    return Certificate(
        question="one task",
        statements=(statement,),
        chosen=0,
        delta=float(delta),
        choices=1,
        loss=(chosen.name, chosen.constant),
        predictor=predictor,
        n_tasks=1,
        shots=(task.support.n_points,) * 2,
        queries=(task.query.n_points,) * 2,
        strategy=name,
        strategy_settings=fitted.strategy.settings(),
        program=fitted.problem.name,
        settings={
            "delta": float(delta), "loss": chosen.name, "scale": scale, "p_min": p_min,
            "draws": draws, "evaluations": evaluations, "seed": seed,
        },
        data={"task": digest(task)},
        remarks=(
            Remark("checked", "the fit did not see this task"),
            Remark("warranted", "the points are an independent sample of this task"),
            Remark("warranted", remark),
        ),
        versions=versions(),
    )  # fmt: skip
