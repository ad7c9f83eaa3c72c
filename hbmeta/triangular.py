"""Cholesky factors and triangular solves of many small matrices.

Up to size 4 they are written out as arithmetic on entries, which a compiler fuses with what stands
around them; a library call inside a compiled graph costs more than the whole of that arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hbmeta.errors import ConvergenceError

_WRITTEN_OUT = 4

# Absent from torch's type hints.
NotPositiveDefinite: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

__all__ = [
    "NotPositiveDefinite",
    "cholesky",
    "covariance_factor",
    "has_no_factor",
    "positive_definite_at",
    "solve_lower",
]


def has_no_factor(error: RuntimeError) -> bool:
    """Whether a program's own Cholesky factorisation failed.

    Compiled code raises no LinAlgError, but its text, with a stack of frames.
    """
    return str(error).startswith("linalg.cholesky")


@contextlib.contextmanager
def positive_definite_at(where: str, when: str) -> Iterator[None]:
    """What a program's own Cholesky factor raises, as an error that names the step.

    Args:
        where: the function that runs the program.
        when: what it was doing, for the message.
    Raises:
        ConvergenceError: a matrix was not positive definite.
    """
    try:
        yield
    except RuntimeError as error:
        if not has_no_factor(error):
            raise
        raise ConvergenceError(
            where,
            needed="parameters at which the program's covariance is positive definite",
            found=f"one that is not, {when}: {str(error).splitlines()[0].rstrip('.')}",
            do="Lower step_size or the learning rates, whose steps have left that region, or add "
            "more to the diagonal of the covariance.",
        ) from error


def cholesky(matrix: Tensor) -> Tensor:
    """Lower-triangular L with L Lᵀ = matrix (..., n, n), which must be positive definite.

    Not checked, so that it can be traced: the result has NaN where the matrix is not.
    """
    size = matrix.shape[-1]
    if size > _WRITTEN_OUT:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return torch.where((failed == 0)[..., None, None], factor, torch.nan)
    entry: dict[tuple[int, int], Tensor] = {}
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[..., i, j]
            for k in range(j):
                rest = rest - entry[i, k] * entry[j, k]
            entry[i, j] = rest.sqrt() if i == j else rest / entry[j, j]
    return _assemble(entry, size)


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """L⁻¹ b for vectors b (..., n) and lower-triangular L (..., n, n); leading shapes broadcast."""
    size = lower.shape[-1]
    if size > _WRITTEN_OUT:
        solved: Tensor = torch.linalg.solve_triangular(lower, right.unsqueeze(-1), upper=False)
        return solved.squeeze(-1)
    found: list[Tensor] = []
    for i in range(size):
        rest = right[..., i]
        for j in range(i):
            rest = rest - lower[..., i, j] * found[j]
        found.append(rest / lower[..., i, i])
    return torch.stack(torch.broadcast_tensors(*found), -1)


def covariance_factor(precision: Tensor) -> Tensor:
    """Lower-triangular L with L Lᵀ = precision⁻¹."""
    size = precision.shape[-1]
    identity = torch.eye(size, dtype=precision.dtype, device=precision.device)
    if size > _WRITTEN_OUT:
        # Rows and columns in reverse: precision = U Uᵀ with U upper triangular, so that
        # precision⁻¹ = U⁻ᵀ U⁻¹ and L = U⁻ᵀ: one factor and one solve.
        upper = cholesky(precision.flip(-1, -2)).flip(-1, -2)
        solved: Tensor = torch.linalg.solve_triangular(
            upper, identity.expand(upper.shape), upper=True
        )
        return solved.mT
    factor = cholesky(precision)
    columns = [solve_lower(factor, identity[j].expand(precision.shape[:-1])) for j in range(size)]
    # F⁻¹ has these columns; precision⁻¹ = F⁻ᵀ F⁻¹, and one more factor makes its root triangular.
    inverse = torch.stack(columns, -1)
    return cholesky(inverse.mT @ inverse) if size > 1 else inverse


def _assemble(entry: dict[tuple[int, int], Tensor], size: int) -> Tensor:
    zero = torch.zeros_like(entry[0, 0])
    rows = [torch.stack([entry.get((i, j), zero) for j in range(size)], -1) for i in range(size)]
    return torch.stack(rows, -2)
