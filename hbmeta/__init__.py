"""Hierarchical models as Pyro programs, their posterior approximations compared and certified."""

__version__ = "0.1.0"

from hbmeta.certification import Certificate, certify, certify_task
from hbmeta.comparison import Comparison, compare
from hbmeta.loading import load
from hbmeta.tasks import Episode, Tasks

__all__ = [
    "Certificate",
    "Comparison",
    "Episode",
    "Tasks",
    "certify",
    "certify_task",
    "compare",
    "load",
]
