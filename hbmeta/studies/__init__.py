"""Ready-made comparisons on families of tasks whose truth is known; one file each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hbmeta.studies import clusters, gaussian_process, linear, sinusoid
from hbmeta.studies.common import Outcome, Study, write

__all__ = ["STUDIES", "Outcome", "Study", "write"]

STUDIES: Mapping[str, Study] = MappingProxyType(
    {
        "sinusoid": sinusoid.run,
        "gp": gaussian_process.run,
        "clusters": clusters.run,
        "linear": linear.run,
    }
)
"""The studies by the name that `hbmeta compare NAME` knows."""
