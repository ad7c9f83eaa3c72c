"""The exact posterior of linear-Gaussian programs, and their Type-II maximum likelihood.

Model: φ_i ~ N(μ, Σ), y_i = X_i φ_i + c_i + ε, ε ~ N(0, σ² I); any program whose log joint is
quadratic in φ.
Estimator: with f_i(φ) = log p(y_i | φ, θ) + log p(φ | θ) and any φ₀, one Newton step is exact:

    p(φ | y_i, θ) = N(φ₀ + Λ⁻¹∇f(φ₀), Λ⁻¹),  Λ = −∇²f,
    log p(y_i | θ) = f(φ₀) + ½ ∇fᵀΛ⁻¹∇f + (p/2) log 2π − ½ log det Λ;

θ maximises Σ_i log p(y_i | θ), plus log p(θ) on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbmeta.curvature import expand, gradient_and_hessian, log_joint, require_positive
from hbmeta.densities import Gaussian
from hbmeta.errors import UnsupportedModelError
from hbmeta.evidence import maximise_evidence
from hbmeta.feeding import training_tasks
from hbmeta.inference.strategy import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options

__all__ = ["ExactLinear"]


@dataclass(frozen=True)
class ExactLinear(Strategy):
    """Closed form for programs whose log joint is quadratic in φ; refuses all others.

    Keeps p(y | φ, θ) and p(φ | θ) exactly; holds θ at its Type-II maximum likelihood estimate (the
    maximum of Σ_i log p(y_i | θ)), or with `prior` at the mode of p(θ | y) in unconstrained space.
    Exact given θ. Whether the program is linear-Gaussian is tested at the data, not declared. A
    variance between tasks whose estimate is zero (a real case: Gelman et al., BDA3,
    §5.4) is reported in `info["at_zero"]` and in a warning.

    Args:
        prior: add log p(θ) to the evidence.
    Raises:
        UnsupportedModelError: the log joint is not quadratic in φ.
        CurvatureError: the precision of a task is not positive definite.
    References:
        Lindley, Smith (1972), JRSS B 34(1), for the posterior; MacKay (1992) for the evidence.
    """

    joint_loss: ClassVar[bool] = True

    prior: bool = False

    def check(self, problem: Problem) -> None:
        """Some parameters per task, few enough for a dense precision."""
        if problem.sites.phi_size > 200:
            raise UnsupportedModelError(
                self.name,
                needed="at most 200 parameters per task",
                found=str(problem.sites.phi_size),
                do="Use AmortizedGuide or MAML.",
            )

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ at the maximum of the evidence, by L-BFGS."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(tasks)
        self._require_quadratic(problem, problem.theta(batch), batch, tasks)

        def evidence(theta: Theta) -> Tensor:
            return self._evidence(problem, theta, batch)

        return maximise_evidence(
            problem, batch, evidence, prior=self.prior, options=options, where=self.name
        )

    def adapt(self, fitted: Any, support: Tasks, seed: int) -> TaskPosterior:
        """The exact posterior at the fitted θ, with each task's log evidence in `info`."""
        problem: Problem = fitted.problem
        batch = problem.batch(support)
        self._require_quadratic(problem, fitted.theta, batch, support)
        density = self.posterior(problem, fitted.theta, None, batch)
        info = {"log_evidence": self._evidence(problem, fitted.theta, batch).detach()}
        return TaskPosterior(
            problem, fitted.theta, density.detach(), support, info=info, units=fitted.units
        )

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Gaussian:
        """N(φ₀ + Λ⁻¹∇f, Λ⁻¹) per task."""
        start = problem.location(theta, support).detach()
        found = expand(lambda phi: log_joint(problem, theta, phi, support), start, newton=True)
        return Gaussian(found.loc, found.tril)

    def _evidence(self, problem: Problem, theta: Theta, batch: Batch) -> Tensor:
        """(tasks,) log p(y_i | θ), differentiable in θ."""
        start = problem.location(theta, batch).detach()
        found = expand(
            lambda phi: log_joint(problem, theta, phi, batch), start, newton=True, create_graph=True
        )
        return found.log_evidence

    def _require_quadratic(
        self, problem: Problem, theta: Theta, batch: Batch, tasks: Tasks
    ) -> None:
        """The Hessian at two far points must be the same, and negative definite."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            start = problem.location(theta, batch)
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start)

        def hessian(phi: Tensor) -> Tensor:
            return gradient_and_hessian(lambda p: log_joint(problem, theta, p, batch), phi)[2]

        here, there = hessian(start), hessian(start + 2 * noise)
        scale = here.abs().amax((-2, -1)).clamp_min(1e-12)
        difference = ((here - there).abs().amax((-2, -1)) / scale).max()
        if not float(difference) < (1e-6 if start.dtype == torch.float64 else 1e-3):
            families = ", ".join(
                sorted({s.family for s in (*problem.sites.observed, *problem.sites.locals)})
            )
            raise UnsupportedModelError(
                self.name,
                needed="a log joint that is quadratic in φ (Normal throughout, means linear in φ)",
                found=f"a curvature that varies by a relative {float(difference):.2g} "
                f"(families: {families})",
                do="Use NUTS as the reference and AmortizedGuide as the approximation.",
            )
        require_positive(-here, tasks.ids, self.name)
