"""Predictions for the rows of a person's data frame, of known and of new groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from hbmeta.errors import DataError
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Schema, Tasks

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

__all__ = ["predict_frame"]

_WHERE = "Fitted.predict"
_COLUMNS = ("status", "mean", "sd", "lower", "upper")


def predict_frame(
    fitted: Fitted,
    frame: pd.DataFrame,
    support: pd.DataFrame | None,
    interval: float,
    seed: int,
) -> pd.DataFrame:
    """See `Fitted.predict`.

    A known group keeps the posterior of the fit. A new group is adapted to all of its rows in
    `support`, at the θ of the fit; without any it is predicted as a task without data.

    Raises:
        DataError: the fit knows no columns; a column is absent, a value missing or a level unseen
            where the policy is "raise"; a known group in `support`; an interval outside (0, 1).
    """
    schema = _checked(fitted, interval)
    known = set(fitted.tasks.ids)
    observed = _observed(schema, support, known)
    encoded = schema.encode(frame)
    inputs = encoded.tasks
    _refuse_other_type(inputs.ids, known)
    places_of = np.split(encoded.rows, inputs.offsets[1:].tolist())
    rows_of = dict(zip(inputs.ids, places_of, strict=True))
    status = np.full(len(frame), None, dtype=object)
    numbers = np.full((len(frame), 4), np.nan)

    def fill(posterior: TaskPosterior, statuses: Sequence[str]) -> None:
        tasks = inputs.select(posterior.ids)
        predictive = posterior.predict(tasks, seed=seed)
        found = [predictive.mean, predictive.sd, *predictive.interval(interval)]
        # Both sides go group by group, and inside a group in the order of the frame.
        places = np.concatenate([rows_of[label] for label in posterior.ids])
        numbers[places] = torch.stack([tasks.unpad(value) for value in found], -1).cpu().numpy()
        status[places] = np.repeat(np.array(statuses, dtype=object), tasks.counts.cpu().numpy())

    fitted_on = [label for label in inputs.ids if label in known]
    new = [label for label in inputs.ids if label not in known]
    if fitted_on:
        fill(fitted.posterior.select(fitted_on), ["known"] * len(fitted_on))
    if new:
        rows = _support_of(new, observed, schema)
        kinds = ["adapted" if count else "new" for count in rows.counts.tolist()]
        fill(fitted.adapt(rows, seed=seed), kinds)
    table = frame[list(schema.group_columns)].copy()
    table["status"] = status
    table[list(_COLUMNS[1:])] = numbers
    return table


def _checked(fitted: Fitted, interval: float) -> Schema:
    if not 0.0 < interval < 1.0:
        raise DataError(
            _WHERE,
            needed="interval as a probability between 0 and 1",
            found=f"{interval}",
            do="Pass 0.9, not 90.",
        )
    schema = fitted.schema
    if schema is None:
        raise DataError(
            _WHERE,
            needed="a fit that knows how a data frame becomes x and y",
            found="a fit on tasks that came without a data frame",
            do="Fit on what tasks.from_frame(...) or its split(...) returns, or predict with "
            "fitted.adapt(support).predict(x).",
        )
    taken = next((name for name in schema.group_columns if name in _COLUMNS), None)
    if taken is not None:
        raise DataError(
            _WHERE,
            needed=f"a group column named otherwise than {', '.join(_COLUMNS)}",
            found=f"{taken!r}",
            do="Rename it before tasks.from_frame, and fit again.",
        )
    return schema


def _refuse_other_type(labels: Iterable[Any], known: set[Any]) -> None:
    """A known group whose number came as text, or the other way round, is not a new group."""
    texts = {str(label): label for label in known}
    for label in labels:
        if label not in known and str(label) in texts:
            raise DataError(
                _WHERE,
                needed=f"labels of groups of the type that was fitted: {texts[str(label)]!r}",
                found=f"{label!r} of type {type(label).__name__}",
                do="Convert the group column with .astype(str) or .astype(int).",
            )


def _observed(schema: Schema, support: pd.DataFrame | None, known: set[Any]) -> Tasks | None:
    """The observed rows of new groups as tasks."""
    if support is None or not len(support):
        return None
    observed = schema.encode(support, need_y=True).tasks
    _refuse_other_type(observed.ids, known)
    refit = [label for label in observed.ids if label in known]
    if refit:
        # Draws of θ that saw a group's first rows would count them twice in p(S ∪ S_new | θ).
        others = f" (and of {len(refit) - 1} more)" if len(refit) > 1 else ""
        raise DataError(
            _WHERE,
            needed="support rows of new groups only",
            found=f"rows of {refit[0]!r}, which was fitted on{others}",
            do="Leave them out where the fit saw them; to learn from further rows of a known "
            "group, fit again with them.",
        )
    return observed


def _support_of(new: Sequence[Any], observed: Tasks | None, schema: Schema) -> Tasks:
    """What was observed of the new groups, in their order; nothing of some or of all."""
    nothing = torch.zeros(0, len(schema.features), dtype=getattr(torch, schema.dtype))
    x, y, task = nothing, nothing.new_zeros(0), torch.zeros(0, dtype=torch.int64)
    if observed is not None and observed.flat_y is not None:
        position = {label: number for number, label in enumerate(new)}
        index = torch.tensor([position.get(label, -1) for label in observed.ids])[observed.task]
        asked = index >= 0
        x, y, task = observed.flat_x[asked], observed.flat_y[asked], index[asked]
    return Tasks.from_flat(x, y, task, len(new), ids=new, features=schema.features)
