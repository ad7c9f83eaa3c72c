"""Fixed standard normal draws with exact moments, for bounds that are searched.

With draws ε_1..ε_M held fixed, a bound is a function that a second-order method can follow to any
tolerance. Its optimum is that of a sample average, and for any M the optimum of the bound itself
wherever log p is quadratic, provided that Σ ε = 0 and Σ ε εᵀ / M = I exactly: the mean of a
quadratic depends on nothing else. Elsewhere what is left is the error of a quasi-random rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["matched_noise"]


def matched_noise(draws: int, size: int, seed: int) -> Tensor:
    """(draws, size) float64: a scrambled Sobol set and its mirror image, whitened.

    Args:
        draws: an even number. At least 2 · size for covariance exactly I; with fewer, each entry
            has variance 1 by itself (any full-rank q is then unbounded in the directions that no
            draw shows).
        size: entries of each draw.
        seed: of the scrambling, and of the order in which the draws stand.
    """
    half = draws // 2
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
    # The open interval: a net may hold 0, whose quantile is infinite.
    uniform = engine.draw(half, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    normal = math.sqrt(2.0) * torch.erfinv(2 * uniform - 1)
    if half >= size:
        # X (XᵀX/M)^{-1/2}, the whitening that moves the draws least.
        values, vectors = torch.linalg.eigh(normal.mT @ normal / half)
        if bool(values[0] > 1e-9 * values[-1]):
            normal = normal @ (vectors * values.rsqrt()) @ vectors.mT
    else:
        normal = normal / normal.square().mean(0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * half, generator=generator)
    return torch.cat([normal, -normal])[order]
