"""log p(θ, φ, y) of a program as a function of one vector, with its gradient, staged for samplers.

The vector holds the unconstrained global sites and then, task by task, φ or the coordinates that
stand for it (`hbmeta.parametrisation`), whose log |∂φ/∂t| is added.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.compilation import Compiled
from hbmeta.errors import ProgramError
from hbmeta.native import NativeDensity, record
from hbmeta.parametrisation import Coordinates
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Staged, Tier
from hbmeta.triangular import has_no_factor

__all__ = ["Potential", "check_gradient", "log_density", "pack", "staged_log_density", "unpack"]


def _none() -> None:
    return None


@dataclass(frozen=True)
class Potential:
    """A log density of float64 vectors (size,) on the CPU, with its gradient, for a sampler.

    Attributes:
        function: gives the log density () and its gradient (size,).
        native: gives a C function of the same, with memory of its own at each call, or None where
            there is none.
        tier: how `function` runs: "eager", "graph" or "compiled".
    """

    function: Callable[[Tensor], tuple[Tensor, Tensor]]
    native: Callable[[], NativeDensity | None] = _none
    tier: Tier = "eager"

    def __call__(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and gradient; NaN, which samplers reject, where no Cholesky factor exists."""
        try:
            return self.function(vector)
        except RuntimeError as error:
            if not has_no_factor(error):
                raise
            return vector.new_full((), torch.nan), torch.zeros_like(vector)


def pack(problem: Problem, theta: Theta, phi: Tensor) -> Tensor:
    """One vector of the global sites and φ (tasks, phi_size)."""
    parts = [problem.sites.theta_to_vector(theta)] if problem.sites.globals else []
    return torch.cat([*parts, phi.reshape(-1)])


def unpack(problem: Problem, vector: Tensor, n_tasks: int) -> tuple[Theta, Tensor]:
    """The inverse of `pack`, for (..., size)."""
    size = problem.sites.theta_size
    phi = vector[..., size:].reshape(*vector.shape[:-1], n_tasks, problem.sites.phi_size)
    return problem.sites.theta_from_vector(vector[..., :size]), phi


def log_density(
    problem: Problem,
    theta: Theta,
    vector: Tensor,
    batch: Batch,
    coordinates: Coordinates | None = None,
    centered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(θ, φ, y) in unconstrained space and its gradient, at one vector of all latents.

    Args:
        problem: the program.
        theta: what of θ is no global site.
        vector: (size,).
        batch: the rows.
        coordinates: what stands in the place of φ; None for φ itself.
        centered: (tasks, sites), the choice of coordinates; theirs by default.
    """
    vector = vector.detach().requires_grad_()
    drawn, phi = unpack(problem, vector, batch.n_tasks)
    theta = {**theta, **drawn}
    value = torch.zeros((), dtype=vector.dtype, device=vector.device)
    if coordinates is not None:
        phi, value = coordinates.phi(theta, phi, batch, centered)
    likelihood, local, prior = problem.terms(theta, phi, batch)
    value = likelihood.sum() + local.sum() + prior + value
    (gradient,) = torch.autograd.grad(value, vector)
    return value.detach(), gradient


def staged_log_density(
    problem: Problem,
    batch: Batch,
    theta: Theta,
    tier: Tier,
    expected_calls: int,
    coordinates: Coordinates | None = None,
    *,
    falls_back: bool = False,
) -> tuple[Potential, float]:
    """The log density as a function of float64 vectors on the CPU, staged; and what that took.

    With coordinates one graph serves every choice: `coordinates.centered` is read at each call.
    `falls_back` is that of `Staged`.
    """
    with torch.no_grad():
        centre = pack(problem, theta, problem.location(theta, batch))
    data = [t for t in (batch.x, batch.y, batch.weight, batch.task) if t is not None]

    def function(vector: Tensor, rows: Batch, *centered: Tensor) -> tuple[Tensor, Tensor]:
        return log_density(problem, theta, vector, rows, coordinates, *centered)

    def choice() -> list[Tensor]:
        return [] if coordinates is None else [coordinates.centered]

    # Kernels by themselves are what can be recorded (`hbmeta.native`).
    staged = Staged(
        function, tier=tier, expected_calls=expected_calls, check_every=2**62, one_file=False,
        falls_back=falls_back,
    )  # fmt: skip
    run = staged.flat(centre, batch, *choice())
    if centre.dtype != torch.float64 or centre.device.type != "cpu":

        def moved(vector: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = run(vector.to(centre), *data, *choice())
            return value.double().cpu(), gradient.double().cpu()

        return Potential(moved, tier=staged.tier), staged.seconds_staging

    def potential(vector: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = run(vector, *data, *choice())
        return value, gradient

    def native() -> NativeDensity | None:
        if not isinstance(run, Compiled):
            return None
        try:
            return record(run, [centre, *data, *choice()])
        except Exception as error:
            # The compiler's failures are its own, as in `Staged`; the graph is compiled all the
            # same.
            warnings.warn(
                f"The compiler gave up on the way into C ({type(error).__name__}), so the sampler "
                "calls this program through Python, which is slower.",
                stacklevel=2,
            )
            return None

    start = time.perf_counter()
    native()  # Compiles the way into C, which later recordings find in the cache.
    seconds = staged.seconds_staging + time.perf_counter() - start
    return Potential(potential, native, staged.tier), seconds


def check_gradient(potential: Potential, point: Tensor, name: str) -> None:
    """The gradient against a difference quotient; `float(tensor)` cuts it without a word.

    Raises:
        ProgramError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(point.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    above, below = (float(potential(point + sign * step * direction)[0]) for sign in (1, -1))
    quotient = (above - below) / (2 * step)
    slope = float(potential(point)[1] @ direction)
    if not math.isfinite(quotient) or not math.isfinite(slope):
        return
    if abs(quotient - slope) > 1e-4 + 1e-3 * (abs(quotient) + abs(slope)):
        raise ProgramError(
            name,
            needed="a log density whose gradient reaches every latent",
            found=f"a slope of {slope:.6g} where differences give {quotient:.6g}",
            do="Take float(...), .item(), .detach() and numpy out of the program.",
        )
