"""BMAML: particles that descend together by Stein variational gradients.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: M particles per task start at the location of p(φ | θ) plus offsets that are learned with
θ and add up to 0, and take N steps of Stein variational gradient descent (`hbmeta.stein`) on
log p(S | φ, θ) + log p(φ | θ). q(φ | S) is what they are then, with equal weights.

Training compares them with particles that know more. The *chaser* φ^c has taken the N steps; the
*leader* φ^l has gone on from there for s steps on log p(S, Q | φ, θ) + log p(φ | θ), and is held:

    L_chaser = (1/M) Σ_m ‖φ^c_m − φ^l_m‖² / (2 α s)      (over n as well, where steps are not)

The published loss is the distance alone. The factor gives it the units of the other losses, nats
per point: for one particle and s = 1 the gradient at φ^c is that of −log p(S, Q, φ^c) / n. Without
it −log p(θ), which training adds, weighs 1/α times too much and keeps θ at its prior.

Its gradient reaches θ through the start and the pull of p(φ | θ). A θ that stands in the likelihood
besides φ (a noise, a slope that tasks share) is none of the start, and the distance says nothing
about it: it would rather make the leader's steps vain than fit. It follows the gradient of
−(1/M) Σ_m log p(Q | φ^l_m, S, θ) with the particles held, which is Fisher's identity for the
evidence, ∇ log p(D | θ) = E[∇ log p(D, φ | θ) | D], with the leader's particles for p(φ | D, θ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hbmeta.densities import Empirical
from hbmeta.inference.bayesian_gradient import BayesianGradient, Noise
from hbmeta.inference.inner_optimizers import InnerOptimizer, Leaves, State, inner_optimizer
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta
from hbmeta.stein import stein_direction
from hbmeta.tasks import Tasks

__all__ = ["BMAML"]


class _Offsets(nn.Module):
    """(M, size) where the particles start, around the location of the task prior."""

    def __init__(self, particles: int, size: int, spread: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randn(particles, size, generator=generator, dtype=torch.float64)
        self.raw = nn.Parameter(spread * raw)

    def forward(self) -> Tensor:
        # Without a common part, which the location of the prior has already.
        return self.raw - self.raw.mean(0)


@dataclass(frozen=True)
class _Stein:
    """An inner optimizer that is handed −∇log p of every particle and moves along Stein's.

    What moves is how far the particles are from `base`.
    """

    rule: InnerOptimizer
    points: Tensor
    base: Leaves

    def start(self, phi: Leaves) -> State:
        return self.rule.start(phi)

    def step(
        self,
        state: State,
        gradients: Leaves,
        rates: Sequence[Tensor | float],
        number: int | Tensor,
    ) -> State:
        particles = [b + d for b, d in zip(self.base, state[0], strict=True)]
        directions = stein_direction(particles, [-g for g in gradients])
        # The direction is that of the whole target; dividing log p would widen it instead.
        downhill = [-d / self.points.reshape(-1, *(1,) * (d.ndim - 2)) for d in directions]
        return self.rule.step(state, downhill, rates, number)


@dataclass(frozen=True)
class BMAML(BayesianGradient):
    """Bayesian MAML: q(φ | S) = M particles, equal weights, N Stein steps from learned starts.

    Keeps p(y | φ, θ) and p(φ | θ); approximates p(φ | S, θ) by a few particles in unconstrained
    space, stopped early. One particle is gradient ascent on log p(S | φ) + log p(φ | θ), exact as
    the maximum a posteriori; on a Gaussian in one dimension many particles have its mean, and a
    variance that is close. In many dimensions a few particles collapse towards each other, and
    their spread falls short of the posterior's.

    Args:
        steps, step_size, optimizer, momentum: see `BayesianGradient`; α in units of φ² per unit of
            loss, as MAML's.
        reduction: "mean" divides the steps by the number of points, not the target: the prior
            weighs what it weighs in Bayes' rule.
        particles: M.
        objective: "chaser", the published loss (module's docstring), or "query",
            −log (1/M) Σ_m p(Q | φ_m, S, θ) per query point, through the steps.
        leader_steps: s, of the leader.
        spread: standard deviation of the particles' starts before training, in units of φ.
    Raises:
        DataError: a setting that cannot be used.
    References:
        Yoon, Kim, Dia, Kim, Bengio, Ahn (2018), NeurIPS; Liu, Wang (2016), NeurIPS.
    """

    particles: int = 5
    objective: Literal["chaser", "query"] = "chaser"
    leader_steps: int = 1
    spread: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole("particles", 1)
        self.require_whole("leader_steps", 1)
        self.require_among("objective", ("chaser", "query"))
        self.require_number("spread", 0.0, math.inf)

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module | None:
        """Where the particles start; one starts at the location of the task prior."""
        if self.particles == 1:
            return None
        return _Offsets(self.particles, problem.sites.phi_size, self.spread, seed)

    def given(
        self, problem: Problem, theta: Theta, own: Any, support: Batch, noise: Noise
    ) -> Empirical:
        """The particles after N steps; those of the prior for a task without support."""
        found = self._chased(problem, theta, theta, own, support)
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
        """(tasks,) the chaser loss, or −log of the mean predictive density per query point."""
        points = query.counts.clamp_min(1.0)

        def log_predictive(phi: Phi) -> Tensor:
            return problem.log_predictive(theta, phi, support, query)

        if self.objective == "query":
            particles = self._chased(problem, theta, theta, own, support)
            values = self.over(log_predictive, particles)
            return (math.log(self.particles) - torch.logsumexp(values, 0)) / points
        held = {name: value.detach() for name, value in theta.items()}
        chaser = self._chased(problem, held, theta, own, support)
        ahead = self._ahead(problem, held, chaser, support, query)
        distance = torch.zeros_like(points)
        for name, value in chaser.items():
            # chaser − leader; what the leader has travelled is not taken as a difference of places,
            # of whose digits most would cancel.
            gap = (value - value.detach()) - ahead[name]
            square = gap.square().reshape(self.particles, len(points), -1)
            distance = distance + square.sum(-1).mean(0)
        leader = {name: value.detach() + ahead[name] for name, value in chaser.items()}
        fit = -self.over(log_predictive, leader).mean(0) / points
        distance = distance / self._nats(support, query)
        # In brackets: a loss that is large beside the distance would take its digits.
        return distance + (fit - fit.detach())

    def _nats(self, support: Batch, query: Batch) -> Tensor:
        """(tasks,) the squared distance that the leader goes per nat and point, 2 α s."""
        per_point = torch.ones_like(support.counts)
        if self.reduction == "sum":
            per_point = (support.counts + query.counts).clamp_min(1.0)
        # Without steps there is no distance either.
        return per_point * (2.0 * self.leader_steps * self.step_size or 1.0)

    def _chased(
        self, problem: Problem, likelihood: Theta, prior: Theta, own: Any, support: Batch
    ) -> Phi:
        """φ (M, tasks, *shape) by site after N steps on the support.

        `likelihood` is the θ of p(S | φ, θ), `prior` that of p(φ | θ) and of the start.
        """
        offsets = None if own is None else problem.sites.from_vector(own().unsqueeze(1))
        start = {
            name: value.unsqueeze(0) if offsets is None else value + offsets[name]
            for name, value in problem.location_by_site(prior, support).items()
        }

        def log_joint(phi: Phi) -> Tensor:
            if likelihood is prior:
                data, local, _ = problem.terms(prior, phi, support)
                return data + local
            data = problem.log_likelihood(likelihood, phi, support)
            return data + problem.log_task_prior(prior, phi, support)

        moved = self._moved(log_joint, start, self.points(support), self.steps)
        return {name: value + moved[name] for name, value in start.items()}

    def _ahead(
        self, problem: Problem, theta: Theta, chaser: Phi, support: Batch, query: Batch
    ) -> Phi:
        """How far s further steps on support and query take the chaser's particles; held."""

        def log_joint(phi: Phi) -> Tensor:
            # log p(S, Q | φ) = log p(S | φ) + log p(Q | S, φ), in every layout.
            data, local, _ = problem.terms(theta, phi, support)
            return data + local + problem.log_predictive(theta, phi, support, query)

        points = support.counts + query.counts
        points = points.clamp_min(1.0) if self.reduction == "mean" else torch.ones_like(points)
        start = {name: value.detach() for name, value in chaser.items()}
        with torch.no_grad():
            return self._moved(log_joint, start, points, self.leader_steps)

    def _moved(
        self, log_joint: Callable[[Phi], Tensor], start: Phi, points: Tensor, steps: int
    ) -> Phi:
        """How far `steps` Stein steps up a log joint take the particles, by site."""
        names, base = list(start), [value.contiguous() for value in start.values()]

        def objective(leaves: Leaves) -> Tensor:
            phi = {n: b + d for n, b, d in zip(names, base, leaves, strict=True)}
            return -self.over(log_joint, phi)

        rule = _Stein(inner_optimizer(self.optimizer, self.momentum), points, base)
        zeros = [torch.zeros_like(value) for value in base]
        found = self.descended(objective, zeros, optimizer=rule, steps=steps)
        return dict(zip(names, found, strict=True))
