"""Ready-made comparisons on families of tasks whose truth is known; one file each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hbmeta.errors import FileError
from hbmeta.studies import clusters, gaussian_process, linear, sinusoid
from hbmeta.studies.common import Outcome, Study, write

__all__ = ["STUDIES", "Outcome", "Study", "check_name", "write"]

STUDIES: Mapping[str, Study[Any]] = MappingProxyType(
    {
        "sinusoid": sinusoid.run,
        "gp": gaussian_process.run,
        "clusters": clusters.run,
        "linear": linear.run,
    }
)
"""The studies by the name that `hbmeta compare NAME` knows."""


def check_name(name: str, *, others: Sequence[str] = ()) -> None:
    """Refuses what is no file and looks like the misspelt name of a study.

    Args:
        name: what should be a file.
        others: names beside those of the studies.
    Raises:
        FileError: it is none, and near a name.
    """
    known = [*others, *STUDIES]
    near = difflib.get_close_matches(name, known, n=1)
    if near and name not in known and not Path(name).exists():
        raise FileError(
            name,
            needed=f"a study ({', '.join(known)}) or a CSV file",
            found="no such study or file",
            do=f"Did you mean {near[0]!r}?",
        )
