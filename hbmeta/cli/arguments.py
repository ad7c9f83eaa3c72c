"""What may stand on the command line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hbmeta import __version__
from hbmeta.errors import DataError
from hbmeta.models.effect_priors import FAMILIES
from hbmeta.models.formula_priors import FORMULA_FAMILIES
from hbmeta.studies import STUDIES
from hbmeta.study import STRATEGIES

__all__ = ["INTERCEPT", "parser", "refuse"]

_EXAMPLES = """examples:
  hbmeta compare radon --out results/radon
  hbmeta compare sinusoid --quick
  hbmeta compare schools.csv --group school --x age,sex --y score --varying intercept,age --json
  hbmeta compare "score ~ age + (1 + age | school)" schools.csv --out run
  hbmeta compare model:program schools.csv --group school --x age --y score --out run
  hbmeta diagnose run
  hbmeta predict run new.csv --out predictions.csv
"""
INTERCEPT = "intercept"
_FAMILIES = tuple(dict.fromkeys((*FAMILIES, *FORMULA_FAMILIES)))


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    whole = argparse.ArgumentParser(
        prog="hbmeta",
        description="Fit one hierarchical model in several ways and see which of them to trust.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"hbmeta {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _compare(commands)
    _diagnose(commands)
    _predict(commands)
    _certify(commands)
    return whole


def refuse(
    arguments: argparse.Namespace, names: Iterable[str], *, needed: str, do: str = "Leave them out."
) -> None:
    """Refuse options of `compare` that say what its data or its model says already.

    Args:
        arguments: of the command.
        names: the options, by attribute.
        needed: of the error.
        do: of the error.
    Raises:
        DataError: one of them differs from its default.
    """
    defaults = vars(parser().parse_args(["compare", arguments.data]))
    given = [name for name in names if getattr(arguments, name) != defaults[name]]
    if given:
        found = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise DataError(arguments.data, needed=needed, found=found, do=do)


def _compare(commands: Any) -> None:
    """Fit and judge."""
    command = commands.add_parser(
        "compare",
        help="fit several approximations and compare them on held-out data",
        description="Hold out points of known groups and whole new groups, fit, compare. With "
        "nuts among the strategies, it is the reference that the others are judged against.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = _names
    sources = "|".join(["radon", *STUDIES, "FILE.csv", "FORMULA", "module:program"])
    command.add_argument(
        "data",
        metavar=sources,
        help=f"the radon data, a table, a study of tasks whose truth is known "
        f"({', '.join(STUDIES)}; it takes the options of run alone, without --strategies), or, "
        "before a table, a formula or a Pyro program of your own",
    )
    command.add_argument("table", nargs="?", metavar="FILE.csv", help="of a formula or a program")
    table = command.add_argument_group("columns of the table")
    table.add_argument(
        "--group",
        metavar="COL",
        help="labels of the groups; for a formula, which group is the task",
    )
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
        default=[INTERCEPT],
        help="coefficients that vary between groups (default: intercept); the others are shared",
    )
    model.add_argument("--family", choices=_FAMILIES, default="gaussian", help="of y (gaussian)")
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
    run.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder for the fits (see diagnose and predict), tables, draws, figures",
    )
    run.add_argument("--json", action="store_true", help="print JSON in place of tables")
    run.add_argument("--compile", default="auto", help=argparse.SUPPRESS)


def _diagnose(commands: Any) -> None:
    """Judge what was fitted."""
    command = commands.add_parser(
        "diagnose",
        help="say which fits that compare --out kept have a right posterior, and what is wrong",
        description="Judges the posterior of the groups that were fitted on without a reference "
        "at hand: it makes one, checks it, and holds every parameter against it. One line per "
        "fit, then all about the first one that is not right.",
    )
    command.add_argument("run", metavar="RUN", type=Path, help="folder that compare --out wrote")
    command.add_argument("--strategy", metavar="NAME", help="this fit alone (all of the run)")
    command.add_argument("--out", metavar="FILE.json", type=Path, help="all of it as JSON, by fit")
    command.add_argument(
        "--figures",
        metavar="FOLDER",
        type=Path,
        help="where to draw every parameter's verdict and the k̂ of every group",
    )
    command.add_argument(
        "--reference",
        choices=("auto", "nested", "nuts", "none"),
        default="auto",
        help="what to judge by: nested Laplace, NUTS, or the fit's own diagnostics alone (auto: "
        "the cheapest that can be relied on)",
    )
    command.add_argument("--seed", type=_seed, default=0, help="of the reference (0)")


def _predict(commands: Any) -> None:
    """Use what was fitted."""
    command = commands.add_parser(
        "predict",
        help="predict the rows of a table by a fit that compare --out kept",
        description="Rows of groups that were fitted on get the posterior of the fit, those of "
        "other groups that of their observed rows, or of a group without data.",
    )
    command.add_argument("run", metavar="RUN", type=Path, help="folder that compare --out wrote")
    command.add_argument("table", metavar="NEW.csv", help="the columns of the fit; y is not needed")
    command.add_argument(
        "--out", metavar="FILE.csv", type=Path, help="where to write; standard output by default"
    )
    command.add_argument("--strategy", metavar="NAME", help="which fit (the first of the run)")
    command.add_argument(
        "--support",
        metavar="FILE.csv",
        help="observed rows of groups that were not fitted on; rows of others in it are not read. "
        "By default the table of the run, for the groups that it held out",
    )
    command.add_argument(
        "--interval", type=float, default=0.9, help="probability of lower to upper (0.9)"
    )
    command.add_argument("--seed", type=_seed, default=0, help="of draws (0)")


def _certify(commands: Any) -> None:
    """Bound the loss on new tasks."""
    command = commands.add_parser(
        "certify",
        help="bound the expected loss on a new task, with a stated probability",
        description="Fit strategies on known tasks and certify them on new ones; or check a "
        "certificate that was written.",
    )
    command.add_argument("data", nargs="?", metavar="radon|clusters|FILE.csv")
    command.add_argument("--group", metavar="COL", help="labels of the groups of a table")
    command.add_argument("--x", metavar="COL,...", type=_names, default=[], help="its inputs")
    command.add_argument("--y", metavar="COL", help="its output")
    command.add_argument(
        "--scale",
        type=float,
        default=2.0,
        metavar="ERROR",
        help="error from which the loss is 1, in units of y (log radon for radon); fixed before "
        "the data (2)",
    )
    command.add_argument("--delta", type=float, default=0.05, help="of all rows (0.05)")
    command.add_argument("--shots", type=int, default=3, help="points to adapt to (3)")
    command.add_argument("--seed", type=_seed, default=0, help="of the split and the fits (0)")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="certificates as JSON, and the fits"
    )
    command.add_argument(
        "--check",
        metavar="FILE",
        help="a certificate to check; with --fit and the data, its risks too",
    )
    command.add_argument("--fit", metavar="FILE", help="the saved fit that it is about")


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
