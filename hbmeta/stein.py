"""The direction of Stein variational gradient descent: particles that climb, and push apart.

For particles φ_1 … φ_M of a target p and a kernel k, the smooth map of the particles that lowers
KL(q ‖ p) fastest moves φ_i along

    (1/M) Σ_j [ k(φ_j, φ_i) ∇log p(φ_j) + ∇_{φ_j} k(φ_j, φ_i) ],   k(a, b) = exp(−‖a − b‖² / h)

With one particle k = 1 and ∇k = 0: gradient ascent on log p, which ends at its mode. The kernel
gradient is ∇_{φ_j} k(φ_j, φ_i) = (2/h) k(φ_j, φ_i) (φ_i − φ_j), so with K = (k_ij) and G the scores
all particles move by (1/M) [K G + (2/h) (diag(K 1) − K) Φ]: two products of matrices.

The bandwidth is the median heuristic, h = median_{i<j} ‖φ_i − φ_j‖² / log(M + 1), a function of the
particles like the rest: derivatives of the direction go through it. Where more than half of the
pairs coincide the median is 0 and the mean stands in; where all do, h = 1 and the particles move as
one. No root of a distance is taken and h is never 0, so coincident particles give no NaN, in
derivatives of the direction neither.

References:
    Liu, Wang (2016), NeurIPS, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["bandwidth", "squared_distances", "stein_direction"]


def squared_distances(particles: Tensor) -> Tensor:
    """(tasks, M, M) ‖φ_i − φ_j‖² of particles (M, tasks, size)."""
    # ‖a‖² + ‖b‖² − 2 aᵀb loses digits far from the origin; around the mean it does not.
    centred = (particles - particles.mean(0)).movedim(0, 1)
    gram = centred @ centred.mT
    norms = gram.diagonal(dim1=-2, dim2=-1)
    found = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2.0 * gram).clamp_min(0.0)
    return found * (1.0 - torch.eye(found.shape[-1], dtype=found.dtype, device=found.device))


def bandwidth(distances: Tensor) -> Tensor:
    """(tasks,) h of the median heuristic, positive, for squared distances (tasks, M, M)."""
    size = distances.shape[-1]
    if size < 2:
        return distances.new_ones(distances.shape[:-2])
    rows, columns = torch.triu_indices(size, size, 1, device=distances.device)
    pairs = distances[..., rows, columns]
    # Sorted and picked: a median that a traced graph keeps as it is.
    median = pairs.sort(-1).values[..., (pairs.shape[-1] - 1) // 2]
    mean = pairs.mean(-1)
    # What the Gram matrix leaves of a distance of 0 is rounding, below this share of the others.
    noise = 100.0 * torch.finfo(pairs.dtype).eps * mean
    chosen = torch.where(median > noise, median, mean)
    chosen = torch.where(chosen > 0.0, chosen, torch.ones_like(chosen))
    return chosen / math.log(size + 1.0)


def stein_direction(particles: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Where the particles of every task move; differentiable in particles and scores.

    Args:
        particles: one tensor (M, tasks, *shape) per site; the kernel is that of all together.
        scores: ∇log p at the particles, likewise.
    Returns:
        directions, likewise.
    """
    count, tasks = particles[0].shape[:2]

    def flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(count, tasks, -1) for part in parts], -1)

    phi, gradients = flat(particles), flat(scores)
    distances = squared_distances(phi)
    scale = bandwidth(distances)[:, None, None]
    kernel = torch.exp(-distances / scale)
    # Centred, as a shift of all particles cancels in (diag(K 1) − K) Φ but for its rounding.
    centred = (phi - phi.mean(0)).movedim(0, 1)
    push = kernel.sum(-1, keepdim=True) * centred - kernel @ centred
    moved = (kernel @ gradients.movedim(0, 1) + 2.0 * (push / scale)) / count
    parts = moved.movedim(1, 0).split([math.prod(p.shape[2:]) for p in particles], -1)
    return [part.reshape(p.shape) for part, p in zip(parts, particles, strict=True)]
