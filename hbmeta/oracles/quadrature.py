"""Gauss-Legendre quadrature on the interval where a density lives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["DEPTH", "gauss_legendre", "mass_interval"]

DEPTH = 32.0
"""Where a log density lies this far below its largest value, it is left out (e⁻³² ≈ 1e-14)."""


def mass_interval(
    mean: Tensor, best: Tensor, variance: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The part of [low, high] on which a Gaussian is above e^−depth of its density at `best`.

    `best` is the point of [low, high] next to the mean, at a distance d from it. The step from
    `best` to either end is √(d² + 2 depth variance) − d, in a form without cancellation.
    """
    distance, reach = (best - mean).abs(), 2 * DEPTH * variance
    step = reach / ((distance**2 + reach).sqrt() + distance)
    return (best - step).clamp(min=low), (best + step).clamp(max=high)


def gauss_legendre(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes on (−1, 1) and weights of sum 2; a single node stands for a fixed number, weight 1."""
    t, w = np.polynomial.legendre.leggauss(n) if n > 1 else (np.zeros(1), np.ones(1))
    return torch.from_numpy(t).to(like), torch.from_numpy(w).to(like)
