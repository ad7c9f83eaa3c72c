"""One right-hand side of a formula: its columns, and what its transforms remember for new tables.

    learn   text and table  ->  columns, levels of every factor, state of every transform
    columns the same text and another table  ->  the same columns, nothing learned anew

`formulaic` reads the text and evaluates its expressions as Python. What an expression may hold is
therefore a closed list (arithmetic, comparisons, formulaic's transforms, NumPy's elementwise
functions): a formula that comes out of a file can compute columns and do nothing else. The state
is kept as JSON can hold it.

References:
    formulaic (Wardrop), https://matthewwardrop.github.io/formulaic, for the grammar.
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from formulaic import Formula, ModelSpec
from formulaic.errors import DataMismatchWarning
from formulaic.parser.types import Factor

from hbmeta.errors import DataError

__all__ = ["INTERCEPT", "FormulaPart", "variables"]

INTERCEPT = "Intercept"
"""formulaic's name of the constant."""

_WHERE = "from_formula"
_FUNCTIONS = frozenset(
    (
        *("log", "log2", "log10", "exp", "exp2", "exp10", "center", "scale", "poly"),
        *("bs", "cr", "cs", "cc", "C", "I"),
    )
)
_NUMPY_FUNCTIONS = frozenset(("where", "clip"))
_CONTRASTS = frozenset(("treatment", "SAS", "sum", "helmert", "diff", "poly"))
_NODES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Attribute),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.List, ast.Tuple, ast.Dict),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


@dataclass(frozen=True)
class FormulaPart:
    """A formula without a response, with what it learned from a table.

    Args:
        text: such as "1 + days" or "0 + log(n)".
        names: of its columns; `INTERCEPT` is the constant.
        state: of its transforms by expression, as JSON can hold it.
        levels: of its factors by expression.
    """

    text: str
    names: tuple[str, ...]
    state: dict[str, Any]
    levels: dict[str, list[Any]]

    @classmethod
    def learn(cls, text: str, table: pd.DataFrame) -> tuple[FormulaPart, pd.DataFrame]:
        """The part and its columns (rows, names) for a table without missing values.

        Raises:
            DataError: formulaic cannot make the columns; says why.
        """
        columns = _matrix(text, ModelSpec(_read(text), na_action="ignore"), table)
        spec = columns.model_spec
        levels = {
            expression: [_plain(level) for level in encoded["categories"]]
            for expression, (_, encoded) in spec.encoder_state.items()
            if "categories" in encoded
        }
        names = tuple(map(str, columns.columns))
        state = {key: _to_json(value) for key, value in spec.transform_state.items()}
        return cls(text, names, state, levels), _numbers(columns, text)

    def columns(self, table: pd.DataFrame) -> pd.DataFrame:
        """The columns (rows, names) of another table.

        Raises:
            DataError: a level that was not learned, or a value that a transform refuses.
        """
        spec = ModelSpec(
            _read(self.text),
            na_action="ignore",
            transform_state={key: _from_json(value) for key, value in self.state.items()},
            encoder_state={
                expression: (Factor.Kind.CATEGORICAL, {"categories": levels})
                for expression, levels in self.levels.items()
            },
        )
        return _numbers(_matrix(self.text, spec, table), self.text)[list(self.names)]


