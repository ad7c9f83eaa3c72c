"""Whether a parameter was still on its way when training ended.

Under a learning rate a_t that falls to zero every path comes to rest, so time is counted as
s_t = a_1 + … + a_t. A quantity on its way to an optimum follows θ(s) = θ* + A exp(−s / τ). The last
three fifths of s, one window each with means m₁, m₂, m₃, then have m₃ − m₂ = ρ (m₂ − m₁), and

    θ* − m₃ = (m₃ − m₂) ρ / (1 − ρ)

is what is left to go. It counts where both steps between windows stand out of the noise: each
window is cut into blocks b_1 … b_k, whose successive differences give the variance of its mean,
v = Σ (b_{j+1} − b_j)² / (2 (k − 1) k), which a slow trend hardly raises (von Neumann 1941).
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8
_WINDOWS = 3
_LEAST_ROWS = 4
_STANDS_OUT = 5.0
_SLOWEST = 0.95
FAR = 1.0
"""Prior scales that θ may have left to go before a fit says so."""

__all__ = ["FAR", "left_to_go"]


def left_to_go(path: Tensor, rates: Tensor) -> Tensor:
    """(coordinates,) how far each would still go, estimated; 0 where it is at rest or unknown.

    For a path of independent noise around a fixed point, each of two differences of means exceeds 5
    of its standard errors (14 degrees of freedom) in the same direction with a probability below
    1e-4 together; where blocks are shorter than the path remembers, more often, but what is left to
    go is then as small as the noise.

    Args:
        path: (steps, coordinates), the values after each step.
        rates: (steps,) learning rates, not negative.
    """
    clock = rates.double().cumsum(0)
    nothing = torch.zeros(path.shape[1], dtype=torch.float64)
    if not len(path) or not float(clock[-1]) > 0:
        return nothing
    clock = clock / clock[-1]
    edges = torch.linspace(0.4, 1.0, _WINDOWS * _BLOCKS + 1, dtype=torch.float64)
    block = torch.bucketize(clock - 0.5 * rates.double() / rates.double().sum(), edges) - 1
    counts = torch.bincount(block[block >= 0], minlength=_WINDOWS * _BLOCKS)
    if int(counts[: _WINDOWS * _BLOCKS].min()) < _LEAST_ROWS:
        return nothing
    values = path.detach().double().cpu()
    means = torch.stack([values[block == b].mean(0) for b in range(_WINDOWS * _BLOCKS)])
    means = means.reshape(_WINDOWS, _BLOCKS, -1)
    window = means.mean(1)
    variance = means.diff(dim=1).square().sum(1) / (2 * (_BLOCKS - 1) * _BLOCKS)
    step = window.diff(dim=0)
    error = (variance[1:] + variance[:-1]).sqrt()
    same = (step[0] * step[1] > 0) & (step.abs() > _STANDS_OUT * error).all(0)
    ratio = (step[1] / torch.where(same, step[0], torch.ones_like(step[0]))).clamp(0.0, _SLOWEST)
    return torch.where(same, step[1] * ratio / (1 - ratio), nothing)
