"""ABML: a Gaussian per task, from a few gradient steps on the support's variational objective.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: with m the location of p(φ | θ), Λ its curvature there and s_j = Λ_jj^(−½), both read
from the program and differentiable in θ, the prior is taken as N(m, Λ⁻¹) and

    q(φ | S) = N(m + s u, diag(s e^ρ)²),   u = ρ = 0 before the first step,
    F(u, ρ) = −E_q[log p(S | φ, θ)] + KL(q ‖ N(m, Λ⁻¹)),

u and ρ by N gradient steps on F. In units of the prior's sd, with R = s Λ s (ones on its diagonal),

    KL = ½ Σ_j (e^2ρ_j − 1 − 2ρ_j) + ½ uᵀ R u − ½ log det R,      R = I for independent coordinates,

which holds no scale at all: a prior of 1e−30 or 1e+30 changes nothing, ρ within ±12 is bounded by a
tanh, and no NaN can come of it. E_q is the mean over draws in pairs of opposite sign, the same in
all steps, so that F is a fixed smooth function; pairs make the gradient in u exact where the log
likelihood is quadratic.

Reference: Ravi, Beatson (2019), ICLR, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hbmeta.densities import Gaussian
from hbmeta.inference.bayesian_gradient import BayesianGradient, Noise
from hbmeta.inference.inner_optimizers import Leaves
from hbmeta.inference.prior_expansion import PriorExpansion, check_expansion, expanded_prior
from hbmeta.normals import bounded
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks

__all__ = ["ABML"]


class _LogScale(nn.Module):
    """log of what the prior's standard deviations are multiplied with, 0 before training."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self) -> Tensor:
        return bounded(self.raw)


