"""Conjugate gradients for all tasks at once, on products alone.

    A_i x_i = b_i,   A_i symmetric positive definite, known by its products A_i p

The iteration is `linear_operator`'s. In exact arithmetic, with κ the condition number of A,

    ‖x_k − x‖_A ≤ 2 ((√κ − 1)/(√κ + 1))^k ‖x_0 − x‖_A,   so that k ≥ ½ √κ log(2/ε) gives ε.

Around it stands what meta-learning needs: the tolerance holds for every task (the iteration stops
on the mean), products are counted, and a direction with pᵀ A p ≤ 0, where conjugate gradients mean
nothing and the iteration would stand still without a word, is found and reported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from linear_operator.utils import linear_cg
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from hbmeta.errors import ConvergenceError

__all__ = ["Solution", "solve"]

# Curvature below this many roundings of the largest one seen cannot be told from zero.
_ROUNDINGS = 4
# Of the tolerance, at which the iteration leaves a task alone: its own residual drifts from b − Ax.
_MARGIN = 0.5


class Solution(NamedTuple):
    """What conjugate gradients found, per task.

    Attributes:
        x: (..., size) the solution; 0 for a task that is not positive.
        residual: (...) ‖b − A x‖ / ‖b‖ in Euclidean norm, computed from x; 0 where b = 0.
        products: how often A was applied (to all tasks at once).
        curvature: (...) smallest pᵀ A p / pᵀ p of the directions seen, an upper bound of the
            smallest eigenvalue; infinity where none was needed.
        positive: (...) whether no direction of negative or vanishing curvature was met.
    """

    x: Tensor
    residual: Tensor
    products: int
    curvature: Tensor
    positive: Tensor


class _Stop(Exception):  # noqa: N818  (no error: it leaves an iteration that has lost its meaning)
    """Directions of negative curvature were met."""


class _Products:
    """A, with a record of what it was applied to."""

    def __init__(self, product: Callable[[Tensor], Tensor], right: Tensor, where: str) -> None:
        self.product, self.where, self.count = product, where, 0
        self.smallest = torch.full_like(right[..., 0], torch.inf)
        self.largest = torch.zeros_like(self.smallest)
        self.known = self.smallest.numel()
        self.started = False

    @property
    def floor(self) -> Tensor:
        """Curvature that cannot be told from zero."""
        return _ROUNDINGS * torch.finfo(self.largest.dtype).eps * self.largest

    def plain(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self.product(vector)

    def recorded(self, direction: Tensor) -> Tensor:
        """A p for the iteration, which asks for A·0 first."""
        if not self.started:
            self.started = True
            return torch.zeros_like(direction)
        p = direction.squeeze(-1)
        found = self.plain(p)
        # 0/0 where a task has no right-hand side, and so no direction; fmin and fmax pass over it.
        curvature = torch.linalg.vecdot(p, found) / torch.linalg.vecdot(p, p)
        self.smallest = torch.fmin(self.smallest, curvature)
        self.largest = torch.fmax(self.largest, curvature.abs())
        positive = self.smallest > self.floor
        if int(positive.sum()) < self.known:
            self.known = int(positive.sum())
            raise _Stop
        return found.unsqueeze(-1)


def solve(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float = 1e-6,
    iterations: int = 500,
    where: str = "conjugate gradients",
) -> Solution:
    """x with ‖b − A x‖ ≤ tolerance ‖b‖ for every task.

    A task that shows negative curvature is left out from there on, and the others are solved
    without it. Neither that nor a tolerance that was not reached raises or warns: both stand in the
    record.

    Args:
        product: p to A p, (..., size) each; every task with its own A.
        right: b (..., size). Leading dimensions are tasks, or right-hand sides and tasks.
        tolerance: on the relative residual of each task.
        iterations: at most so many, restarts counted.
        where: for the error.
    Raises:
        ConvergenceError: a product, or b, is NaN or infinite.
    References:
        Hestenes, Stiefel (1952), J. Res. Natl. Bur. Stand. 49. Gardner et al. (2018), NeurIPS, for
        the batched iteration.
    """
    if not bool(torch.isfinite(right).all()):
        raise ConvergenceError(
            where,
            needed="a finite right-hand side",
            found="NaN or infinity",
            do="Lower the learning rates, or standardise x and y.",
        )
    products = _Products(product, right, where)
    norm = torch.linalg.vector_norm(right, dim=-1)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    x, rest = torch.zeros_like(right), right
    start = residual = (norm > 0).to(right.dtype)
    left, many, worst = iterations, right[..., 0].numel() + 1, math.inf
    while left > 0:
        pending = (products.smallest > products.floor) & (residual > tolerance)
        some = int(pending.sum())
        if not some:
            break
        before, worst = worst, float(residual[pending].max())
        if some == many and not worst < 0.5 * before:
            break  # the rounding of the products allows no more
        many = some
        # A task without a right-hand side is left alone by the iteration, and counts in its mean.
        rest = torch.where(pending.unsqueeze(-1), rest, torch.zeros_like(rest))
        goal = _MARGIN * min(tolerance / worst, 1.0)
        step, used = _iterate(products, rest, goal, some / pending.numel(), left)
        left -= used
        if step is None:
            worst = math.inf
            continue
        x = x + step
        rest = right - products.plain(x)
        residual = torch.linalg.vector_norm(rest, dim=-1) / scale
        if not bool(torch.isfinite(residual).all()):
            raise ConvergenceError(
                where,
                needed="finite Hessian-vector products",
                found=f"NaN or infinity after {products.count} of them",
                do="Lower the learning rates, raise damping, or standardise x and y.",
            )
    positive = products.smallest > products.floor
    return Solution(
        torch.where(positive.unsqueeze(-1), x, torch.zeros_like(x)),
        torch.where(positive, residual, start),
        products.count,
        products.smallest,
        positive,
    )


def _iterate(
    products: _Products, right: Tensor, tolerance: float, share: float, iterations: int
) -> tuple[Tensor | None, int]:
    """linear_operator's iteration from 0, and its length; None where a task stopped it."""
    products.started = False
    before = products.count
    tiny = torch.finfo(right.dtype).tiny
    with warnings.catch_warnings():
        # What it warns of, a residual above its tolerance, stands in our record, for every task.
        warnings.simplefilter("ignore", NumericalWarning)
        try:
            found: Tensor = linear_cg(
                products.recorded,
                right.unsqueeze(-1),
                tolerance=share * tolerance,
                # Its default of 1e-10 for pᵀ A p is of the order of a float32 residual squared.
                eps=tiny,
                stop_updating_after=tolerance,
                # It would go on to the eleventh, were it done after the first.
                max_iter=min(iterations, right.shape[-1]),
                max_tridiag_iter=0,
            )
        except _Stop:
            return None, products.count - before
    return found.squeeze(-1), products.count - before
