"""What a formula makes of a person's table: one number per row and column, and one task per group.

The columns of x are, in this order,

    the columns of the common part, without the constant
    columns that only a group term has
    offset(e)       the expression e, where there is one
    trials(n)       the number of trials of a binomial response
    code(g)         for every group g that is not the task, the position of the row's level

so that a program indexes what it needs by position. Everything is learned from one table, kept as
JSON can hold it, and applied to every later one: levels, the state of the transforms, the levels
of the groups that are not the task. The labels of the task's group are free: a new label is a new
task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from hbmeta.errors import DataError
from hbmeta.tasks.columns import Column, complete_rows, group_labels, names_in, plain_values
from hbmeta.tasks.formula import ParsedFormula, parse_formula
from hbmeta.tasks.formula_parts import INTERCEPT, FormulaPart, variables

__all__ = ["Block", "Design"]

_WHERE = "from_formula"


@dataclass(frozen=True)
class Block:
    """The coefficients of one group term.

    Args:
        group: the name of its group, "herd:animal".
        columns: what they multiply, `INTERCEPT` being the constant.
        correlated: whether the prior has a correlation matrix.
    """

    group: str
    columns: tuple[str, ...]
    correlated: bool


@dataclass(frozen=True)
class Design:
    """A formula with what it learned from a table; see the module.

    Args:
        formula: the text.
        task: the name of the group whose levels are the tasks.
        group_columns: the columns of the table that make up its labels.
        inputs: kind and levels of every column of the table that x needs.
        parts: what each right-hand side learned, by its text.
        levels: labels of the other groups, in the order of their codes.
    """

    formula: str
    task: str
    group_columns: tuple[str, ...]
    inputs: tuple[Column, ...]
    parts: dict[str, FormulaPart]
    levels: dict[str, list[str]]

    @classmethod
    def learn(cls, formula: str, frame: pd.DataFrame, group: str | None = None) -> Design:
        """Learn from a table, leaving out its rows with a missing value.

        Args:
            formula: see `hbmeta.tasks.formula`.
            frame: the table, one row per observation; it is not changed.
            group: which group is the task; the one with the most levels by default (the first of
                those that have as many), since what is a task's own is what is integrated out.
        Raises:
            DataError: the formula and the table do not fit; names the term and the column.
        """
        parsed = parse_formula(formula)
        names_in(frame, (), where=_WHERE)
        texts = _texts(parsed)
        have = [name for name in frame.columns if isinstance(name, str)]
        needed = list(dict.fromkeys(name for text in texts for name in variables(text, have)))
        groups = {term.name: term.group for term in parsed.groups}
        labels = list(dict.fromkeys(name for group in groups.values() for name in group))
        names_in(frame, [*needed, *labels], where=_WHERE)
        used = list(dict.fromkeys([*needed, *labels, *_response_columns(parsed, have)]))
        table, _ = complete_rows(frame, used, "drop", where=_WHERE)
        found = {name: list(dict.fromkeys(_labels(table, of))) for name, of in groups.items()}
        for name, levels in found.items():
            if len(levels) < 2:
                raise DataError(
                    _WHERE,
                    needed=f"two groups or more of {name!r}, to learn how much they vary",
                    found=f"only {levels[0]!r} in {len(table)} rows",
                    do="Take the term out, or check how the table was filtered.",
                )
        if group is not None and group not in groups:
            raise DataError(
                _WHERE,
                needed=f"group= as one of {', '.join(map(repr, groups))}",
                found=repr(group),
                do="Name a group of the formula as it is written there, such as 'herd:animal'.",
            )
        task = group or max(found, key=lambda name: len(found[name]))
        inputs = tuple(
            Column.learn(table[name], standardise=False, where=_WHERE) for name in needed
        )
        values = _values(inputs, table)
        parts = {text: FormulaPart.learn(text, values)[0] for text in texts}
        others = {name: levels for name, levels in found.items() if name != task}
        design = cls(formula, task, groups[task], inputs, parts, others)
        design._check_blocks()
        return design

    @property
    def parsed(self) -> ParsedFormula:
        """The formula by parts."""
        return parse_formula(self.formula)

    @property
    def common(self) -> tuple[str, ...]:
        """The columns whose coefficients all tasks share, `INTERCEPT` being the constant."""
        return self.parts[self.parsed.common].names

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One per group term, those of the task first."""
        found = [
            Block(term.name, self.parts[term.effects].names, term.correlated)
            for term in self.parsed.groups
        ]
        return tuple(sorted(found, key=lambda block: block.group != self.task))

    @property
    def offset(self) -> str | None:
        """The column of x that is added to the linear predictor."""
        offsets = self.parsed.offsets
        return f"offset({' + '.join(offsets)})" if offsets else None

    @property
    def trials(self) -> str | None:
        """The column of x that holds the numbers of trials."""
        return None if self.parsed.trials is None else f"trials({self.parsed.trials})"

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of x."""
        columns = [*self.common, *(name for block in self.blocks for name in block.columns)]
        found = [name for name in dict.fromkeys(columns) if name != INTERCEPT]
        found += [name for name in (self.offset, self.trials) if name is not None]
        return (*found, *(f"code({name})" for name in self.levels))

    @property
    def label(self) -> str:
        """The column of the tasks' labels in `table`; a predictor may have the group's name."""
        return f"({self.task})" if self.task in self.features else self.task

    @property
    def response(self) -> str:
        """The column of y in `table`."""
        name = _bare_name(self.parsed.response)
        return f"({name})" if name in (*self.features, self.label) else name

    def table(
        self, frame: pd.DataFrame, *, missing: str, need_y: bool
    ) -> tuple[pd.DataFrame, npt.NDArray[np.int64]]:
        """The columns of x, the labels, and y if wanted, of a table; and where its rows came from.

        Raises:
            DataError: a column is absent or of another kind, a level was not learned, a value is
                missing where the policy is "raise" or cannot be transformed.
        """
        parsed = self.parsed
        names = [column.name for column in self.inputs]
        groups = {term.name: term.group for term in parsed.groups}
        names += [name for group in groups.values() for name in group]
        if need_y:
            names += _response_columns(parsed, [str(name) for name in frame.columns])
        names = list(dict.fromkeys(names))
        names_in(frame, names, where=_WHERE)
        table, rows = complete_rows(frame, names, missing, where=_WHERE)
        values = _values(self.inputs, table)
        texts = [parsed.common, *dict.fromkeys(term.effects for term in parsed.groups)]
        matrices = [self.parts[text].columns(values) for text in texts]
        columns = {name: matrix[name].to_numpy() for matrix in matrices[::-1] for name in matrix}
        if self.offset is not None:
            found = [self.parts[_alone(text)].columns(values) for text in parsed.offsets]
            columns[self.offset] = np.concatenate(found, axis=1).sum(axis=1)
        if parsed.trials is not None:
            matrix = self.parts[_alone(parsed.trials)].columns(values)
            assert self.trials is not None
            columns[self.trials] = _single(matrix, parsed.trials)
        for name, levels in self.levels.items():
            columns[f"code({name})"] = _codes(_labels(table, groups[name]), levels, name)
        out = {name: columns[name] for name in self.features}
        own = groups[self.task]
        out[self.label] = (
            table[own[0]].to_numpy() if len(own) == 1 else np.array(_labels(table, own))
        )
        if need_y:
            out[self.response] = _response(parsed.response, table)
        return pd.DataFrame(out, index=table.index), rows

    def _check_blocks(self) -> None:
        for group in {block.group for block in self.blocks}:
            names = [n for block in self.blocks if block.group == group for n in block.columns]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None or not names:
                raise DataError(
                    _WHERE,
                    needed=f"each effect once in the terms of {group!r}, and at least one",
                    found=f"{twice!r} more than once" if names else "none",
                    do="Write (1 | g) + (0 + x | g) for effects that are not correlated.",
                )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Design:
        """The inverse of `dataclasses.asdict`, also after a passage through JSON."""
        parts = {
            text: FormulaPart(**{**part, "names": tuple(part["names"])})
            for text, part in fields["parts"].items()
        }
        inputs = tuple(
            Column(**{**one, "levels": tuple(one["levels"])}) for one in fields["inputs"]
        )
        design = cls(
            **{**fields, "group_columns": tuple(fields["group_columns"])}
            | {"inputs": inputs, "parts": parts}
        )
        # A file may hold anything: its expressions must be such as a formula may hold.
        for text in _texts(design.parsed):
            variables(parts[text].text, [column.name for column in inputs])
        return design


def _texts(parsed: ParsedFormula) -> list[str]:
    """Every right-hand side of a formula once."""
    alone = [*parsed.offsets, *([] if parsed.trials is None else [parsed.trials])]
    texts = [parsed.common, *(term.effects for term in parsed.groups), *map(_alone, alone)]
    return list(dict.fromkeys(texts))


def _alone(expression: str) -> str:
    """A formula with one expression as its only column."""
    return f"0 + {expression}" if expression.startswith("`") else f"0 + {{{expression}}}"


def _bare_name(text: str) -> str:
    return text[1:-1] if text.startswith("`") and text.endswith("`") else text


def _response_columns(parsed: ParsedFormula, columns: list[str]) -> tuple[str, ...]:
    if _bare_name(parsed.response) in columns:
        return (_bare_name(parsed.response),)
    return variables(_alone(parsed.response), columns)


def _response(text: str, table: pd.DataFrame) -> Any:
    """y as the table has it where it is a column, else computed."""
    name = _bare_name(text)
    if name in table.columns:
        return table[name]
    needed = list(variables(_alone(text), [str(column) for column in table.columns]))
    part, matrix = FormulaPart.learn(_alone(text), table[needed])
    if part.state:
        raise DataError(
            _WHERE,
            needed="a response that is computed row by row",
            found=f"{text!r}, which depends on the other rows",
            do="Compute the column in the table first; priors are scaled to y without it.",
        )
    return _single(matrix, text)


def _single(matrix: pd.DataFrame, text: str) -> npt.NDArray[np.float64]:
    if matrix.shape[1] != 1:
        raise DataError(
            _WHERE,
            needed=f"one number per row from {text!r}",
            found=f"{matrix.shape[1]} columns",
            do="Name a numeric column or an expression of numeric columns.",
        )
    column: npt.NDArray[np.float64] = matrix.to_numpy()[:, 0]
    return column


def _values(inputs: tuple[Column, ...], table: pd.DataFrame) -> pd.DataFrame:
    """The input columns as formulaic is to see them: numbers, or categories in learned order."""
    out: dict[str, Any] = {}
    for column in inputs:
        _, unknown = column.encode(table[column.name], where=_WHERE)
        if unknown:
            raise DataError(
                _WHERE,
                needed=f"the levels of {column.name!r} that were learned: "
                + ", ".join(map(repr, column.levels[:8])),
                found=", ".join(map(repr, unknown[:8])),
                do="Correct or drop these rows, or learn the formula from a table that has them.",
            )
        values = table[column.name]
        if column.levels and not all(isinstance(level, bool) for level in column.levels):
            values = pd.Categorical(plain_values(values), categories=list(column.levels))
        out[column.name] = values
    return pd.DataFrame(out, index=table.index)


def _labels(table: pd.DataFrame, columns: tuple[str, ...]) -> list[str]:
    """Each row's level of a group as text, "a:b" for several columns."""
    texts = []
    for name in columns:
        codes, labels = group_labels(table[name], where=_WHERE)
        texts.append(np.array([str(label) for label in labels], dtype=object)[codes])
    return [":".join(row) for row in zip(*texts, strict=True)]


def _codes(labels: list[str], levels: list[str], group: str) -> npt.NDArray[np.float64]:
    position = {level: index for index, level in enumerate(levels)}
    unknown = [label for label in dict.fromkeys(labels) if label not in position]
    if unknown:
        raise DataError(
            _WHERE,
            needed=f"levels of {group!r} that were fitted, {len(levels)} in all",
            found=", ".join(map(repr, unknown[:8])),
            do=f"Only the tasks may be new: pass group={group!r} to make {group!r} the task.",
        )
    return np.array([position[label] for label in labels], dtype=np.float64)
