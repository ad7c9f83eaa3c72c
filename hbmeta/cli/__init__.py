"""The command line: `compare` fits, `diagnose` judges, `predict` uses, `certify` bounds."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hbmeta.cli import sources
from hbmeta.cli.arguments import parser, refuse
from hbmeta.cli.certifying import certify
from hbmeta.cli.diagnosing import diagnose
from hbmeta.cli.predicting import predict
from hbmeta.cli.runs import keep
from hbmeta.comparison import Comparison, compare
from hbmeta.errors import DataError, FileError, HbmetaError
from hbmeta.records import strict
from hbmeta.studies import STUDIES, check_name
from hbmeta.studies import write as write_study
from hbmeta.study import STRATEGIES, Choice, Estimates, estimates, fit_all, level_one, write
from hbmeta.tasks import TaskSet

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process by default.
    Returns:
        The exit status: 0, 1 where a certificate fails its check, or 2 where the arguments, the
        data or the model cannot be used.
    """
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:  # --help and --version too
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _plain_warnings(), _one_thread():
            if arguments.command == "predict":
                predict(arguments)
            elif arguments.command == "diagnose":
                diagnose(arguments, _say)
            elif arguments.command == "certify":
                _can_write(arguments.out)
                return certify(arguments)
            else:
                _can_write(arguments.out)
                (_study if arguments.data in STUDIES else _compare)(arguments)
    except HbmetaError as error:
        print(f"hbmeta: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hbmeta: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# The command


def _study(arguments: argparse.Namespace) -> None:
    """A study has its own data, models and strategies; what would change them is refused."""
    free = {"seed", "quick", "out", "json", "compile"}
    refuse(
        arguments,
        [name for name in vars(arguments) if name not in free],
        needed="no options for columns, model, split or strategies, which are part of it",
        do="Leave them out, or name a CSV file.",
    )
    outcome = STUDIES[arguments.data](
        seed=arguments.seed, quick=arguments.quick, say=_say, compile=arguments.compile
    )
    print(outcome.to_json() if arguments.json else outcome)
    if arguments.out is not None:
        write_study(arguments.out, outcome)


def _compare(arguments: argparse.Namespace) -> None:
    choices = _choices(arguments)
    data, model, labels, label = _source(arguments)
    known, new = data.split(
        groups=arguments.groups,
        support=arguments.support,
        new_support=arguments.new_support,
        seed=arguments.seed,
    )
    if not known.support.n_points:
        raise DataError(
            "--support",
            needed="rows of known groups to fit on",
            found=f"--support {arguments.support}, which leaves none",
            do="Pass for example 0.8, or a number of rows per group.",
        )
    # Both must hold something to judge by, before minutes are spent on fits.
    _ = known.episode, new.episode
    fits = fit_all(choices, model, known, seed=arguments.seed, compile=arguments.compile, say=_say)
    reference = "nuts" if "nuts" in fits else None
    tables = {
        "known": compare(fits, known, reference=reference, seed=arguments.seed),
        "new": compare(fits, new, reference=reference, seed=arguments.seed),
    }
    found = {name: estimates(fitted, labels) for name, fitted in fits.items()}
    if arguments.json:
        content = {name: json.loads(table.to_json()) for name, table in tables.items()}
        content["level_one"] = strict(found)
        print(json.dumps(content, ensure_ascii=False, allow_nan=False))
    else:
        print(_report(data, known, new, tables, found))
    if arguments.out is not None:
        write(arguments.out, fits, tables, label)
        keep(arguments.out, fits, arguments)


def _source(arguments: argparse.Namespace) -> sources.Source:
    """A formula or a program stands before its table; a name alone is radon or a table."""
    if arguments.table is not None:
        return (sources.formula if "~" in arguments.data else sources.own_program)(arguments)
    if "~" in arguments.data:
        raise DataError(
            "compare",
            needed="a table after the formula",
            found="the formula alone",
            do=f'hbmeta compare "{arguments.data}" FILE.csv',
        )
    check_name(arguments.data, others=["radon"])
    return (sources.radon if arguments.data == "radon" else sources.table)(arguments)


def _can_write(folder: Path | None) -> None:
    """Makes the folder and writes a file into it, before minutes are spent on fits."""
    if folder is None:
        return
    probe = folder / ".hbmeta"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FileError(
            "--out",
            needed="a folder to write to",
            found=str(error),
            do="Name another folder, or check its permissions.",
        ) from error


def _choices(arguments: argparse.Namespace) -> dict[str, Choice]:
    unknown = [name for name in arguments.strategies if name not in STRATEGIES]
    if unknown or not arguments.strategies:
        raise DataError(
            "--strategies",
            needed=f"names among {', '.join(STRATEGIES)}",
            found=", ".join(map(repr, unknown)) or "none",
            do="Separate them by commas.",
        )
    chosen = {name: STRATEGIES[name] for name in arguments.strategies}
    return {n: c.quick() for n, c in chosen.items()} if arguments.quick else chosen


# What is printed and written


def _report(
    data: TaskSet,
    known: TaskSet,
    new: TaskSet,
    tables: Mapping[str, Comparison],
    found: Mapping[str, Estimates],
) -> str:
    summary = [line for line in data.summary().splitlines() if not line.startswith("not split")]
    most = int(new.support.counts.max())
    parts = [
        "\n".join(summary),
        f"HELD-OUT POINTS OF KNOWN GROUPS ({known.n_tasks} groups fitted on)\n{tables['known']}",
        f"NEW GROUPS ({new.n_tasks}, adapted to at most {most} points each)\n{tables['new']}",
        "LEVEL 1, in the units of the model (± sd where θ was drawn; – where not estimated)",
    ]
    return "\n\n".join(parts) + "\n" + "\n".join(level_one(found))


def _say(line: str) -> None:
    """Progress, for a person who watches."""
    if sys.stderr.isatty():
        print(f"hbmeta: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show the toolkit's warnings as one line each, and leave out those of packages under it."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        print(f"hbmeta: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Models of this size run faster on one thread of torch; chains have processes of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
