"""Arguments of the closed forms, checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbmeta.errors import DataError

__all__ = ["require_count", "require_curvature", "require_positive", "require_steps", "symmetric"]


def symmetric(matrix: Any, name: str, where: str) -> Tensor:
    """The matrix in float64, if it is square, finite and symmetric."""
    m = torch.as_tensor(matrix, dtype=torch.float64).detach().cpu()
    square = m.ndim == 2 and m.shape[0] == m.shape[1] and m.numel() > 0
    finite = square and bool(torch.isfinite(m).all())
    if not finite or not torch.allclose(m, m.T, rtol=1e-9, atol=1e-12 * float(m.abs().max())):
        raise DataError(
            where,
            needed=f"{name} as a symmetric (p, p) matrix of finite numbers",
            found=f"shape {tuple(m.shape)}" if not square else f"{m.tolist()}",
            do="Symmetrise it as (A + Aᵀ) / 2.",
        )
    return m


def require_positive(value: float, name: str, where: str) -> None:
    """Raises DataError unless 0 < value < ∞."""
    if not 0.0 < value < math.inf:
        raise DataError(
            where, needed=f"a positive, finite {name}", found=f"{value!r}", do="Correct it."
        )


def require_curvature(curvature: float, where: str) -> None:
    """Raises DataError unless 0 ≤ curvature < ∞."""
    if not 0.0 <= curvature < math.inf:
        raise DataError(
            where,
            needed="a finite curvature of at least 0",
            found=f"{curvature!r}",
            do="Pass the second derivative of the summed negative log-likelihood at its minimum.",
        )


def require_steps(steps: int, where: str) -> None:
    """Raises DataError unless steps is a whole number of 1 or more."""
    do = "Without a step the start is returned, which is a prior of variance 0."
    require_count(steps, "steps", do, where)


def require_count(value: int, name: str, do: str, where: str) -> None:
    """Raises DataError unless value is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise DataError(
            where, needed=f"{name} as a whole number of at least 1", found=f"{value!r}", do=do
        )
