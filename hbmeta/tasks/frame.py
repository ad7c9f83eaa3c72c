"""A person's own long table as tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import pandas as pd
import torch

from hbmeta.errors import DataError
from hbmeta.tasks.columns import Column, complete_rows, names_in
from hbmeta.tasks.schema import MissingPolicy, Schema, UnseenPolicy
from hbmeta.tasks.taskset import TaskSet

__all__ = ["from_frame"]


def from_frame(
    frame: pd.DataFrame,
    *,
    group: str,
    x: str | Sequence[str],
    y: str,
    standardise: bool | str | Sequence[str] = (),
    missing: MissingPolicy = "raise",
    unseen: UnseenPolicy = "raise",
    order: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> TaskSet:
    """Read a long table, one row per observation, one task per group.

    Numeric columns of x stay as they are (0/1 columns too). Text, category and bool columns are
    treatment-coded: the first level (sorted, or the first category) is the reference, each further
    level gets a 0/1 column named "column[level]". y is numeric, or has two levels, the first of
    which is coded 0.0 and the second 1.0 (False 0.0, True 1.0). The groups' labels become the ids,
    in order of their first row.

    Args:
        frame: the table; it is not changed.
        group: column of the groups' labels (words or whole numbers).
        x: input columns, in the order wanted; may be empty.
        y: output column.
        standardise: names of numeric columns (y among them or not) to centre at their mean and
            divide by their standard deviation (n in the denominator), both over all rows of this
            table, query rows of a later split included; True for all numeric columns of x and y.
            `Schema.restore` brings outputs back to the table's units.
        missing: "raise" an error at a missing value in one of these columns, or "drop" its row.
        unseen: what an unknown level of an input does in tables encoded later: "raise" an error,
            or count as the "reference" level, with a warning.
        order: column that `TaskSet.split(order=...)` may split by, such as a date; not among x
            unless it is named there too.
        dtype: floating dtype of the tasks.
    Raises:
        DataError: an absent column (the nearest name is given), missing or infinite values, a
            column that cannot be coded or standardised.
    Example:
        >>> frame = pd.DataFrame(
        ...     {"school": ["a", "a", "b"], "sex": ["f", "m", "f"], "score": [1.0, 2.0, 3.0]}
        ... )
        >>> from_frame(frame, group="school", x=["sex"], y="score").tasks
        Tasks(2 tasks, 3 points (1 to 2 each), features [sex[m]], y numbers, float64)
    """
    where = "from_frame"
    inputs = list(x) if isinstance(x, Iterable) and not isinstance(x, str) else [x]
    _check_choice(missing, get_args(MissingPolicy), "missing")
    _check_choice(unseen, get_args(UnseenPolicy), "unseen")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DataError(
            where, needed="a floating dtype", found=f"{dtype!r}", do="Pass torch.float64."
        )
    used = [group, *inputs, y]
    repeated = [name for name in dict.fromkeys(used) if used.count(name) > 1]
    if repeated:
        raise DataError(
            where,
            needed="different columns for group, x and y",
            found=f"{repeated[0]!r} more than once",
            do="Name each column once; an intercept per group comes from the model.",
        )
    named = used if order is None else list(dict.fromkeys([*used, order]))
    names_in(frame, named, where=where)
    table, positions = complete_rows(frame, named, missing, where=where)

    if isinstance(standardise, bool):
        chosen = {
            name for name in [*inputs, y] if standardise and _is_number(table[name], where=where)
        }
    else:
        chosen = {standardise} if isinstance(standardise, str) else set(standardise)
    for name in sorted(chosen):
        if name not in [*inputs, y]:
            raise DataError(
                where,
                needed=f"columns of x or y in standardise: {', '.join(map(repr, [*inputs, y]))}",
                found=f"{name!r}",
                do="Correct the name, or add the column to x.",
            )
    columns = tuple(
        Column.learn(table[name], standardise=name in chosen, where=where) for name in inputs
    )
    output = Column.learn(table[y], standardise=y in chosen, where=where)
    if len(output.levels) > 2:
        raise DataError(
            where,
            needed=f"a numeric or two-level y in {y!r}",
            found=f"{len(output.levels)} levels: {', '.join(map(repr, output.levels[:8]))}",
            do="Merge levels, or pass class labels with Tasks(x, y) and int64 y.",
        )
    schema = Schema(group, columns, output, missing, unseen, str(dtype).removeprefix("torch."))
    encoded = schema.encode(table, need_y=True)
    ranks = None
    if order is not None:
        rank = table[order].rank(method="dense").to_numpy(dtype="float64")[encoded.rows]
        ranks = (order, torch.tensor(rank, dtype=torch.float64))
    return TaskSet(
        support=encoded.tasks,
        schema=schema,
        dropped=len(frame) - len(table),
        support_rows=torch.tensor(positions[encoded.rows]),
        order=ranks,
    )


def _is_number(values: pd.Series, *, where: str) -> bool:
    return Column.learn(values, standardise=False, where=where).kind == "numeric"


def _check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise DataError(
            "from_frame",
            needed=f"{name} as one of {', '.join(map(repr, choices))}",
            found=f"{value!r}",
            do="Choose one of these policies.",
        )
