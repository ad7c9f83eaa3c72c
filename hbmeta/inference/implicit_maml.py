"""Implicit MAML: the regularised minimum of each task's loss, differentiated as a minimum.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: φ*_i = argmin_φ L^S_i(φ) + (λ/2) ‖φ − φ_0‖², φ_0 the location of p(φ | θ), in
unconstrained space; θ minimises the query loss L^Q_i(φ*_i). With A_i = ∇²L^S_i(φ*_i) + λI,

    v_i = A_i⁻¹ ∂L^Q_i/∂φ,
    d/dθ L^Q_i = ∂L^Q_i/∂θ − v_iᵀ d/dθ [∇_φ L^S_i(φ*_i, θ) + λ (φ*_i − φ_0(θ))].

How φ* was found leaves no trace in the gradient, and no step of the inner solver is kept. With
‖∇f_i‖ ≤ r at the point that was found and μ the smallest eigenvalue of ∇²L^S_i around it, that
point is within δ = r/(λ + μ) of φ*_i. With s = λ/(λ + μ), bounds L_Q and G_Q of ∇²L^Q and ∇L^Q,
∇²L^S ρ-Lipschitz, and c the norm that conjugate gradients left of A v − ∂L^Q/∂φ, the error of the
gradient in φ_0, λ v, is at most

    s L_Q δ + s² (ρ/λ) G_Q δ + s c.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hbmeta.conjugate_gradients import solve
from hbmeta.densities import Delta
from hbmeta.errors import DataError
from hbmeta.inference.implicit_gradient import (
    PRODUCTS_PER_SOLVE,
    PRODUCTS_PER_STEP,
    ImplicitGradient,
    require_finite,
    require_positive,
)
from hbmeta.inference.moving import moving_sites, site_names
from hbmeta.inference.proximal import Proximal
from hbmeta.inference.strategy import Strategy
from hbmeta.newton import Minima, minimise_tasks
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import MetaGradient, Options

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

# Directions in which `adapt` looks for negative curvature, at most.
_PROBES = 30

__all__ = ["ImplicitMAML"]


@dataclass(frozen=True)
class ImplicitMAML(Strategy):
    """q(φ | S) = δ(φ*), the minimum of the support loss with a pull λ to where φ starts.

    Keeps p(y | φ, θ); of p(φ | θ) it uses the location alone and replaces the rest by the Gaussian
    N(φ_0, 1/λ) (reduction="sum") or N(φ_0, 1/(nλ)) (reduction="mean", n points of support), the
    same for every coordinate: φ* is the MAP under that prior. It does not maximise the marginal
    likelihood. Optimises the query loss, so a θ that only enters the scale of p(φ | θ) gets no
    gradient and stays at its prior. Exact as that MAP on programs whose log-likelihood is concave.

    In the place of MAML's number of steps stands λ: λ = 1/(αN) to leading order, where αN times the
    curvature is small; beyond that what early stopping implies depends on the curvature of each
    task (docs/theory.md). The number of inner steps costs time, but no memory.

    The support loss must be smooth. At a kink of a ReLU network no gradient vanishes, and curvature
    on one side says nothing of a minimum: such tasks end above the tolerance, or are left out. They
    grow few with training and with damping (a network with tanh has none).

    Args:
        damping: λ > 0, in units of the loss per φ²; with reduction="mean" it keeps its weight as
            points come in, with "sum" it loses it. It must be above minus the smallest curvature of
            L^S at φ*; tasks where it is not are left out of that step's gradient and counted.
        steps: at most so many steps of the inner solver (truncated Newton in a trust region).
        tolerance: the inner solver stops where ‖∇f_i‖₂ ≤ tolerance · max(1, ‖∇f_i(φ_0)‖₂), in units
            of the loss per φ; conjugate gradients where ‖A v − ∂L^Q/∂φ‖ ≤ tolerance ‖∂L^Q/∂φ‖. For
            every task.
        reduction: "mean" (L^S is the mean over the support points) or "sum".
        sites: local sites that move, by name or by a prefix of names up to a dot ("layer3"); the
            others stay at φ_0. None for all.
    Raises:
        DataError: an argument out of its range.
    References:
        Rajeswaran, Finn, Kakade, Levine (2019), NeurIPS, algorithms 1 and 2.
    """

    damping: float = 3.0
    steps: int = 20
    tolerance: float = 1e-2
    reduction: Literal["mean", "sum"] = "mean"
    sites: tuple[str, ...] | None = None

    seeks_mode: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, what in (("damping", self.damping), ("tolerance", self.tolerance)):
            number = isinstance(what, int | float) and not isinstance(what, bool)
            if not number or not 0 < what < math.inf:
                raise DataError(
                    self.name,
                    needed=f"{name} as a finite number above 0",
                    found=f"{name}={what!r}",
                    do="The defaults are damping=3 and tolerance=0.01.",
                )
        if type(self.steps) is not int or self.steps < 1:
            raise DataError(
                self.name,
                needed="steps as a whole number of 1 or more",
                found=f"steps={self.steps!r}",
                do="It is a bound, 20 by default; the tolerance says when to stop.",
            )
        if self.reduction not in ("mean", "sum"):
            raise DataError(
                self.name,
                needed="reduction 'mean' or 'sum'",
                found=repr(self.reduction),
                do="Choose one.",
            )
        if self.sites is not None:
            object.__setattr__(self, "sites", site_names(self.sites, self.name))

    def adaptable(self) -> tuple[str, ...]:
        """All settings."""
        return tuple(self.settings())

    def moving(self, problem: Problem) -> tuple[str, ...]:
        """Names of the local sites that move."""
        return moving_sites(problem, self.sites, self.name)

    def check(self, problem: Problem) -> None:
        """Refuses sites that the program does not have."""
        self.moving(problem)

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Delta:
        """δ(φ*) per task; the location of the task prior for a task without support.

        φ* comes as a constant: its derivative in θ is in `loss` and `meta_gradient`.
        """
        proximal, theta = self._proximal(problem), _constant(theta)
        rest, found = self._minima(proximal, theta, support)
        return self._density(proximal, rest, found)

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) −log p(Q | φ*, S, θ) per query point; its gradient is the module docstring's.

        A task without positive curvature has the value and no gradient.

        Raises:
            ConvergenceError: a loss or a product is NaN or infinite.
            CurvatureError: all tasks with a query lack positive curvature.
        """
        proximal, constant = self._proximal(problem), _constant(theta)
        rest, found = self._minima(proximal, constant, support)
        require_finite(found, self.name)
        losses, right = proximal.query_gradient(constant, rest, support, query, found.point)
        solution = solve(
            lambda vector: proximal.product(constant, rest, support, found.point, vector),
            right,
            tolerance=self.tolerance,
            iterations=PRODUCTS_PER_SOLVE,
            where=self.name,
        )
        require_positive(solution, query.counts > 0, self.damping, self.name)
        if not any(value.requires_grad for value in theta.values()):
            return losses
        with torch.enable_grad():
            value, through = proximal.through_minimum(
                theta, support, query, found.point, solution.x
            )
            # −vᵀ∇f is there for its gradient: its value is the rounding of 0.
            value = value + (through - through.detach())
            return torch.where(solution.positive, value, value.detach())

    def meta_gradient(
        self, problem: Problem, own: nn.Module | None, options: Options
    ) -> MetaGradient:
        """The gradient in pieces; the inner solver runs to its tolerance between them."""
        return ImplicitGradient(
            self._proximal(problem), self.name, self.steps, self.tolerance, options
        )

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """δ(φ*) of new tasks; warns of those whose minimum was not reached, or is none.

        The posterior's `info` holds "residual", ‖∇f_i‖ (tasks,), and "met" (tasks,). Negative
        curvature is looked for along at most 30 directions, from a random one on.
        """
        problem, theta = fitted.problem, fitted.theta
        batch, proximal = problem.batch(support), self._proximal(problem)
        rest, found = self._minima(proximal, theta, batch)
        require_finite(found, f"{self.name}.adapt", ids=support.ids)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(found.point.shape, generator=generator, dtype=torch.float64)
        probe = solve(
            lambda vector: proximal.product(theta, rest, batch, found.point, vector),
            direction.to(found.point),
            tolerance=1e-3,
            iterations=_PROBES,
            where=f"{self.name}.adapt",
        )
        if not bool(probe.positive.all()):
            warnings.warn(
                f"{self.name}: curvature plus damping is not positive for "
                f"{_named(support.ids, ~probe.positive)}, so that no minimum was found: raise "
                "damping.",
                stacklevel=3,
            )
        if not bool(found.met.all()):
            worst = float((found.residual)[~found.met].max())
            warnings.warn(
                f"{self.name}: the inner solver ended above its tolerance for "
                f"{_named(support.ids, ~found.met)} (gradient norm up to {worst:.3g}): raise steps "
                "or damping. At the kinks of a ReLU network no gradient vanishes.",
                stacklevel=3,
            )
        info = {"residual": found.residual, "met": found.met}
        density = self._density(proximal, rest, found)
        return TaskPosterior(problem, theta, density, support, info=info, units=fitted.units)

    def _proximal(self, problem: Problem) -> Proximal:
        return Proximal(problem, self.moving(problem), self.damping, self.reduction)

    def _minima(self, proximal: Proximal, theta: Theta, support: Batch) -> tuple[Phi, Minima]:
        with torch.no_grad():
            centre, rest = proximal.start(theta, support)
        found = minimise_tasks(
            lambda point: proximal.value_and_gradient(theta, rest, support, centre, point),
            lambda point, vector: proximal.product(theta, rest, support, point, vector),
            centre,
            tolerance=self.tolerance,
            steps=self.steps,
            products=PRODUCTS_PER_STEP,
        )
        return rest, found

    def _density(self, proximal: Proximal, rest: Phi, found: Minima) -> Delta:
        phi = {**rest, **proximal.by_site(found.point)}
        return Delta(proximal.problem.sites.to_vector(phi))


def _constant(theta: Theta) -> Theta:
    return {name: value.detach() for name, value in theta.items()}


def _named(ids: tuple[Any, ...], which: Tensor) -> str:
    """The first few tasks by id, and how many there are."""
    bad = [repr(ids[i]) for i in which.nonzero().flatten().tolist()]
    few = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
    return f"{len(bad)} of {len(ids)} tasks ({few})"
