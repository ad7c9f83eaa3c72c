"""Is a certificate what it says? Its arithmetic from its file alone, its risks from the tasks.

A file holds the losses and divergences that its bounds were computed from. Each bound is computed
anew from them and compared to what the file claims; so is the ledger of δ: what the competing
statements cost may not exceed δ over the number of choices. That does not show that the losses are
those of the model: with the fit and the tasks they are measured again, with the same seeds.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hbmeta.certification.certificate import Certificate
from hbmeta.certification.losses import LOSSES
from hbmeta.certification.one_task import certify_task
from hbmeta.certification.over_tasks import certify
from hbmeta.certification.statements import ONE_TASK, OVER_TASKS, Statement, state
from hbmeta.errors import DataError, HbmetaError

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

__all__ = ["check_certificate"]

TOLERANCE = 1e-9
"""Relative; another machine may round a logarithm otherwise."""
SAME_LOSS = 1e-6
"""Risks measured again may differ by this: sums in another order, on another machine."""


def check_certificate(
    certificate: Certificate, *, fitted: Fitted | None = None, tasks: Any = None, **again: Any
) -> tuple[str, ...]:
    """What is wrong with a certificate, in sentences; empty where nothing is.

    Args:
        certificate: as computed, or as read from a file.
        fitted: the fit, to measure the risks again; with `tasks`.
        tasks: the tasks that were certified on.
        again: what else `certify` was given (hyperprior, fresh, …), by name.
    """
    complaints = [*_of_ledger(certificate)]
    for one in certificate.statements:
        complaints += _of_statement(certificate, one)
    if (fitted is None) != (tasks is None):
        raise DataError(
            "Certificate.check",
            needed="both the fit and the tasks, to measure the risks again",
            found="one of them",
            do="Pass fitted= and tasks=, or neither to check the arithmetic alone.",
        )
    if fitted is not None and not complaints:
        complaints += _of_risks(certificate, fitted, tasks, again)
    return tuple(complaints)


def _of_ledger(certificate: Certificate) -> list[str]:
    out = []
    if not 0.0 < certificate.delta < 1.0:
        out.append(f"delta is {certificate.delta!r}, which is no probability of failing")
    if certificate.choices < 1:
        out.append(f"choices is {certificate.choices!r}")
    if certificate.loss[0] not in LOSSES:
        out.append(f"the loss {certificate.loss[0]!r} is none of {', '.join(LOSSES)}")
    competing = [one for one in certificate.statements if not one.beside]
    spent = certificate.choices * sum(one.cost for one in competing)
    if spent > certificate.delta * (1 + TOLERANCE):
        out.append(f"the statements cost δ = {spent:.6g}, more than the {certificate.delta:g} said")
    if certificate.statement.beside:
        out.append("the statement that is quoted stands beside the certificate, at another δ")
    elif certificate.statement.value > min(one.value for one in competing):
        out.append(f"{certificate.bound} is quoted, though another statement is smaller")
    return out


def _of_statement(certificate: Certificate, one: Statement) -> list[str]:
    known = ONE_TASK if certificate.question == "one task" else OVER_TASKS
    if one.bound not in known:
        return [f"{one.bound!r} is no theorem about {certificate.question}"]
    try:
        again = state(one.bound, one.inputs, beside=one.beside)
    except (HbmetaError, KeyError, TypeError, ValueError, IndexError) as error:
        return [f"{one.bound} cannot be computed from its inputs: {error}"]
    out = []
    for field in fields(Statement):
        claimed, found = getattr(one, field.name), getattr(again, field.name)
        if not _same(claimed, found):
            out.append(f"{one.bound}: {field.name} is said to be {claimed!r}, and is {found!r}")
    if "hyper" in one.inputs and one.inputs["hyper"]["prior_sd"] not in one.inputs["grid"]:
        out.append(f"{one.bound}: its hyperprior is none of those that shared δ")
    tasks = one.inputs.get("n_tasks", certificate.n_tasks)
    for name in ("losses", "task_kls", "samples"):
        n = len(one.inputs.get(name, range(tasks)))
        out += [f"{one.bound}: {name} of {n} tasks, and not of {tasks}"] if n != tasks else []
    if tasks != certificate.n_tasks and one.bound != "meta_test":
        out.append(f"{one.bound} is about {tasks} tasks, the certificate {certificate.n_tasks}")
    return out


def _same(claimed: Any, found: Any) -> bool:
    if isinstance(found, float) and isinstance(claimed, int | float):
        return math.isclose(claimed, found, rel_tol=TOLERANCE, abs_tol=1e-12)
    return bool(claimed == found)


def _of_risks(certificate: Certificate, fitted: Fitted, tasks: Any, again: Any) -> list[str]:
    make = certify_task if certificate.question == "one task" else certify
    found = make(fitted, tasks, **{**certificate.settings, **again})
    out = [
        f"the tasks ({name}) are not those of the certificate"
        for name in certificate.data
        if certificate.data[name] != found.data.get(name)
    ]
    if out:
        return out
    for one, other in zip(certificate.statements, found.statements, strict=False):
        if abs(one.measured - other.measured) > SAME_LOSS:
            out.append(f"{one.bound}: measured {one.measured:.6f}, and {other.measured:.6f} anew")
    return out
