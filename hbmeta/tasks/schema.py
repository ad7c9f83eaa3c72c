"""How the columns of a person's table become numbers, learned once and kept for new tables."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks.batch import Tasks
from hbmeta.tasks.columns import Column, Level, complete_rows, group_labels, names_in, plain_values
from hbmeta.tasks.design import Design

__all__ = ["Encoded", "Schema"]

MissingPolicy = Literal["raise", "drop"]
UnseenPolicy = Literal["raise", "reference"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """A table as tasks, and where each of their rows came from.

    Args:
        tasks: the rows, one task per group, in the order in which the groups appear.
        rows: (n,) position in the table (0 for its first row) of each flat row of `tasks`.
        dropped: how many rows of the table had a missing value and were left out.
    """

    tasks: Tasks
    rows: npt.NDArray[np.int64]
    dropped: int

    def align(self, values: Tensor, length: int) -> npt.NDArray[np.float64]:
        """Put one number per flat row (n,) in the order of the table (length,), NaN if dropped."""
        aligned = np.full(length, np.nan)
        aligned[self.rows] = values.detach().cpu().numpy()
        return aligned


@dataclass(frozen=True)
class Schema:
    """The encoding of a table: learned by `from_frame`, applied to every later table.

    Numeric columns stay numbers, (value - location) / scale if standardised. Categorical columns
    (text, category, bool) are treatment-coded: the first level is the reference, each further
    level has a 0/1 column "column[level]".

    Args:
        group: the column whose labels are the ids of the tasks.
        x: the encoding of each input column.
        y: the encoding of the output; two levels are coded 0 (first) and 1 (second).
        missing: what a missing value does: "raise" an error, or "drop" its row.
        unseen: what an unknown level of an input does: "raise" an error, or count as the
            "reference" level, with a warning.
        dtype: name of the floating dtype, such as "float64".
        design: how a formula makes these columns of the table's own; None where they are its own.
    """

    group: str
    x: tuple[Column, ...]
    y: Column
    missing: MissingPolicy
    unseen: UnseenPolicy
    dtype: str
    design: Design | None = None

    @property
    def group_columns(self) -> tuple[str, ...]:
        """The columns of the table that the labels of the groups are made of."""
        return (self.group,) if self.design is None else self.design.group_columns

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of the encoded x."""
        return tuple(feature for column in self.x for feature in column.features)

    @property
    def y_name(self) -> str:
        """The output's column."""
        return self.y.name

    @property
    def y_location(self) -> float:
        """What was subtracted from y, in the table's units; 0 if y was not standardised."""
        return self.y.location

    @property
    def y_scale(self) -> float:
        """What y was then divided by, in the table's units; 1 if y was not standardised."""
        return self.y.scale

    @property
    def y_levels(self) -> tuple[Level, ...]:
        """The two levels that are coded 0 and 1; empty if y is a number."""
        return self.y.levels

    def restore(self, y: Tensor) -> Tensor:
        """Encoded outputs in the units of the table: location + scale · y."""
        return self.y.location + self.y.scale * y

    def encode(self, frame: pd.DataFrame, *, need_y: bool = False) -> Encoded:
        """Encode a table as this schema says; its groups need not be known.

        Args:
            frame: a table with the group column and the columns of x, and y if `need_y`.
            need_y: whether to read the output too; without it the tasks have y None.
        Raises:
            DataError: a column is absent or of another kind, a value is missing or a level
                unseen where the policy is "raise", or no row is left.
        """
        where = "Schema.encode"
        names = [self.group, *(column.name for column in self.x)]
        names += [self.y.name] if need_y else []
        if self.design is None:
            names_in(frame, names, where=where)
            table, rows = complete_rows(frame, names, self.missing, where=where)
        else:
            table, rows = self.design.table(frame, missing=self.missing, need_y=need_y)
        codes, ids = group_labels(table[self.group], where=where)
        columns = [self._encode_input(column, table[column.name]) for column in self.x]
        x = np.concatenate([np.empty((len(table), 0)), *columns], axis=1)
        dtype: torch.dtype = getattr(torch, self.dtype)
        y = None
        if need_y:
            encoded, unknown = self.y.encode(table[self.y.name], where=where)
            _refuse_unseen(self.y, unknown, where=where)
            y = torch.tensor(encoded[:, 0], dtype=dtype)
        order = np.argsort(codes, kind="stable")
        tasks = Tasks.from_flat(
            torch.tensor(x, dtype=dtype), y, codes, len(ids), ids=ids, features=self.features
        )
        return Encoded(tasks, rows[order], len(frame) - len(table))

    def _encode_input(self, column: Column, values: pd.Series) -> npt.NDArray[np.float64]:
        encoded, unknown = column.encode(values, where="Schema.encode")
        if self.unseen == "raise":
            _refuse_unseen(column, unknown, where="Schema.encode")
        elif unknown:
            count = sum(value in unknown for value in plain_values(values))
            warnings.warn(
                f"Schema.encode: {count} rows of {column.name!r} hold levels that were not "
                f"learned ({_listed(unknown)}) and count as the reference {column.levels[0]!r}",
                stacklevel=3,
            )
        return encoded

    def to_json(self) -> str:
        """Write the schema as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is not a schema.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["x"] = tuple(_column(column) for column in fields["x"])
            fields["y"] = _column(fields["y"])
            if fields.get("design") is not None:
                fields["design"] = Design.from_json(fields["design"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                "Schema.from_json",
                needed="the text that Schema.to_json wrote",
                found=f"{text[:60]!r} ({type(error).__name__}: {error})",
                do="Write it anew with schema.to_json().",
            ) from error


def _column(fields: dict[str, Any]) -> Column:
    return Column(**{**fields, "levels": tuple(fields["levels"])})


def _refuse_unseen(column: Column, unknown: Sequence[Level], *, where: str) -> None:
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), [str(level) for level in column.levels])
        raise DataError(
            where,
            needed=f"the learned levels of {column.name!r}: {_listed(column.levels)}",
            found=f"the unseen {_listed(unknown)}",
            do=(f"Was {near[0]!r} meant? " if near else "")
            + 'Correct or drop these rows, or choose unseen="reference" for inputs in from_frame.',
        )


def _listed(levels: Sequence[Level], most: int = 8) -> str:
    listed = ", ".join(repr(level) for level in levels[:most])
    return listed if len(levels) <= most else f"{listed}, ... ({len(levels)} in all)"
