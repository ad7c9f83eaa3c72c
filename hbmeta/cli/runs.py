"""The fits of a comparison in its folder, and how they are found again.

RUN/run.json                  what was fitted, and on which table
RUN/fits/NAME.safetensors     one file per strategy, by `Fitted.save`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hbmeta.cli.sources import load_program
from hbmeta.errors import FileError
from hbmeta.files import write_text
from hbmeta.fitted import Fitted
from hbmeta.loading import load

__all__ = ["Run", "keep", "open_run"]


@dataclass(frozen=True)
class Run:
    """What a folder holds.

    Attributes:
        folder: RUN.
        fits: names of the strategies, in the order of the comparison.
        program: `module:program` of a person's own program, else None.
        table: path of the table, else None.
    """

    folder: Path
    fits: tuple[str, ...]
    program: str | None
    table: str | None

    def fitted(self, name: str | None = None) -> tuple[str, Fitted]:
        """A fit and its name; the first by default."""
        chosen = self.fits[0] if name is None else name
        if chosen not in self.fits:
            raise FileError(
                str(self.folder),
                needed=f"a fit among {', '.join(self.fits)}",
                found=repr(chosen),
                do="Name one of them with --strategy.",
            )
        model = None if self.program is None else load_program(self.program)
        return chosen, load(_path(self.folder, chosen), model=model)


def keep(folder: Path, fits: Mapping[str, Fitted], arguments: argparse.Namespace) -> None:
    """Write the fits of a comparison.

    Args:
        folder: RUN.
        fits: by name of the strategy.
        arguments: of the command, for the program and the table.
    """
    for name, fitted in fits.items():
        fitted.save(_path(folder, name))
    formula = "~" in arguments.data
    own = arguments.table is not None and not formula
    table = arguments.table or (None if arguments.data == "radon" else arguments.data)
    content = {
        "kind": "run",
        "fits": list(fits),
        "formula": arguments.data if formula else None,
        "program": arguments.data if own else None,
        "table": None if table is None else str(Path(table).resolve()),
    }
    write_text(folder / "run.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        FileError: there is none.
    """
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if content["kind"] != "run" or not content["fits"]:
            raise ValueError("another kind of file")
        names = tuple(content["fits"])
        return Run(folder, names, content["program"], content["table"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(
            str(folder / "run.json"),
            needed="the folder that hbmeta compare --out wrote",
            found=found,
            do="Run hbmeta compare ... --out RUN first, and pass that folder.",
        ) from error


def _path(folder: Path, name: str) -> Path:
    return folder / "fits" / f"{name}.safetensors"
