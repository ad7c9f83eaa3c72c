"""The upper inverse of kl with its derivatives, for learning by a bound.

For p = kl⁻¹(q, c), implicit differentiation of kl(q‖p) = c gives, with

    ∂kl/∂p = (p − q) / (p(1 − p)),       ∂kl/∂q = log(q/p) − log((1 − q)/(1 − p)),

    ∂p/∂c = p(1 − p) / (p − q),
    ∂p/∂q = (log((1 − q)/(1 − p)) − log(q/p)) p(1 − p) / (p − q).

(Reeb, Doerr, Gerwinn & Rakitsch 2018.) At q = 0 the derivative in q is +∞: an objective there would
be lost, so it is taken at q = 1e-12, where it is large and finite. At p = 1, where the bound is
vacuous to the last digit, both are 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbmeta.bounds.inverse import kl_inverse
from hbmeta.errors import DataError

__all__ = ["differentiable_kl_inverse"]

SMALLEST_RISK = 1e-12


def differentiable_kl_inverse(q: Tensor, c: Tensor) -> Tensor:
    """kl⁻¹(q, c), rounded outward in float64, with derivatives of every order in q and in c.

    For an objective. In float32 the value is rounded to the nearest: certify with `kl_inverse`.

    Args:
        q: empirical risk in [0, 1]; broadcasts.
        c: bound on kl, above 0, in nats; broadcasts.
    Returns:
        p in [q, 1], on the device and in the dtype of q and c.
    Raises:
        DataError: q outside [0, 1], c not above 0 (the derivative in c is infinite there), or NaN.
    """
    if not bool((c > 0.0).all()):
        raise DataError(
            "differentiable_kl_inverse",
            needed="c above 0, where the derivative is finite",
            found=f"{float(c.detach().min()):g}",
            do="Every bound adds the logarithm of 1/delta to its KL before it divides by n.",
        )
    dtype = torch.promote_types(q.dtype, c.dtype)
    pair = torch.broadcast_tensors(q.double(), c.double())
    result: Tensor = _KLInverse.apply(*pair)  # type: ignore[no-untyped-call]
    return result.to(dtype)


class _KLInverse(torch.autograd.Function):
    """On float64 tensors of one shape: p − q would not survive float32 where c is small."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, c: Tensor) -> Tensor:
        p = torch.as_tensor(kl_inverse(q, c)).to(q.device)
        # Saved as an output, so that the derivatives below can be differentiated once more.
        ctx.save_for_backward(q, c, p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        q, _, p = ctx.saved_tensors
        (grad,) = grads
        proper = p < 1.0
        p = torch.where(proper, p, 0.75)
        q = torch.where(proper, q, 0.5)
        slope = p * (1.0 - p) / (p - q)
        log_odds_ratio = torch.log(p / q.clamp(min=SMALLEST_RISK)) + torch.log(
            (1.0 - q) / (1.0 - p)
        )
        in_q = torch.where(proper, grad * slope * log_odds_ratio, 0.0)
        in_c = torch.where(proper, grad * slope, 0.0)
        return in_q, in_c
