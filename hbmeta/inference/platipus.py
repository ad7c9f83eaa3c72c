"""PLATIPUS: gradient descent from a start that is drawn, its law shifted by the task's gradient.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: with μ the location of p(φ | θ) and L the mean negative log likelihood of some rows, the
start of descent has the laws

    p(φ_0 | S) = N(μ − γ_p ∇L(μ; S), diag σ²)      at test time
    q(φ_0 | Q) = N(μ − γ_q ∇L(μ; Q), diag v)       in training

and φ_N is N steps of descent on L(·; S) from a draw: q(φ | S) is the law of φ_N, held as draws. θ,
σ, v, γ_p and γ_q together minimise −E_q[log p(Q | φ_N)] + KL(q(φ_0 | Q) ‖ p(φ_0 | S)), an upper
bound of −log ∫ p(Q | φ_N(φ_0)) p(φ_0 | S) dφ_0, with the KL in closed form from the logarithms of
scales (`hbmeta.normals`). The logarithms stay within ±12 of where they start, by a tanh.

Reference: Finn, Xu, Levine (2018), NeurIPS, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hbmeta.densities import Empirical
from hbmeta.derivatives import task_gradient
from hbmeta.inference.bayesian_gradient import BayesianGradient, Noise
from hbmeta.inference.inner_optimizers import Leaves
from hbmeta.normals import bounded, normal_kl
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta
from hbmeta.tasks import Tasks

__all__ = ["PLATIPUS"]


class _Law(NamedTuple):
    """Of a start: log of its sd (size,), and γ in units of the setting ()."""

    log_scale: Tensor
    step: Tensor


class _Laws(nn.Module):
    """The learned numbers of p and q."""

    def __init__(self, size: int, spread: float) -> None:
        super().__init__()
        self.first = math.log(spread)
        self.raw = nn.Parameter(torch.zeros(2, size, dtype=torch.float64))
        self.steps = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self) -> tuple[_Law, _Law]:
        logs = self.first + bounded(self.raw)
        return _Law(logs[0], self.steps[0]), _Law(logs[1], self.steps[1])


@dataclass(frozen=True)
class PLATIPUS(BayesianGradient):
    """Probabilistic MAML: descent from draws of N(μ − γ_p ∇L(μ; S), diag σ²).

    Keeps p(y | φ, θ); of p(φ | θ) it uses the location μ alone and replaces the rest by the law of
    the start, whose scales are the strategy's own. With γ_p = 0 and scales that vanish it is MAML.
    A task without data gets N(μ, diag σ²). Where θ holds a scale of p(φ | θ), it gets no gradient
    and stays, as under MAML. Exact nowhere as a posterior: q(φ | S) is what predicts queries well.

    Args:
        steps, step_size, reduction, optimizer, momentum: see `BayesianGradient`; α in units of φ²
            per unit of loss, as MAML's.
        draws: of the start per task in training.
        particles: draws of φ_N per task when adapting.
        prior_step, posterior_step: γ_p and γ_q before training, in the units of step_size; both are
            learned by a factor, and 0 leaves them out.
        spread: σ and √v before training, per coordinate of φ, in its unconstrained units.
    Raises:
        DataError: a setting that cannot be used.
    References:
        Finn, Xu, Levine (2018), NeurIPS.
    """

    draws: int = 1
    particles: int = 100
    prior_step: float = 0.01
    posterior_step: float = 0.01
    spread: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("draws", 1)
        self.require_whole("particles", 1)
        self.require_number("prior_step", 0.0, math.inf)
        self.require_number("posterior_step", 0.0, math.inf)
        self.require_number("spread", 0.0, math.inf, above=True)

    def adaptable(self) -> tuple[str, ...]:
        """Those of the steps, and of where particles start."""
        return (*super().adaptable(), "particles", "prior_step")

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module:
        """Scales of the start and factors of γ."""
        return _Laws(problem.sites.phi_size, self.spread)

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws of the start."""
        return {"start": (self.draws, n_tasks, problem.sites.phi_size)}

    def adapting_noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """As many as there will be particles."""
        return {"start": (self.particles, n_tasks, problem.sites.phi_size)}

    def given(
        self, problem: Problem, theta: Theta, own: Any, support: Batch, noise: Noise
    ) -> Empirical:
        """Where descent ends from draws of p(φ_0 | S)."""
        law, _ = own()
        loc = self._shifted(problem, theta, support, self.prior_step * law.step)
        found = self._ends(problem, theta, support, loc + law.log_scale.exp() * noise["start"])
        return Empirical(problem.sites.to_vector(found))

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) −E_q log p(Q | φ_N) + KL(q ‖ p), per query point."""
        p, q = own()
        rows = problem.given(query, support)
        centre = self._shifted(problem, theta, support, self.prior_step * p.step)
        loc = self._shifted(problem, theta, rows, self.posterior_step * q.step)
        start = loc + q.log_scale.exp() * noise["start"]

        def log_predictive(phi: Phi) -> Tensor:
            return problem.log_predictive(theta, phi, support, query)

        expected = self.over(log_predictive, self._ends(problem, theta, support, start)).mean(0)
        total = normal_kl(loc - centre, q.log_scale, p.log_scale) - expected
        return total / query.counts.clamp_min(1.0)

    def _shifted(self, problem: Problem, theta: Theta, rows: Batch, step: Tensor) -> Tensor:
        """(tasks, size) μ − γ ∇L(μ; rows)."""
        location = problem.location_by_site(theta, rows)
        points = self.points(rows)

        def inner(phi: Phi) -> Tensor:
            return -problem.log_likelihood(theta, phi, rows) / points

        _, gradient = task_gradient(inner, location, create_graph=torch.is_grad_enabled())
        vector = problem.sites.to_vector
        return vector(location) - step * vector(gradient)

    def _ends(self, problem: Problem, theta: Theta, support: Batch, start: Tensor) -> Phi:
        """φ_N (draws, tasks, *shape) by site from φ_0 (draws, tasks, size)."""
        first, points = problem.sites.from_vector(start), self.points(support)
        names = list(first)

        def log_likelihood(phi: Phi) -> Tensor:
            return problem.log_likelihood(theta, phi, support)

        def objective(leaves: Leaves) -> Tensor:
            phi = dict(zip(names, leaves, strict=True))
            return -self.over(log_likelihood, phi) / points

        leaves = [value.contiguous() for value in first.values()]
        found = self.descended(objective, leaves)
        return dict(zip(names, found, strict=True))
