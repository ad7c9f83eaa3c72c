"""Divergence of normals with independent coordinates, from logarithms of their scales.

With δ = a − b the difference of the log standard deviations and z = (m_q − m_p) e^(−b),

    KL(N(m_q, e^2a) ‖ N(m_p, e^2b)) = Σ_j ½ (e^2δ_j − 1 − 2 δ_j + z_j²)

Every term is 0 or more, in floating point too: expm1(2δ) − 2δ does not cancel where two scales are
nearly alike. No variance is formed, no logarithm of a scale is taken and nothing is divided, so a
scale of 0 or a variance that has under- or overflowed, where published code gets its NaN, cannot
occur: the result is finite as long as e^2δ and z² are.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LARGEST_LOG", "bounded", "normal_kl"]

LARGEST_LOG = 12.0
"""Largest |log| of a learned ratio of scales: a factor of 1.6e5 either way."""


def bounded(raw: Tensor) -> Tensor:
    """B tanh(raw / B) with B = LARGEST_LOG: `raw` where it is small, within ±B whatever it is."""
    return LARGEST_LOG * torch.tanh(raw / LARGEST_LOG)


def normal_kl(shift: Tensor, log_scale: Tensor, log_scale_prior: Tensor) -> Tensor:
    """(...,) KL(q ‖ p) in nats, summed over the last dimension; exact.

    Args:
        shift: (..., size) m_q − m_p.
        log_scale: a, log standard deviations of q; broadcasts.
        log_scale_prior: b, those of p; broadcasts.
    """
    ratio = 2.0 * (log_scale - log_scale_prior)
    whitened = shift * torch.exp(-log_scale_prior)
    return 0.5 * (torch.expm1(ratio) - ratio + whitened.square()).sum(-1)
