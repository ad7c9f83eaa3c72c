"""The command line: `hbmeta compare radon`, `hbmeta compare FILE.csv --group ... --y ...`."""

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

import pandas as pd
import torch

from hbmeta import __version__, certify_command
from hbmeta.comparison import Comparison, compare
from hbmeta.errors import DataError, FileError, HbmetaError
from hbmeta.models import VaryingEffects
from hbmeta.models.columns import expanded
from hbmeta.models.effect_priors import FAMILIES
from hbmeta.records import strict
from hbmeta.studies import STUDIES, check_name
from hbmeta.studies import write as write_study
from hbmeta.study import STRATEGIES, Choice, Estimates, estimates, fit_all, level_one, write
from hbmeta.tasks import TaskSet, from_frame, load_radon

__all__ = ["main"]

_EXAMPLES = """examples:
  hbmeta compare radon --out results/radon
  hbmeta compare sinusoid --quick
  hbmeta compare schools.csv --group school --x age,sex --y score --varying intercept,age --json
"""
_INTERCEPT = "intercept"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; those of the process by default.
    Returns:
        The exit status: 0, 1 where a certificate fails its check, or 2 where the arguments, the
        data or the model cannot be used.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help and --version too
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with _plain_warnings(), _one_thread():
            _can_write(arguments.out)
            if arguments.command == "certify":
                return certify_command.run(arguments, print)
            if arguments.data in STUDIES:
                _study(arguments)
            else:
                _compare(arguments)
    except HbmetaError as error:
        print(f"hbmeta: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hbmeta: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hbmeta",
        description="Fit one hierarchical model in several ways and see which of them to trust.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hbmeta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "compare",
        help="fit several approximations and compare them on held-out data",
        description="Hold out points of known groups and whole new groups, fit, compare. With "
        "nuts among the strategies, it is the reference that the others are judged against.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    certify_command.add_to(commands)
    names = _names
    sources = "|".join(["radon", *STUDIES, "FILE.csv"])
    command.add_argument(
        "data",
        metavar=sources,
        help=f"the radon data, a table, or a study of tasks whose truth is known "
        f"({', '.join(STUDIES)}; it takes the options of run alone, without --strategies)",
    )
    table = command.add_argument_group("columns of the table")
    table.add_argument("--group", metavar="COL", help="labels of the groups")
    table.add_argument("--x", metavar="COL,...", type=names, default=[], help="inputs, if any")
    table.add_argument("--y", metavar="COL", help="output")
    table.add_argument(
        "--standardise",
        metavar="COL,...|all",
        type=names,
        default=[],
        help="centre and scale these columns; all: every numeric input, and y where it is measured",
    )
    table.add_argument(
        "--missing", choices=("raise", "drop"), default="raise", help="rows with a missing value"
    )
    model = command.add_argument_group("model")
    model.add_argument(
        "--varying",
        metavar="COL,...",
        type=names,
        default=[_INTERCEPT],
        help="coefficients that vary between groups (default: intercept); the others are shared",
    )
    model.add_argument("--family", choices=FAMILIES, default="gaussian", help="of y (gaussian)")
    model.add_argument("--offset", metavar="COL", help="log exposure, for poisson")
    model.add_argument("--totals", metavar="COL", help="numbers of trials, for binomial")
    split = command.add_argument_group("split")
    split.add_argument(
        "--groups", type=_amount, default=0.8, help="share or number of known groups (0.8)"
    )
    split.add_argument(
        "--support", type=_amount, default=0.8, help="share or number of rows to fit on (0.8)"
    )
    split.add_argument(
        "--new-support", type=_amount, default=3, help="rows to adapt to, of each new group (3)"
    )
    run = command.add_argument_group("run")
    run.add_argument(
        "--strategies",
        metavar="NAME,...",
        type=names,
        default=list(STRATEGIES),
        help=f"which to fit, of {', '.join(STRATEGIES)} (all)",
    )
    run.add_argument("--seed", type=_seed, default=0, help="of the split and of every fit (0)")
    run.add_argument("--quick", action="store_true", help="a fifth of the work, for a first look")
    run.add_argument("--out", metavar="DIR", type=Path, help="folder for tables, draws, figures")
    run.add_argument("--json", action="store_true", help="print JSON in place of tables")
    run.add_argument("--compile", default="auto", help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _amount(text: str) -> float | int:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text)
    raise argparse.ArgumentTypeError(
        f"needed a share such as 0.8 or a whole number such as 20; found {text!r}"
    )


def _seed(text: str) -> int:
    # Studies draw their tasks with seeds that are this one plus a constant.
    with contextlib.suppress(ValueError):
        if 0 <= int(text) < 2**31:
            return int(text)
    raise argparse.ArgumentTypeError(f"needed a whole number from 0 to 2³¹ − 1; found {text!r}")


# The command


def _study(arguments: argparse.Namespace) -> None:
    """A study has its own data, models and strategies; what would change them is refused."""
    defaults = vars(_parser().parse_args(["compare", arguments.data]))
    free = {"seed", "quick", "out", "json", "compile"}
    given = [k for k, v in vars(arguments).items() if k not in free and v != defaults[k]]
    if given:
        raise DataError(
            arguments.data,
            needed="no options for columns, model, split or strategies, which are part of it",
            found=", ".join(f"--{name.replace('_', '-')}" for name in given),
            do="Leave them out, or name a CSV file.",
        )
    outcome = STUDIES[arguments.data](
        seed=arguments.seed, quick=arguments.quick, say=_say, compile=arguments.compile
    )
    print(outcome.to_json() if arguments.json else outcome)
    if arguments.out is not None:
        write_study(arguments.out, outcome)


def _compare(arguments: argparse.Namespace) -> None:
    check_name(arguments.data, others=["radon"])
    choices = _choices(arguments)
    data, model, labels = _radon(arguments) if arguments.data == "radon" else _table(arguments)
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
        write(arguments.out, fits, tables, f"{model.varying[0]}, by {labels['group'][0]}")


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


# Where the data come from

Source = tuple[TaskSet, VaryingEffects, dict[str, list[str]]]


def _radon(arguments: argparse.Namespace) -> Source:
    given = [
        name
        for name in ("group", "x", "y", "standardise", "offset", "totals")
        if getattr(arguments, name)
    ]
    if given or arguments.varying != [_INTERCEPT] or arguments.family != "gaussian":
        raise DataError(
            "radon",
            needed="no options for columns or model, which are part of it",
            found=", ".join(f"--{name}" for name in given) or "--varying or --family",
            do="Leave them out, or name a CSV file.",
        )
    fixed, varying = ["floor", "log_uranium"], [_INTERCEPT]
    model = VaryingEffects(fixed=fixed, varying=varying)
    return load_radon(), model, _labels(model, "county")


def _table(arguments: argparse.Namespace) -> Source:
    for name in ("group", "y"):
        if not getattr(arguments, name):
            raise DataError(
                f"--{name}", needed="a column of the table", found="none", do=f"Pass --{name} COL."
            )
    frame = _read(arguments.data)
    special = [name for name in (arguments.offset, arguments.totals) if name]
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
    varying = list(expanded(arguments.varying, data.features))
    taken = {*varying, *special}
    model = VaryingEffects(
        fixed=[name for name in (_INTERCEPT, *data.features) if name not in taken],
        varying=varying,
        family=arguments.family,
        offset=arguments.offset,
        totals=arguments.totals,
    )
    return data, model, _labels(model, arguments.group)


def _labels(model: VaryingEffects, group: str) -> dict[str, list[str]]:
    varying, fixed = list(model.varying), list(model.fixed)
    return {"mean": varying, "scale": varying, "fixed": fixed, "group": [group]}


def _numeric(values: pd.Series) -> bool:
    types = pd.api.types
    return bool(types.is_numeric_dtype(values) and not types.is_bool_dtype(values))


def _read(path: str) -> pd.DataFrame:
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


if __name__ == "__main__":
    sys.exit(main())
