"""Hierarchical models as Pyro programs, their posterior approximations compared and certified."""

__version__ = "0.1.0"

from hbmeta.calibration import sbc, sbc_adapted
from hbmeta.comparison import Comparison, compare
from hbmeta.loading import load
from hbmeta.tasks import Episode, Tasks

__all__ = ["Comparison", "Episode", "Tasks", "compare", "load", "sbc", "sbc_adapted"]
