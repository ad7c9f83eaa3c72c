"""Hierarchical models as Pyro programs, their posterior approximations compared and certified."""

__version__ = "0.1.0"

from hbmeta.comparison import Comparison, compare
from hbmeta.diagnosis import Diagnosis, diagnose
from hbmeta.loading import load
from hbmeta.tasks import Episode, Tasks

__all__ = ["Comparison", "Diagnosis", "Episode", "Tasks", "compare", "diagnose", "load"]
