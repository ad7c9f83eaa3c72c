"""Hierarchical models as Pyro programs, their posterior approximations compared and certified."""

__version__ = "0.1.0"

from hbmeta.calibration import Calibration, sbc, sbc_adapted
from hbmeta.certification import Certificate, certify, certify_task
from hbmeta.comparison import Comparison, compare
from hbmeta.diagnosis import Diagnosis, diagnose
from hbmeta.loading import load
from hbmeta.tasks import Episode, Tasks

__all__ = [
    "Calibration",
    "Certificate",
    "Comparison",
    "Diagnosis",
    "Episode",
    "Tasks",
    "certify",
    "certify_task",
    "compare",
    "diagnose",
    "load",
    "sbc",
    "sbc_adapted",
]
