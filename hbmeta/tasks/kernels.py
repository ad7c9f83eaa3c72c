"""Stationary kernels of one input, with hyperparameters per task.

With d = |x − x'| and the lengthscale ℓ, as gpytorch parametrises them:

    rbf        exp(−d² / (2 ℓ²))
    matern12   exp(−d / ℓ)
    matern32   (1 + t) exp(−t),             t = √3 d / ℓ
    matern52   (1 + t + t²/3) exp(−t),      t = √5 d / ℓ
    periodic   exp(−2 sin²(π d / p) / ℓ)    ℓ enters unsquared and has no unit

The periodic kernel is often written with ℓ²: such an ℓ is the square root of the one here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hbmeta.errors import CurvatureError, DataError

__all__ = ["KernelName", "check_kernel", "cholesky_factor", "correlation", "noise_variance"]

KernelName = Literal["rbf", "matern12", "matern32", "matern52", "periodic"]
"""The kernels of this module."""

_JITTER = 1e-8


def check_kernel(kernel: Any, *, where: str) -> None:
    """Raise where there is no kernel of that name."""
    names = get_args(KernelName)
    if kernel not in names:
        raise DataError(
            where,
            needed=f"kernel as one of {', '.join(map(repr, names))}",
            found=f"{kernel!r}",
            do="Choose one of these names.",
        )


def correlation(
    kernel: KernelName, distance: Tensor, hyperparameters: Mapping[str, Tensor]
) -> Tensor:
    """k(x, x') of a distance |x − x'| (tasks, n, m), 1 at distance 0.

    Args:
        kernel: its name.
        distance: (tasks, n, m), in the units of x.
        hyperparameters: "lengthscale" ℓ (tasks,) in the units of x, without a unit for "periodic";
            "period" p (tasks,) in the units of x, read for "periodic" only.
    """
    lengthscale = hyperparameters["lengthscale"][:, None, None]
    if kernel == "periodic":
        turns = distance / hyperparameters["period"][:, None, None]
        return torch.exp(-2.0 * torch.sin(math.pi * turns) ** 2 / lengthscale)
    ratio = distance / lengthscale
    if kernel == "rbf":
        return torch.exp(-0.5 * ratio**2)
    if kernel == "matern12":
        return torch.exp(-ratio)
    t = math.sqrt(3.0 if kernel == "matern32" else 5.0) * ratio
    polynomial = 1.0 + t if kernel == "matern32" else 1.0 + t + t**2 / 3.0
    return polynomial * torch.exp(-t)


def noise_variance(noise: Tensor, scale: Tensor) -> Tensor:
    """The variance of y given f, (...): noise², but at least 1e-8 scale².

    Two equal inputs would otherwise make the covariance of y singular where noise is 0. A noise
    above 1e-4 scale stays what it is.
    """
    return torch.maximum(noise**2, _JITTER * scale**2)


def cholesky_factor(covariance: Tensor, mask: Tensor, *, where: str) -> Tensor:
    """L (tasks, n, n) of a padded covariance whose padding cells are decoupled: K∘mmᵀ + diag(1−m).

    Args:
        covariance: (tasks, n, n), float64; what stands in the padding is ignored.
        mask: (tasks, n), True where a row is real.
        where: the caller, for the message.
    Raises:
        CurvatureError: a covariance that is not positive definite; names the position of the task.
    """
    real = mask.to(covariance)
    padded = covariance * real[:, :, None] * real[:, None, :] + torch.diag_embed(1.0 - real)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(padded)
    if bool(failed.any()):
        worst = int(failed.nonzero()[0, 0])
        raise CurvatureError(
            where,
            needed="a positive definite covariance of y",
            found=f"smallest eigenvalue {float(torch.linalg.eigvalsh(padded[worst])[0]):.3g} "
            f"for the task at position {worst}",
            do="Use fewer rows or more noise.",
        )
    return factor
