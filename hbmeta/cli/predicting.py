"""`hbmeta predict RUN NEW.csv`: the rows of a table, predicted by a fit that was kept."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from hbmeta.cli.runs import Run, open_run
from hbmeta.cli.sources import read
from hbmeta.errors import DataError
from hbmeta.files import write_text
from hbmeta.fitted import Fitted

__all__ = ["predict"]

_COLUMNS = ("status", "mean", "sd", "lower", "upper")


def predict(arguments: argparse.Namespace) -> None:
    """Write the columns of the table, and status, mean, sd, lower and upper beside them."""
    run = open_run(arguments.run)
    name, fitted = run.fitted(arguments.strategy)
    frame = read(arguments.table)
    taken = [column for column in _COLUMNS if column in frame]
    if taken:
        raise DataError(
            arguments.table,
            needed=f"a table without columns {', '.join(_COLUMNS)}, which are written beside it",
            found=f"{taken[0]!r}",
            do="Rename or remove it.",
        )
    if not len(frame):
        raise DataError(
            arguments.table, needed="rows to predict", found="none", do="Check the file."
        )
    support = _support(run, fitted, arguments.support)
    found = fitted.predict(frame, support=support, interval=arguments.interval, seed=arguments.seed)
    out = frame.assign(**{column: found[column] for column in _COLUMNS})
    text = out.to_csv(index=False)
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        write_text(arguments.out, text)
    print(_said(out, name, arguments.out), file=sys.stderr)


def _support(run: Run, fitted: Fitted, path: str | None) -> pd.DataFrame | None:
    """Observed rows of groups that the fit has not seen."""
    chosen = path
    if chosen is None and run.table is not None:
        chosen = run.table
        if not Path(chosen).is_file():
            warnings.warn(
                f"the table of the run, {chosen}, is not there any more: groups that it held out "
                "are predicted as groups without data. Pass their rows with --support.",
                stacklevel=2,
            )
            return None
    if chosen is None or fitted.schema is None:
        return None
    frame = read(chosen)
    encoded = fitted.schema.encode(frame, need_y=True)
    known = set(fitted.tasks.ids)
    new = np.array([label not in known for label in encoded.tasks.ids])
    return frame.iloc[np.sort(encoded.rows[new[encoded.tasks.task.numpy()]])]


def _said(out: pd.DataFrame, name: str, path: Path | None) -> str:
    """What was done, in one line."""
    rows = out["status"].value_counts(dropna=True).to_dict()
    words = {
        "known": "of groups that were fitted on",
        "adapted": "of groups adapted to their observed rows",
        "new": "of groups without data",
    }
    parts = [f"{rows[key]} {text}" for key, text in words.items() if key in rows]
    without = int(out["status"].isna().sum())
    if without:
        parts.append(f"{without} with a missing value, which have no prediction")
    where = "" if path is None else f" in {path}"
    return f"hbmeta: {len(out)} rows predicted by {name}{where}: {'; '.join(parts)}."
