"""The columns of a table: which kind they are, what is missing in them, how they become numbers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from hbmeta.errors import DataError
from hbmeta.tasks.checks import TaskId

__all__ = [
    "Column",
    "Level",
    "complete_rows",
    "group_labels",
    "names_in",
    "plain_values",
]

Level = str | int | float | bool
Kind = Literal["numeric", "categorical"]


@dataclass(frozen=True)
class Column:
    """The encoding of one column.

    Args:
        name: the column of the table.
        kind: "numeric", or "categorical" (text, category, bool).
        levels: of a categorical column, sorted or in the order of its categories; the first is the
            reference. Categories without a row are no levels.
        location: subtracted from a numeric column; 0 if it was not standardised.
        scale: a numeric column is then divided by it; 1 if it was not standardised.
    """

    name: str
    kind: Kind
    levels: tuple[Level, ...] = ()
    location: float = 0.0
    scale: float = 1.0

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the encoded columns."""
        if self.kind == "numeric":
            return (self.name,)
        return tuple(f"{self.name}[{level}]" for level in self.levels[1:])

    @classmethod
    def learn(cls, values: pd.Series, *, standardise: bool, where: str) -> Column:
        """Learn the kind, the levels and (if wanted) the mean and standard deviation.

        Args:
            values: a column without missing values.
            standardise: centre at the mean and divide by the standard deviation (of the n values,
                with n in the denominator).
            where: the caller, for messages.
        """
        name = str(values.name)
        kind = _kind(values, where=where)
        if kind == "numeric":
            numbers = _numbers(values, where=where)
            if not standardise:
                return cls(name, kind)
            if np.ptp(numbers) == 0:
                raise DataError(
                    where,
                    needed=f"a column {name!r} that varies, to standardise it",
                    found=f"{numbers[0]!s} in all of its {len(numbers)} rows",
                    do=f"Take {name!r} out of standardise, or out of x.",
                )
            return cls(name, kind, (), float(numbers.mean()), float(numbers.std()))
        if standardise:
            raise DataError(
                where,
                needed="numeric columns in standardise",
                found=f"{name!r}, which is categorical (dtype {values.dtype})",
                do=f"Take {name!r} out of standardise; its levels are coded 0 and 1.",
            )
        levels = _levels(values, where=where)
        if len(levels) < 2:
            raise DataError(
                where,
                needed=f"at least two levels in the categorical column {name!r}",
                found=f"only {levels[0]!r}",
                do=f"Take {name!r} out; it distinguishes no rows.",
            )
        return cls(name, kind, levels)

    def encode(
        self, values: pd.Series, *, where: str
    ) -> tuple[npt.NDArray[np.float64], list[Level]]:
        """Encode a column without missing values.

        Returns:
            The encoded columns (n, features), and the levels that were not learned, whose rows
            are coded as the reference.
        """
        if self.kind == "numeric":
            if _kind(values, where=where) != "numeric":
                raise DataError(
                    where,
                    needed=f"numbers in {self.name!r}, as they were learned",
                    found=f"dtype {values.dtype}",
                    do=f"Convert it with pandas.to_numeric(frame[{self.name!r}]).",
                )
            return (_numbers(values, where=where)[:, None] - self.location) / self.scale, []
        position = {level: index for index, level in enumerate(self.levels)}
        found = plain_values(values)
        codes = np.array([position.get(value, 0) for value in found], dtype=np.int64)
        unknown = list(dict.fromkeys(value for value in found if value not in position))
        return (codes[:, None] == np.arange(1, len(self.levels))).astype(np.float64), unknown


def names_in(frame: Any, names: Sequence[str], *, where: str) -> None:
    """Raise where the table lacks one of the columns, naming the nearest one that it has."""
    if not isinstance(frame, pd.DataFrame):
        raise DataError(
            where,
            needed="a pandas DataFrame in long form, one row per observation",
            found=type(frame).__name__,
            do="Convert it with pandas.DataFrame(...).",
        )
    have = list(frame.columns)
    for name in names:
        if not isinstance(name, str):
            raise DataError(
                where,
                needed="names of columns as text",
                found=f"{name!r} of type {type(name).__name__}",
                do="Rename columns with frame.columns.astype(str); pass x=[] for no inputs.",
            )
        if have.count(name) != 1:
            texts = [column for column in have if isinstance(column, str)]
            near = difflib.get_close_matches(name, texts, n=1, cutoff=0.5)
            hint = f"Was {near[0]!r} meant? " if near else ""
            raise DataError(
                where,
                needed=f"one column {name!r}",
                found="several columns of that name"
                if name in have
                else f"the columns {', '.join(map(repr, have[:12]))}",
                do="Rename them." if name in have else f"{hint}Correct the name or add the column.",
            )