@dataclass(frozen=True)
class ABML(BayesianGradient):
    """Amortized Bayesian meta-learning: q(φ | S) = N(μ, diag σ²), N steps from the task prior.

    Keeps p(y | φ, θ); takes p(φ | θ) as its Gaussian expansion, exact for a Gaussian prior;
    approximates p(φ | S, θ) by independent Gaussians in unconstrained space, stopped early. With
    no steps, and for a task without data, q is the prior (of a correlated one the independent
    coordinates with its conditional variances 1/Λ_jj). On linear-Gaussian programs many steps give
    the mean-field optimum: exact means, variances 1/(Λ + H)_jj, too small where coordinates
    correlate; exact to rounding when adapting with as many pairs of draws as φ has entries, to
    Monte Carlo error with fewer.

    θ, which holds the prior's location and scale, is trained by the bound on the query's evidence,
    E_q[log p(Q | φ)] − KL(q ‖ p) ≤ log p(Q | θ), per query point, through the steps.

    Args:
        steps, reduction, optimizer, momentum: see `BayesianGradient`.
        step_size: α, in units of the prior's variance per unit of loss: that of MAML where the
            prior's sd is 1, else α s² in those of MAML. A prior of scale s needs α (1 + s² H) < 2
            over `points` for descent to converge, H the curvature of the support's loss, whatever
            the units of φ are.
        draws: of φ per step, in pairs of opposite sign (rounded up). When adapting, as many pairs
            as φ has entries or more are made to have the second moments of N(0, I) exactly.
        objective: "elbo" (the bound above) or "predictive", −log of the mean of p(Q | φ_k) over
            draws of q, without the KL: what predictions are judged by, no bound on evidence.
        learned_scale: multiply the prior's sd by a factor per coordinate that is learned with θ, in
            the start and in the KL: the method as published, for programs whose prior has a
            location to learn and a scale that is only given (a network around a learned mean). The
            prior is then no longer the program's; as it grows, so do the steps, α s².
    Raises:
        UnsupportedModelError: a prior that does not curve downwards at its location, or one of more
            than 64 coordinates that depend on each other.
        DataError: a setting that cannot be used.
    References:
        Ravi, Beatson (2019), ICLR.
    """

    step_size: float = 0.01
    draws: int = 4
    objective: Literal["elbo", "predictive"] = "elbo"
    learned_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("draws", 1)
        self.require_among("objective", ("elbo", "predictive"))
        self.require_among("learned_scale", (True, False))

    def adaptable(self) -> tuple[str, ...]:
        """Those of the steps, with their draws."""
        return (*super().adaptable(), "draws")

    def check(self, problem: Problem) -> None:
        """A prior with a Gaussian expansion: curved in every coordinate, dense only if small."""
        check_expansion(problem, self.name, do="Use BMAML or PLATIPUS.")

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module | None:
        """The factors of the prior's scale, if they are learned."""
        # Asked here once: the answer must not be computed inside a traced graph.
        _ = problem.diagonal_prior
        return _LogScale(problem.sites.phi_size) if self.learned_scale else None

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws of one sign, for the steps and for the loss."""
        shape = ((self.draws + 1) // 2, n_tasks, problem.sites.phi_size)
        return {"steps": shape, "loss": shape}

    def adapting_noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Those of the steps."""
        return {"steps": self.noise(problem, n_tasks)["steps"]}

    def given(
        self, problem: Problem, theta: Theta, own: Any, support: Batch, noise: Noise
    ) -> Gaussian:
        """q(φ | S) after N steps; the prior for a task without support."""
        prior = self._prior(problem, theta, own, support)
        matched = _with_second_moments(noise["steps"])
        u, rho = self._adapted(problem, theta, prior, support, matched)
        return Gaussian(prior.loc + prior.scale * u, prior.scale * rho.exp())

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) minus the bound or the log predictive density of the query, per point."""
        prior = self._prior(problem, theta, own, support)
        u, rho = self._adapted(problem, theta, prior, support, noise["steps"])

        def log_predictive(phi: Tensor) -> Tensor:
            return problem.log_predictive(theta, phi, support, query)

        values: Tensor = torch.vmap(log_predictive)(_draws(prior, u, rho, noise["loss"]))
        if self.objective == "predictive":
            total = torch.logsumexp(values, 0) - math.log(values.shape[0])
        else:
            total = values.mean(0) - prior.kl(u, rho)
        return -total / query.counts.clamp_min(1.0)

    def _prior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> PriorExpansion:
        prior = expanded_prior(problem, theta, support)
        return prior if own is None else prior._replace(scale=prior.scale * own().exp())

    def _adapted(
        self, problem: Problem, theta: Theta, prior: PriorExpansion, support: Batch, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u and ρ (tasks, size) after N steps."""
        points = self.points(support)

        def log_likelihood(phi: Tensor) -> Tensor:
            return problem.log_likelihood(theta, phi, support)

        def objective(leaves: Leaves) -> Tensor:
            u, rho = leaves[0], bounded(leaves[1])
            expected = torch.vmap(log_likelihood)(_draws(prior, u, rho, noise)).mean(0)
            return (prior.kl(u, rho) - expected) / points

        zero = torch.zeros_like(prior.loc)
        u, raw = self.descended(objective, [zero, zero.clone()])
        return u, bounded(raw)


def _draws(prior: PriorExpansion, u: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """(2 K, tasks, size) φ of q at ±ε."""
    return prior.loc + prior.scale * (u + rho.exp() * torch.cat([noise, -noise]))


def _with_second_moments(noise: Tensor) -> Tensor:
    """Draws (K, tasks, size) of which every task's have mean(ε εᵀ) = I, where K allows it.

    With the columns of Q orthonormal, ε = √K Q has Σ_k ε_k ε_kᵀ / K = QᵀQ = I.
    """
    count, _, size = noise.shape
    if count < size:
        return noise
    # In double precision: LAPACK has no half one.
    basis: Tensor = torch.linalg.qr(noise.movedim(0, 1).double()).Q
    return (math.sqrt(count) * basis).movedim(1, 0).to(noise.dtype)
