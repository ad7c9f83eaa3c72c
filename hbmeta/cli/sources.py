"""Where the data and the model of a comparison come from."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from hbmeta.cli.arguments import INTERCEPT, refuse
from hbmeta.errors import DataError, FileError
from hbmeta.models import VaryingEffects, from_formula
from hbmeta.models.columns import expanded
from hbmeta.models.effect_priors import FAMILIES
from hbmeta.program import Program
from hbmeta.tasks import TaskSet, from_frame, load_radon

__all__ = ["Source", "formula", "load_program", "own_program", "radon", "read", "table"]

_OF_A_TABLE = ("x", "standardise", "missing", "varying", "offset", "totals")
_SAYS_ITSELF = "no options for what the model itself says"


class Source(NamedTuple):
    """What is fitted.

    Attributes:
        data: the tasks, not split.
        model: the program.
        labels: names of coordinates, by level-1 site.
        label: what the first task parameter is called in figures.
    """

    data: TaskSet
    model: Program
    labels: Mapping[str, Sequence[str]]
    label: str


def radon(arguments: argparse.Namespace) -> Source:
    """The radon data and their model."""
    refuse(
        arguments,
        ("group", "y", *_OF_A_TABLE, "family"),
        needed="no options for columns or model, which are part of it",
        do="Leave them out, or name a CSV file.",
    )
    fixed, varying = ["floor", "log_uranium"], [INTERCEPT]
    model = VaryingEffects(fixed=fixed, varying=varying)
    return Source(load_radon(), model, _labels(model, "county"), "intercept, by county")


def table(arguments: argparse.Namespace) -> Source:
    """A table, and the regression that the options describe."""
    special = [name for name in (arguments.offset, arguments.totals) if name]
    data = _tasks(arguments, read(arguments.data), special)
    varying = list(expanded(arguments.varying, data.features))
    taken = {*varying, *special}
    if arguments.family not in FAMILIES:
        raise DataError(
            "--family",
            needed=f"for a table one of {', '.join(FAMILIES)}",
            found=arguments.family,
            do="Write the model as a formula.",
        )
    model = VaryingEffects(
        fixed=[name for name in (INTERCEPT, *data.features) if name not in taken],
        varying=varying,
        family=arguments.family,
        offset=arguments.offset,
        totals=arguments.totals,
    )
    label = f"{model.varying[0]}, by {arguments.group}"
    return Source(data, model, _labels(model, arguments.group), label)


def formula(arguments: argparse.Namespace) -> Source:
    """A formula and a table; the model writes itself."""
    refuse(arguments, ("y", *_OF_A_TABLE), needed=_SAYS_ITSELF)
    frame = read(arguments.table)
    model = from_formula(
        arguments.data, frame, family=arguments.family, group=arguments.group or None
    )
    labels = model.coordinates()
    columns = labels.get("coefficients", ["coefficients"])
    return Source(model.tasks(frame), model, labels, f"{columns[0]}, by {model.design.label}")


def own_program(arguments: argparse.Namespace) -> Source:
    """A Pyro program of the person's own, by module and name, and a table."""
    refuse(arguments, ("varying", "family", "offset", "totals"), needed=_SAYS_ITSELF)
    program = load_program(arguments.data)
    columns = argparse.Namespace(**{**vars(arguments), "data": arguments.table})
    data = _tasks(columns, read(arguments.table), [])
    return Source(data, program, {}, f"first task parameter, by {arguments.group}")


def load_program(name: str) -> Program:
    """`module:program`, the module looked for in the working folder too."""
    module, _, attribute = name.partition(":")
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise FileError(
            name,
            needed="a module and the name of a Pyro program in it, such as models:radon",
            found=str(error),
            do="Check the names; the module is looked for in this folder and on PYTHONPATH.",
        ) from error
    finally:
        sys.path[:] = before
    if isinstance(found, type):
        found = found()
    program: Program = found
    return program


def _tasks(arguments: argparse.Namespace, frame: pd.DataFrame, special: list[str]) -> TaskSet:
    """The columns that the options name."""
    for name in ("group", "y"):
        if not getattr(arguments, name):
            raise DataError(
                f"--{name}", needed="a column of the table", found="none", do=f"Pass --{name} COL."
            )
    inputs = arguments.x + [name for name in special if name not in arguments.x]
    standardise: list[str] = arguments.standardise
    if standardise == ["all"]:
        measured = [arguments.y] if arguments.family in ("gaussian", "student_t") else []
        columns = [name for name in inputs if name not in special] + measured
        standardise = [name for name in columns if name in frame and _numeric(frame[name])]
    data = from_frame(
        frame,
        group=arguments.group,
        x=inputs,
        y=arguments.y,
        standardise=standardise,
        missing=arguments.missing,
    )
    if data.dropped:
        warnings.warn(
            f"{data.dropped} of {len(frame)} rows have a missing value and are left out.",
            stacklevel=2,
        )
    return data


def _labels(model: VaryingEffects, group: str) -> dict[str, list[str]]:
    varying, fixed = list(model.varying), list(model.fixed)
    return {"mean": varying, "scale": varying, "fixed": fixed, "group": [group]}


def _numeric(values: pd.Series) -> bool:
    types = pd.api.types
    return bool(types.is_numeric_dtype(values) and not types.is_bool_dtype(values))


def read(path: str) -> pd.DataFrame:
    """A table from a file."""
    try:
        # The fast parser of pandas loses the last digit of some numbers.
        return pd.read_csv(path, float_precision="round_trip", encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ParserError and UnicodeDecodeError are ValueErrors
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(
            path,
            needed="a comma-separated table in UTF-8",
            found=found,
            do="Check the name and the content of the file.",
        ) from error
