"""The Minnesota radon data."""

from __future__ import annotations

from importlib.resources import as_file, files

import pandas as pd

from hbmeta.tasks.frame import from_frame
from hbmeta.tasks.taskset import TaskSet

__all__ = ["load_radon"]


def load_radon() -> TaskSet:
    """Radon in 919 houses of 85 counties of Minnesota, as posteriordb's `radon_mn` has it.

    Inputs: "floor" (of the measurement: 0 basement, 1 first floor) and "log_uranium", the log of
    (uranium in the county's soil in parts per million + 0.1). Output: "log_radon", the log of
    (activity in pCi/L + 0.1). The ids are the counties' names in upper case, in the order of
    posteriordb's county index, so that its alpha[j] belongs to `ids[j - 1]`.

    Returns:
        The unsplit set, float64.
    References:
        Gelman and Hill (2007), Data Analysis Using Regression and Multilevel/Hierarchical Models,
        chapter 12. Magnusson et al. (2024), posteriordb. Provenance: data/README.md.
    """
    with as_file(files("hbmeta.tasks") / "data" / "radon_minnesota.csv") as path:
        # Python's float reads every digit; the fast parser of some versions of pandas does not.
        frame = pd.read_csv(path, converters={"log_uranium": float, "log_radon": float})
    return from_frame(frame, group="county", x=["floor", "log_uranium"], y="log_radon")
