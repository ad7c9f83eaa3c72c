"""L-BFGS of a staged function: SciPy's, in float64, on one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from hbmeta.errors import ConvergenceError
from hbmeta.staging import Staged, Tier

__all__ = ["Minimum", "minimise"]


class Minimum(NamedTuple):
    """Where a function is smallest.

    Attributes:
        point: the vector.
        value: of the function there.
        evaluations: how many it took.
        converged: whether the search met its tolerance, without a value that was not finite.
        seconds_staging: of tracing and compiling.
        steepest: largest entry of the gradient at the point.
    """

    point: Tensor
    value: float
    evaluations: int
    converged: bool
    seconds_staging: float
    steepest: float


def minimise(
    function: Callable[..., Tensor],
    start: Tensor,
    *,
    where: str,
    tier: Tier | Literal["auto"] = "auto",
    iterations: int = 2000,
    tolerance: float = 1e-7,
    beside: Callable[[Tensor], Sequence[Tensor]] | None = None,
) -> Minimum:
    """The minimum of a smooth function of a vector.

    Args:
        function: vector, and what `beside` gives, to (), differentiable; traced once.
        start: the vector to start from.
        where: for the error.
        tier: how to run it.
        iterations: at most so many.
        tolerance: on the largest entry of the gradient, relative to the number of data.
        beside: what the function takes besides the vector, found anew at every vector and held
            constant in the gradient (an inner solution); it may branch on values.
    Raises:
        ConvergenceError: the function is NaN or infinite at the start.
    """

    def value_and_gradient(vector: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        vector = vector.detach().requires_grad_()
        value = function(vector, *others)
        (gradient,) = torch.autograd.grad(value, vector)
        return value.detach(), gradient

    staged = Staged(value_and_gradient, tier=tier, expected_calls=400)

    def evaluated(vector: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = staged(vector, *(beside(vector) if beside else ()))
        return found

    first = evaluated(start)[0]
    if not bool(torch.isfinite(first)):
        raise ConvergenceError(
            where,
            needed="a finite objective at the start",
            found=str(first.item()),
            do="Standardise x and y, or check the program's priors.",
        )

    stumbled = False

    def objective(point: Any) -> tuple[float, Any]:
        nonlocal stumbled
        found, gradient = evaluated(torch.from_numpy(point).to(start))
        value = float(found)
        if not np.isfinite(value):
            stumbled = True
            return 1e300, np.zeros_like(point)
        return value, gradient.double().cpu().numpy()

    found = scipy.optimize.minimize(
        objective,
        start.detach().double().cpu().numpy().copy(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": iterations,
            "maxfun": 4 * iterations,
            "maxcor": 30,
            "ftol": 1e-15,
            "gtol": tolerance,
        },
    )
    point = torch.from_numpy(found.x).to(start)
    # A search that met infinity stops where its line search gave up, and calls that convergence.
    steepest = float(np.abs(found.jac).max())
    converged = bool(found.success) and (not stumbled or steepest < 1e-3)
    return Minimum(
        point, float(found.fun), int(found.nfev), converged, staged.seconds_staging, steepest
    )