def complete_rows(
    frame: pd.DataFrame, names: Sequence[str], missing: str, *, where: str
) -> tuple[pd.DataFrame, npt.NDArray[np.int64]]:
    """Return the rows without a missing value in the named columns, and their positions."""
    if not len(frame):
        raise DataError(
            where, needed="a table with rows", found="none", do="Check how it was read or filtered."
        )
    absent = frame[list(names)].isna().to_numpy()
    for index, name in enumerate(names):
        count = int(absent[:, index].sum())
        if count == len(frame) or (count and missing == "raise"):
            labels = frame.index[absent[:, index]][:5].tolist()
            raise DataError(
                where,
                needed=f"values in the column {name!r}",
                found=f"{count} of {len(frame)} missing, first in the rows {labels}",
                do=f"Take the column {name!r} out, or fill it."
                if count == len(frame)
                else 'Fill them, or pass missing="drop" to from_frame to leave their rows out.',
            )
    rows = np.flatnonzero(~absent.any(axis=1))
    if not len(rows):
        raise DataError(
            where,
            needed="a row without a missing value",
            found=f"none among {len(frame)}",
            do="Take the emptiest of these columns out: " + ", ".join(map(repr, names)) + ".",
        )
    return frame.iloc[rows], rows


def group_labels(
    values: pd.Series, *, where: str
) -> tuple[npt.NDArray[np.int64], tuple[TaskId, ...]]:
    """Return each row's group (n,) and the groups' labels, in order of their first row."""
    # Groups by their first row; the labels are then few, and the rows may be millions.
    codes, found = pd.factorize(values)
    alike = values.dtype != object or set(map(type, values)) <= {str, int}
    # Equal labels of different types (2 and 2.0) are looked at one by one.
    labels = plain_values(pd.Series(found) if alike else values)
    if all(isinstance(label, float) and label.is_integer() for label in labels):
        labels = [int(label) for label in labels]  # pandas turns whole numbers with gaps to float
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise DataError(
                where,
                needed=f"words or whole numbers in the group column {values.name!r}",
                found=f"{label!r} of type {type(label).__name__}",
                do=f"Convert it with frame[{values.name!r}].astype(str).",
            )
    return codes.astype(np.int64), tuple(dict.fromkeys(labels))


def plain_values(values: pd.Series) -> list[Any]:
    """Return the values as plain Python objects."""
    return [value.item() if isinstance(value, np.generic) else value for value in values.tolist()]


def _kind(values: pd.Series, *, where: str) -> Kind:
    types = pd.api.types
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype) or types.is_bool_dtype(dtype):
        return "categorical"
    if types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype):
        return "numeric"
    # Numbers in an object column would silently become one 0/1 column per different number.
    inferred = types.infer_dtype(values, skipna=True)
    if inferred in ("string", "boolean"):
        return "categorical"
    raise DataError(
        where,
        needed=f"numbers, text, categories or bools in {values.name!r}",
        found=f"dtype {dtype} holding {inferred}",
        do=f"Convert it with pandas.to_numeric(frame[{values.name!r}]), or with .astype(str).",
    )


def _numbers(values: pd.Series, *, where: str) -> npt.NDArray[np.float64]:
    numbers: npt.NDArray[np.float64] = values.to_numpy(dtype=np.float64)
    infinite = ~np.isfinite(numbers)
    if infinite.any():
        raise DataError(
            where,
            needed=f"finite numbers in {values.name!r}",
            found=f"{int(infinite.sum())} infinite, first in the rows "
            f"{values.index[infinite][:5].tolist()}",
            do="Replace them, or drop their rows.",
        )
    return numbers


def _levels(values: pd.Series, *, where: str) -> tuple[Level, ...]:
    present = set(plain_values(values))
    if isinstance(values.dtype, pd.CategoricalDtype):
        ordered = [level for level in plain_values(values.cat.categories) if level in present]
    else:
        ordered = sorted(present)
    for level in ordered:
        if not isinstance(level, str | int | float | bool):
            raise DataError(
                where,
                needed=f"words, numbers or bools as the levels of {values.name!r}",
                found=f"{level!r} of type {type(level).__name__}",
                do=f"Convert it with frame[{values.name!r}].astype(str).",
            )
    return tuple(ordered)
