"""Exact predictives of the synthetic families: what no method beats in expectation.

For data that come from the family, E[log p(y_Q | x_Q, S)] is largest for the true conditional
distribution. Oracles that are also told each task's own truth (`known_...`) know more than any
method can, and lie above those that see the support only (`bayes_...`). All work in float64.
"""

from __future__ import annotations

from hbmeta.oracles.clusters import bayes_clusters, known_clusters
from hbmeta.oracles.gaussian_process import known_kernel
from hbmeta.oracles.sinusoids import bayes_sinusoid

__all__ = ["bayes_clusters", "bayes_sinusoid", "known_clusters", "known_kernel"]
