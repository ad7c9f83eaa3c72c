"""The posterior of a few task parameters by quadrature, with an estimate of its error.

Model: φ_i ~ p(φ | θ) with one to three entries, y_i ~ p(y | φ_i, θ).
Estimator: with m and τ the location and the curvature's standard deviation of the task prior in
unconstrained space, u = m + (τ/√2) logit t maps (0, 1) onto the line (for a uniform prior t is its
distribution function), and with Gauss–Legendre nodes t_j and weights w_j

    p(S | θ) ≈ Σ_j W_j p(S | u_j, θ),    W_j = w_j p(u_j | θ) (τ/√2) / (t_j (1 − t_j)),
    q(φ | S) = Σ_j ρ_j δ(u_j),           ρ_j ∝ W_j p(S | u_j, θ);

θ maximises Σ_i log p(y_i | θ), plus log p(θ) on request.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian
from hbmeta.densities import Delta, Empirical
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.evidence import maximise_evidence
from hbmeta.feeding import training_tasks
from hbmeta.inference.strategy import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options

__all__ = ["Quadrature"]

_MOST = 3
_NODES = {1: 64, 2: 48, 3: 16}
# Gauss–Legendre converges geometrically once it resolves the posterior, err(2n) ≈ err(n)². The
# change against half the nodes is the error of the half, so that below 0.1 the grid's own is as a
# rule below 0.1² (Gaussian posteriors, changes of 0.05 to 0.1 nats: 1e-4 in the median, 0.06 in the
# worst tenth).
_COARSE = 0.1
_NUMBERS = 20_000_000
# A log mass of the prior beyond this is no error of the quadrature.
_MASS = 1e-3


@dataclass(frozen=True)
class Quadrature(Strategy):
    """q(φ | S) as weighted nodes of a grid, for programs with up to three entries of φ.

    Keeps p(y | φ, θ) and p(φ | θ); holds θ at its Type-II maximum likelihood estimate, or with
    `prior` at the mode of p(θ | y) in unconstrained space. Exact given θ up to the quadrature,
    whose error is measured per task against a grid of half the nodes (`info["quadrature_error"]`,
    in nats of log p(S | θ)). That is the error of the coarser grid; convergence is geometric, so
    that of the grid itself is as a rule about its square, and changes are warned of above 0.1. As
    for ExactLinear, a variance between tasks whose estimate is zero is in `info["at_zero"]` and in
    a warning.

    Args:
        nodes: per entry of φ; by default 64, 48 and 16 for one, two and three entries.
        prior: add log p(θ) to the evidence.
    Raises:
        UnsupportedModelError: more than three entries of φ.
        ConvergenceError: a log p(S | θ) that is not finite; names the task.
    """

    learns_spread: ClassVar[bool] = True
    joint_loss: ClassVar[bool] = True

    nodes: int | None = None
    prior: bool = False

    def __post_init__(self) -> None:
        if self.nodes is not None and not (isinstance(self.nodes, int) and self.nodes >= 4):
            raise DataError(
                self.name,
                needed="nodes as a whole number of 4 or more, or None",
                found=repr(self.nodes),
                do="Leave it out; raise it where the posterior is much narrower than the prior.",
            )

    def adaptable(self) -> tuple[str, ...]:
        """The grid."""
        return ("nodes",)

    def check(self, problem: Problem) -> None:
        """Few parameters per task."""
        if problem.sites.phi_size > _MOST:
            raise UnsupportedModelError(
                self.name,
                needed=f"at most {_MOST} parameters per task (the grid is a product)",
                found=str(problem.sites.phi_size),
                do="Use NUTS as the reference.",
            )

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ at the maximum of the evidence."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(tasks)

        def evidence(theta: Theta) -> Tensor:
            return self._weighted(problem, theta, batch)[1].logsumexp(0)

        return maximise_evidence(
            problem, batch, evidence, prior=self.prior, options=options, where=self.name
        )

    def adapt(self, fitted: Any, support: Tasks, seed: int) -> TaskPosterior:
        """The weighted nodes, with log p(S | θ) and the error of the quadrature in `info`."""
        problem: Problem = fitted.problem
        batch = problem.batch(support)
        with torch.no_grad():
            density = self.posterior(problem, fitted.theta, None, batch)
            fine, coarse = (
                self._weighted(problem, fitted.theta, batch, halve=halve)[1].logsumexp(0)
                for halve in (False, True)
            )
        finite = torch.isfinite(fine)
        if not bool(finite.all()):
            worst = int((~finite).nonzero()[0])
            raise ConvergenceError(
                f"{self.name}.adapt",
                needed="a finite log p(S | θ)",
                found=f"{float(fine[worst])} for task {support.ids[worst]!r}",
                do="Look for points with equal x where there is little noise (a covariance that is "
                "singular to rounding), and for values of y that the program cannot produce.",
            )
        error = (fine - coarse).abs()
        if float(error.max()) > _COARSE:
            named = support.ids[int(error.argmax())]
            warnings.warn(
                f"{self.name}: the quadrature of task {named!r} changes by "
                f"{float(error.max()):.2g} nats when the grid is halved. "
                f"Raise nodes (now {self._count(problem)}).",
                stacklevel=3,
            )
        return TaskPosterior(
            problem,
            fitted.theta,
            density,
            support,
            info={"log_evidence": fine, "quadrature_error": error},
            units=fitted.units,
        )

    def posterior(
        self, problem: Problem, theta: Theta, own: Any, support: Batch
    ) -> Empirical | Delta:
        """Weighted nodes per task; where nothing differs between tasks, the empty φ."""
        if not problem.sites.locals:
            return Delta(problem.location(theta, support))
        return Empirical(*self._weighted(problem, theta, support), nodes=True)

    def _count(self, problem: Problem) -> int:
        return self.nodes or _NODES[max(problem.sites.phi_size, 1)]

    def _weighted(
        self, problem: Problem, theta: Theta, batch: Batch, *, halve: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Nodes u (nodes, tasks, phi_size) and log W_j p(S | u_j, θ) (nodes, tasks)."""
        start = problem.location(theta, batch)
        size = start.shape[-1]
        if not size:
            return start.unsqueeze(0), problem.log_likelihood(theta, start, batch).unsqueeze(0)
        count = self._count(problem)
        t, log_w = _grid(count // 2 if halve else count, size)
        t, log_w = t.to(start), log_w.to(start)
        spread, proper = _spread(problem, theta, start, batch)
        scale = spread / math.sqrt(2.0)
        phi = start + scale * torch.logit(t).unsqueeze(1)
        # du = (τ/√2) dt / (t (1 − t))
        volume = scale.log().sum(-1) - (t.log() + torch.log1p(-t)).sum(-1).unsqueeze(1)

        def terms(one: Tensor) -> tuple[Tensor, Tensor]:
            likelihood, local, _ = problem.terms(theta, one, batch)
            return likelihood, local

        cells = batch.weight.numel() * (batch.weight.shape[-1] if batch.joint else 1)
        chunk = max(1, _NUMBERS // cells)
        parts = [torch.vmap(terms)(piece) for piece in phi.split(chunk)]
        log_prior = torch.cat([local for _, local in parts]) + log_w.unsqueeze(1) + volume
        # The rule's own mass of the prior, 1 but for the quadrature. Where the spread of φ is below
        # the rounding of its location all nodes coincide, and must weigh 1 together. A flat prior
        # has infinite mass.
        mass = log_prior.logsumexp(0)
        off = (mass.abs() > _MASS) & proper
        log_prior = log_prior - torch.where(off, mass, torch.zeros_like(mass))
        return phi, torch.cat([likelihood for likelihood, _ in parts]) + log_prior


def _grid(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes on (0, 1)^size, (count^size, size), and their log weights."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    t, log_w = torch.from_numpy(0.5 * (nodes + 1.0)), torch.from_numpy(np.log(0.5 * weights))
    index = torch.cartesian_prod(*[torch.arange(count)] * size).reshape(-1, size)
    return t[index], log_w[index].sum(-1)


def _spread(problem: Problem, theta: Theta, start: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(tasks, phi_size) 1/√(−∂²/∂u²) of the task prior at its location, a constant of the rule.

    And (tasks,) whether no entry of φ has a flat prior.
    """

    def log_prior(phi: Tensor) -> Tensor:
        found = problem.log_task_prior({k: v.detach() for k, v in theta.items()}, phi, batch)
        # A flat prior is no function of φ, which autograd refuses.
        return found + 0.0 * phi.sum(-1)

    _, _, hessian = gradient_and_hessian(log_prior, start.detach())
    curvature = -hessian.diagonal(dim1=-2, dim2=-1)
    flat = curvature <= 1e-12
    spread = torch.where(flat, torch.ones_like(curvature), curvature.clamp_min(1e-12)).rsqrt()
    return spread, ~flat.any(-1)