def variables(text: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of a table that a right-hand side needs, in order.

    Raises:
        DataError: the text cannot be read, a name is no column (the nearest is named), or an
            expression holds what formulas may not.
    """
    found: dict[str, None] = {}
    for expression, python in _factors(text):
        for name in _names(expression) if python else [expression]:
            if name not in columns:
                near = difflib.get_close_matches(name, list(columns), n=1, cutoff=0.5)
                raise DataError(
                    _WHERE,
                    needed=f"a column {name!r} of the table",
                    found="the columns " + ", ".join(map(repr, columns[:12])),
                    do=f"Was {near[0]!r} meant?" if near else "Correct the name.",
                )
            found[name] = None
    return tuple(found)


def _read(text: str) -> Formula:
    try:
        return Formula(text)
    except Exception as error:  # formulaic raises several kinds for syntax
        raise DataError(
            _WHERE,
            needed="terms that formulaic can read",
            found=f"{text!r} ({_first_line(error)})",
            do="Correct the formula; a . for all columns is not understood.",
        ) from error


def _factors(text: str) -> Iterator[tuple[str, bool]]:
    """Every expression of a formula, and whether it is Python and not a column's name."""
    formula = _read(text)
    if not hasattr(formula, "__iter__") or not all(hasattr(term, "factors") for term in formula):
        raise DataError(
            _WHERE,
            needed="one right-hand side",
            found=repr(text),
            do="Write group terms in parentheses, (effects | group), and one response.",
        )
    for term in formula:
        for factor in term.factors:
            if factor.eval_method is not Factor.EvalMethod.LITERAL:
                yield factor.expr, factor.eval_method is Factor.EvalMethod.PYTHON


def _names(expression: str) -> list[str]:
    """The columns in a Python expression of a formula; refuses what is not on the list."""
    quoted: dict[str, str] = {}

    def plain(match: re.Match[str]) -> str:
        alias = f"_quoted_{len(quoted)}"
        quoted[alias] = match.group(1)
        return alias

    try:
        tree = ast.parse(re.sub(r"`([^`]*)`", plain, expression), mode="eval")
    except SyntaxError as error:
        raise _refused(expression, f"what is no expression ({error.msg})") from error
    functions: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise _refused(expression, f"a {type(node).__name__}")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id not in _FUNCTIONS:
                raise _refused(expression, f"the function {node.func.id!r}")
            if not isinstance(node.func, ast.Name | ast.Attribute):
                raise _refused(expression, "a call of what is no name")
            functions.add(node.func)
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and _known(node.value.id, node.attr)):
                raise _refused(expression, f"{ast.unparse(node)!r}")
            functions.add(node.value)
    names = [
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in functions
    ]
    return [quoted.get(name, name) for name in names]


def _known(module: str, name: str) -> bool:
    if module == "contr":
        return name in _CONTRASTS
    found = getattr(np, name, None) if module == "np" else None
    return isinstance(found, np.ufunc) or (found is not None and name in _NUMPY_FUNCTIONS)


def _refused(expression: str, found: str) -> DataError:
    return DataError(
        _WHERE,
        needed=f"arithmetic, {', '.join(sorted(_FUNCTIONS))}, and NumPy's elementwise functions "
        "as np.name, in a formula",
        found=f"{found} in {expression!r}",
        do="Compute this column in the table first, and name it in the formula.",
    )


def _matrix(text: str, spec: ModelSpec, table: pd.DataFrame) -> Any:
    try:
        with warnings.catch_warnings():
            # formulaic's own calls of pandas and NumPy; what is not finite is refused below.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", DataMismatchWarning)
            return spec.get_model_matrix(table, context={})
    except Exception as error:  # whatever a transform raises of its values
        raise DataError(
            _WHERE,
            needed=f"values from which {text!r} can be computed, as when it was learned",
            found=_first_line(error),
            do="Correct these rows or the formula; splines take extrapolation='extend'.",
        ) from error


def _numbers(columns: pd.DataFrame, text: str) -> pd.DataFrame:
    numbers = pd.DataFrame(columns).astype("float64")
    values = numbers.to_numpy()
    rows, places = np.nonzero(~np.isfinite(values))
    if len(rows):
        row, place = rows[0], places[0]
        raise DataError(
            _WHERE,
            needed=f"finite values of {numbers.columns[place]!r} in {text!r}",
            found=f"{values[row, place]} in {len(set(rows.tolist()))} rows, first in "
            f"{numbers.index[row]!r}",
            do="Correct these rows, or the transform (a log of 0?).",
        )
    return numbers


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _to_json(value: Any) -> Any:
    """Numbers, None, lists, arrays as {"array": ...}, dicts as {"items": pairs}."""
    if isinstance(value, dict):
        return {"items": [[_plain(key), _to_json(entry)] for key, entry in value.items()]}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return _plain(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if "array" in value:
            return np.array(value["array"])
        return {key: _from_json(entry) for key, entry in value["items"]}
    return [_from_json(entry) for entry in value] if isinstance(value, list) else value
